"""A rank's share of each role's gradients in DeepSpeed's stages 0 to 2, where a role has an engine of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoleGradients:
    """Bytes of one role's gradients on one rank.

    Attributes:
        role: that owns the weights.
        whole: of all its weights.
        partition: of the rank's part of them.
        tensors: of the gradients that the part touches, each whole. DeepSpeed averages and copies whole tensors
            (zero/stage_1_and_2.py, ``get_all_grad_tensors``), so that one that lies across a boundary counts twice.
        norm: of the largest piece of a tensor in the part, in float64: norms are taken of one after the other
            (``get_grad_norm_direct``).
    """

    role: str
    whole: int
    partition: int
    tensors: int
    norm: int


def role_gradients(numels: Mapping[str, Sequence[int]], item_size: int, world_size: int) -> list[list[RoleGradients]]:
    """For every rank, the gradients of every role with an optimizer, in the order of the optimizers' steps.

    Args:
        numels: of each role, the elements of its weights, in their order.
        item_size: bytes of an element.
        world_size: ranks.
    """
    found: list[list[RoleGradients]] = [[] for _ in range(world_size)]
    for role, each in numels.items():
        whole = sum(each) * item_size
        partition = -(-whole // world_size)
        for rank, (beyond, largest) in enumerate(_pieces(each, world_size)):
            tensors = partition + beyond * item_size
            found[rank].append(
                RoleGradients(role=role, whole=whole, partition=partition, tensors=tensors, norm=8 * largest)
            )
    return found


def _pieces(numels: Sequence[int], world_size: int) -> Iterator[tuple[int, int]]:
    """For each of equal parts, the elements of the tensors that it touches beyond itself, and of its largest piece."""
    size = -(-sum(numels) // world_size)
    ends = list(itertools.accumulate(numels))
    for rank in range(world_size):
        start, stop = min(rank * size, ends[-1]), min((rank + 1) * size, ends[-1])
        touched = [(n, end) for n, end in zip(numels, ends, strict=True) if end > start and end - n < stop]
        pieces = (min(end, stop) - max(end - n, start) for n, end in touched)
        yield sum(n for n, _ in touched) - (stop - start), max(pieces, default=0)
