"""Extrapolation in depth: what the step of a deep model does, from what two shallow ones do.

Layers of one kind are alike, so one layer more repeats a stretch of the changes wherever a step goes through its
layers: in every forward pass, in every backward pass, where tensors are declared.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def deepen(shallow: Sequence[T], deeper: Sequence[T], times: int) -> list[T] | None:
    """Returns the sequence of a depth beyond that of ``deeper``.

    ``deeper`` is two layers deeper than ``shallow``. It must be ``shallow`` with stretches inserted, each of which is
    one stretch twice: so the second new layer did what the first new layer did, and so will the next.

    Args:
        shallow: Some depth.
        deeper: Two layers deeper.
        times: Number of layers beyond ``deeper``.

    Returns:
        ``None`` if ``deeper`` is no such sequence.
    """
    out: list[T] = []
    i = j = 0
    while True:
        n = _common(shallow, i, deeper, j)
        out += deeper[j : j + n]
        i, j = i + n, j + n
        if i == len(shallow) and j == len(deeper):
            return out
        size = _inserted(shallow, i, deeper, j)
        if size is None:
            return None
        out += list(deeper[j : j + size]) * (times + 2)
        j += 2 * size


def _common(a: Sequence[T], i: int, b: Sequence[T], j: int) -> int:
    """Length of the common start of ``a[i:]`` and ``b[j:]``."""
    most = min(len(a) - i, len(b) - j)
    n = 0
    while n < most and a[i + n] == b[j + n]:
        n += 1
    return n


def _inserted(shallow: Sequence[T], i: int, deeper: Sequence[T], j: int) -> int | None:
    """Size of the stretch that stands twice at ``deeper[j:]`` and not at ``shallow[i:]``.

    Of several sizes, the one after which the two sequences agree for longest.
    """
    best, longest = None, 0
    left = len(deeper) - j - (len(shallow) - i)  # what is inserted from here on
    for size in range(1, left // 2 + 1):
        middle, end = j + size, j + 2 * size
        if deeper[j] == deeper[middle] and deeper[j:middle] == deeper[middle:end]:
            agrees = _common(shallow, i, deeper, end) + (end - j == left)
            if agrees > longest:
                best, longest = size, agrees
    return best
