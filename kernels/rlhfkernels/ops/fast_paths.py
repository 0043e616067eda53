"""Names of the fast paths of a process beside this project's own ops: kernels of other libraries, and CUDA graphs.

Each is used where it can run and is better, so only the process that ran a step knows. It runs one case.
"""

from __future__ import annotations

CUDA_GRAPHS = "cuda_graphs"
_used: set[str] = set()


def note_fast_path(name: str) -> None:
    """Notes that ``name``, a package or ``CUDA_GRAPHS``, did part of a step."""
    _used.add(name)


def forget_fast_paths() -> None:
    """Forgets all names: the checks of a loaded model are no part of a step."""
    _used.clear()


def fast_paths() -> list[str]:
    """Returns the names that were noted, in alphabetical order."""
    return sorted(_used)
