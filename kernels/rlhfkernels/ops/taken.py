"""Names of what a process took beside this project's own ops: kernels of other libraries, and CUDA graphs.

Each is taken where it can run and is as good, so only the process that ran a step knows. It runs one case.
"""

from __future__ import annotations

CUDA_GRAPHS = "cuda_graphs"
_taken: set[str] = set()


def note_taken(name: str) -> None:
    """Notes that ``name``, a package or ``CUDA_GRAPHS``, did part of a step."""
    _taken.add(name)


def taken() -> list[str]:
    """Returns the names that were noted, in alphabetical order."""
    return sorted(_taken)
