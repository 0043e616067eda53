"""The fast trunk: forward passes and decoding as loops over the layers' matmuls, on the modules' own weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.config.options import EngineOptions
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.engine.fast.architectures import read_blocks
from rlhfkernels.engine.fast.blocks import Blocks
from rlhfkernels.engine.fast.decoding import FastDecoder, MakeSteps
from rlhfkernels.engine.fast.forward_pass import run_blocks, run_packed
from rlhfkernels.engine.trunk import Decoder, PlainTrunk, Trunk
from rlhfkernels.errors import CaseError
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.attention_mask import Segment


class FastTrunk:
    """A trunk of an architecture that ``read_blocks`` supports.

    Args:
        options: select checkpointing and graphs.
        blocks: the layers of the trunk.

    Attributes:
        make_steps: as in ``FastDecoder``; a plan sets it, whose tensors are not on the device that it plans for.
    """

    name = "fast"

    def __init__(self, options: EngineOptions, blocks: Blocks) -> None:
        self._options, self._blocks = options, blocks
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
        checkpointing = train and self._options.gradient_checkpointing
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
        checkpointing = train and self._options.gradient_checkpointing
        return run_packed(self._blocks, adapter, tokens, ids, segments, checkpointing=checkpointing)

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """See ``Trunk.decoder``."""
        cuda_graphs = self._options.cuda_graphs
        return FastDecoder(self._blocks, adapter, max_len, observer, cuda_graphs, self.make_steps)

    def follow_weights(self) -> None:
        """See ``Trunk.follow_weights``."""
        for block in self._blocks.layers:
            for projection in block.projections:
                projection.follow_weights()


def make_fast_trunk(case: Case, model: LoadedModel, adapters: Adapters) -> Trunk:
    """Returns a fast trunk if it supports the model and the case's options, else a plain one; see ``name``.

    Raises:
        CaseError: CUDA graphs are asked for, which a plain trunk has none of.
    """
    options = case.options
    if model.attention == "sdpa" and options.engine.cache_implementation == "static":
        backend = select_backend(options.engine.backend, case.device, case.dtype)
        blocks = read_blocks(model.trunk, backend, is_divided=options.parallel.divides_weights)
        if blocks is not None:
            return FastTrunk(options.engine, blocks)
    if case.options.engine.cuda_graphs == "on":
        why = f"the plain trunk runs {type(model.trunk).__name__} with the case's attention and KV cache"
        raise CaseError([f"engine.cuda_graphs is 'on': {why}, and has no graphs, so it must be auto or off."])
    return PlainTrunk(case, model, adapters)
