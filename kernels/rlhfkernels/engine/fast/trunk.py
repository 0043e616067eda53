"""The fast trunk: forward passes and decoding as loops over the layers' matmuls, on the modules' own weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.engine.fast.blocks import Blocks, read_blocks
from rlhfkernels.engine.fast.decoding import FastDecoder, MakeSteps
from rlhfkernels.engine.fast.forward_pass import run_blocks, run_packed
from rlhfkernels.engine.trunk import Decoder, PlainTrunk
from rlhfkernels.errors import CaseError
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.attention_mask import Segment


class FastTrunk(PlainTrunk):
    """A trunk of an architecture that ``read_blocks`` supports.

    Args:
        case: its options select attention, cache and checkpointing.
        model: the trunk.
        adapters: its adapter sets.
        blocks: the layers of the trunk.

    Attributes:
        make_steps: as in ``FastDecoder``; a plan sets it, whose tensors are not on the device that it plans for.
    """

    name = "fast"

    def __init__(self, case: Case, model: LoadedModel, adapters: Adapters, blocks: Blocks) -> None:
        super().__init__(case, model, adapters)
        self._blocks = blocks
        self.make_steps: MakeSteps | None = None

    def hidden(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        start: int = 0,
        train: bool = False,
    ) -> torch.Tensor:
        """See ``Trunk.hidden``."""
        checkpointing = train and self._options.engine.gradient_checkpointing
        return run_blocks(self._blocks, adapter, tokens, attention_mask, start=start, checkpointing=checkpointing)

    def packed(
        self,
        adapter: str | None,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        segments: Sequence[Segment],
        *,
        train: bool = False,
    ) -> torch.Tensor:
        """See ``Trunk.packed``."""
        checkpointing = train and self._options.engine.gradient_checkpointing
        return run_packed(self._blocks, adapter, tokens, ids, segments, checkpointing=checkpointing)

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """See ``Trunk.decoder``."""
        cuda_graphs = self._options.engine.cuda_graphs
        return FastDecoder(self._blocks, adapter, max_len, observer, cuda_graphs, self.make_steps)


def make_fast_trunk(case: Case, model: LoadedModel, adapters: Adapters) -> PlainTrunk:
    """Returns a fast trunk if it supports the model and the case's options, else a plain one; see ``name``.

    Divided weights are gathered by hooks of the modules, which the fast trunk does not call. DeepSpeed's stages 1 and 2
    move trained weights, and the fast trunk has them in storages of its own.

    Raises:
        CaseError: CUDA graphs are asked for, which a plain trunk has none of.
    """
    options = case.options
    covered = options.engine.cache_implementation == "static" and not options.parallel.moves_weights
    if model.attention == "sdpa" and covered:
        blocks = read_blocks(model.trunk, select_backend(case.options.engine.backend, case.device, case.dtype))
        if blocks is not None:
            return FastTrunk(case, model, adapters, blocks)
    if case.options.engine.cuda_graphs == "on":
        why = f"the plain trunk runs {type(model.trunk).__name__} with the case's attention and KV cache"
        raise CaseError([f"engine.cuda_graphs is 'on': {why}, and has no graphs, so it must be auto or off."])
    return PlainTrunk(case, model, adapters)
