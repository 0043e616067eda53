"""The fast path of a trunk: every pass by a lean loop over the layers' products, on the modules' own weights."""

from __future__ import annotations

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.engine.fast.blocks import Blocks, read_blocks
from rlhfkernels.engine.fast.decoding import FastDecoder
from rlhfkernels.engine.fast.passes import run_blocks
from rlhfkernels.engine.trunk import Decoder, PlainTrunk
from rlhfkernels.models.adapters import Adapters
from rlhfkernels.models.loading import LoadedModel
from rlhfkernels.observer import Observer
from rlhfkernels.ops.forms import kernels_of


class FastTrunk(PlainTrunk):
    """A trunk whose architecture the fast path covers.

    Args:
        case: its options say how.
        model: the trunk.
        adapters: its adapter sets.
        blocks: what the fast path read of the trunk.
    """

    name = "fast"

    def __init__(self, case: Case, model: LoadedModel, adapters: Adapters, blocks: Blocks) -> None:
        super().__init__(case, model, adapters)
        self._blocks = blocks

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

    def decoder(self, adapter: str | None, max_len: int, observer: Observer) -> Decoder:
        """See ``Trunk.decoder``."""
        return FastDecoder(self._blocks, adapter, max_len, observer)


def make_fast_trunk(case: Case, model: LoadedModel, adapters: Adapters) -> PlainTrunk:
    """The fast path where it covers the model and the case's options, else the plain one; ``name`` says which."""
    if model.attention == "sdpa" and case.options.engine.cache_implementation == "static":
        blocks = read_blocks(model.trunk, kernels_of(case))
        if blocks is not None:
            return FastTrunk(case, model, adapters, blocks)
    return PlainTrunk(case, model, adapters)
