"""AdamW with 8-bit states: bitsandbytes' arithmetic, and its memory without the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rlhfkernels.errors import CaseError
from rlhfkernels.training.optimizers import Optimizer

# bitsandbytes' 8-bit states (since 0.45, bitsandbytes/optim/optimizer.py, Optimizer2State.init_state): elements per
# scale, the smallest tensor with 8-bit states, entries of the quantisation map.
_BLOCK, _MIN_8BIT_ELEMENTS, _CODES = 256, 4096, 256


class AdamW8bitStates(Optimizer):
    """The states of 8-bit AdamW by bitsandbytes' rules, without its arithmetic: an update changes nothing.

    Both moments of a tensor of at least 4096 elements take one byte an element, and one float32 scale for each block of
    256 elements. Smaller tensors have float32 moments. All tensors share the two quantisation maps. A plan uses this
    class, so that it needs no bitsandbytes. Arguments as ``AdamW``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        super().__init__(parameters, **schedule)
        self.weight_decay, self.eps = weight_decay, eps
        self.maps = self._make_maps()
        self.states = [self._make_state(master) for master in self.masters]

    def tensors(self) -> list[torch.Tensor]:
        """Master copies, both moments, their scales and the quantisation maps."""
        held = [tensor for state in self.states for tensor in state.values()]
        return [*super().tensors(), *dict.fromkeys(held)]

    def _make_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The maps of the first and of the second moment, [256] each."""
        device = self.masters[0].device if self.masters else None
        return torch.zeros(_CODES, device=device), torch.zeros(_CODES, device=device)

    def _make_state(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of one tensor, under bitsandbytes' names."""
        if master.numel() < _MIN_8BIT_ELEMENTS:
            return {name: torch.zeros_like(master) for name in ("state1", "state2")}
        num_blocks = -(-master.numel() // _BLOCK)
        state = {name: torch.zeros_like(master, dtype=torch.uint8) for name in ("state1", "state2")}
        state |= {name: torch.zeros(num_blocks, device=master.device) for name in ("absmax1", "absmax2")}
        return {**state, "qmap1": self.maps[0], "qmap2": self.maps[1]}

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        pass


class AdamW8bit(AdamW8bitStates):
    """AdamW with 8-bit states (arXiv:2110.02861), computed by bitsandbytes.

    The states are allocated at construction and handed to the library, which would allocate them at its first step.
    Arguments as ``AdamW``.

    Raises:
        CaseError: bitsandbytes is not installed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float, eps: float, **schedule: Any) -> None:
        try:
            import bitsandbytes
        except ImportError as error:
            sentence = "optimizer.name is 'adamw8bit': it needs bitsandbytes, which is not installed."
            raise CaseError([sentence]) from error
        self._package: Any = bitsandbytes
        super().__init__(parameters, weight_decay=weight_decay, eps=eps, **schedule)
        for master, state in zip(self.masters, self.states, strict=True):
            self._library.state[master] = {"step": 0, **state}

    def _make_maps(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.masters:  # as on a rank that holds no part of a scalar head: the library refuses an empty list
            return super()._make_maps()
        self._library = self._package.optim.AdamW8bit(
            self.masters, lr=self.peak_lr, betas=(0.9, 0.999), eps=self.eps, weight_decay=self.weight_decay
        )
        self._library.fill_qmap()
        first, second = (self._library.name2qmap[name] for name in ("dynamic", "udynamic"))
        return first.to(self.masters[0].device), second.to(self.masters[0].device)

    def _update(self, rows: Sequence[int], masters: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        self._library.param_groups[0]["lr"] = self.lr
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
        self._library.step()  # skips tensors without a gradient
        for master in masters:
            master.grad = None
