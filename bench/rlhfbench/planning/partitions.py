"""What one rank holds of each role's gradients in DeepSpeed's stages 0 to 2, where a role has an engine of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RoleGradients:
    """Bytes of one role's gradients on one rank.

    Attributes:
        role: that owns the weights.
        whole: of all its weights.
        partition: of the rank's part of them.
        tensors: of the gradients that the part touches, each whole. DeepSpeed averages and copies whole tensors
            (zero/stage_1_and_2.py, ``get_all_grad_tensors``), so that one that lies across a boundary counts twice.
    """

    role: str
    whole: int
    partition: int
    tensors: int


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
        for rank, beyond in enumerate(_beyond_boundaries(each, world_size)):
            tensors = partition + beyond * item_size
            found[rank].append(RoleGradients(role=role, whole=whole, partition=partition, tensors=tensors))
    return found


def _beyond_boundaries(numels: Sequence[int], world_size: int) -> list[int]:
    """For each of equal parts, the elements of the tensors that it touches, without the part itself."""
    size = -(-sum(numels) // world_size)
    ends = list(itertools.accumulate(numels))
    found = []
    for rank in range(world_size):
        start, stop = min(rank * size, ends[-1]), min((rank + 1) * size, ends[-1])
        touched = sum(n for n, end in zip(numels, ends, strict=True) if end > start and end - n < stop)
        found.append(touched - (stop - start))
    return found
