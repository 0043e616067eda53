"""The faster of several matmuls on this CPU: measured once, remembered in the user's cache folder.

The choice must not change between a plan and its run, because the C takes scratch memory.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from rlhfkernels.ops.native.build import library_path
from rlhfkernels.ops.stored_seconds import stored_seconds

Matmul = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]

# Forces a matmul by name; ``auto`` or nothing measures.
VARIABLE = "RLHFBENCH_CPU_MATMUL"
# (m, k, n, right is a transposed weight): a layer of a small model forward, its MLP forward, and that MLP's gradient of
# the input. Larger ones rank the same. On one busy core of an AMD EPYC with AVX-512 a round takes 0.03 s in C and
# 0.07 s in torch, and the whole measurement 0.7 s.
_SHAPES = ((256, 768, 768, True), (256, 768, 2048, True), (256, 2048, 768, False))
# The best of many rounds, because other processes disturb some. Two at least, as the first is a warm-up.
_MIN_ROUNDS, _MAX_ROUNDS, _BUDGET_S = 2, 10, 0.6


def fastest(candidates: Mapping[str, Matmul], num_threads: int, timer: Callable[[], float] = time.perf_counter) -> str:
    """Returns the name of the fastest of ``candidates`` on this CPU, with these threads.

    Where it cannot be remembered, the last candidate is taken: another process must come to the same result.

    Args:
        candidates: matmuls by name, each of (left [m, k], right [k, n], out [m, n]).
        num_threads: threads that torch runs them on.
        timer: a clock in seconds.

    Raises:
        ValueError: the environment variable names no candidate.
        BuildError: the compiled library, beside which the choice is kept, cannot be built.
    """
    name = forced(candidates)
    if name is not None:
        return name
    seconds = stored_seconds(_path(num_threads), candidates, lambda: measure(candidates, timer))
    return list(candidates)[-1] if seconds is None else min(seconds, key=seconds.__getitem__)


def forced(names: Mapping[str, object]) -> str | None:
    """Returns the name that the environment variable forces, or ``None``.

    Raises:
        ValueError: it is none of ``names``.
    """
    name = os.environ.get(VARIABLE) or "auto"
    if name == "auto":
        return None
    if name not in names:
        raise ValueError(f"{VARIABLE} is {name!r}: it must be {', '.join(names)} or auto.")
    return name


def measure(candidates: Mapping[str, Matmul], timer: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Returns the seconds of each candidate: the sum over all shapes of the best round. Candidates alternate."""
    seconds = dict.fromkeys(candidates, 0.0)
    # A plan or a memory ledger around this must not see it.
    with _disable_current_modes(), torch.no_grad():
        for m, k, n, is_transposed in _SHAPES:
            left, out = torch.ones(m, k), torch.empty(m, n)
            right = torch.ones(n, k).t() if is_transposed else torch.ones(k, n)
            best = dict.fromkeys(candidates, math.inf)
            started = timer()
            for done in range(_MAX_ROUNDS):
                if done >= _MIN_ROUNDS and timer() - started > _BUDGET_S / len(_SHAPES):
                    break
                for name, multiply in candidates.items():
                    begun = timer()
                    multiply(left, right, out)
                    best[name] = min(best[name], timer() - begun)
            for name in candidates:
                seconds[name] += best[name]
    return seconds


def _path(num_threads: int) -> Path:
    """The file of the choice. The library's name has the hash of the CPU, the compiler, its flags and the sources."""
    library = library_path()
    key = hashlib.sha256(repr((library.stem, torch.__version__, num_threads, _SHAPES)).encode()).hexdigest()[:16]
    return library.with_name(f"matmul-{key}.json")
