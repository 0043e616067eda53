"""The tensors that a piece of code made and that still live, whoever holds them."""

from __future__ import annotations

import gc
import weakref

import torch


class TensorsSince:
    """Finds the live tensors that are newer than itself, through the garbage collector.

    It cannot list objects that ``gc.freeze`` has set aside: call ``note`` before.
    """

    def __init__(self) -> None:
        self._before = {id(tensor): weakref.ref(tensor) for tensor in _listed()}
        self._noted: dict[int, weakref.ref[torch.Tensor]] = {}

    def note(self) -> None:
        """Remembers the tensors that live now."""
        self._noted |= {id(tensor): weakref.ref(tensor) for tensor in self.live()}

    def live(self) -> list[torch.Tensor]:
        """Returns the newer tensors that live."""
        noted = [tensor for ref in self._noted.values() if (tensor := ref()) is not None]
        return noted + [tensor for tensor in _listed() if not _has(self._before, tensor) | _has(self._noted, tensor)]


def _has(refs: dict[int, weakref.ref[torch.Tensor]], tensor: torch.Tensor) -> bool:
    ref = refs.get(id(tensor))
    return ref is not None and ref() is tensor  # another tensor may have taken the id of one that is gone


def _listed() -> list[torch.Tensor]:
    # By type: isinstance asks objects for __class__, and some compute it.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
