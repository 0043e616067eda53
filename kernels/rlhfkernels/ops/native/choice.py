"""The faster of several matmuls on this machine: measured once, remembered in the user's cache folder.

The choice must not change between a plan and its run, because the C takes scratch memory. So one process measures,
others wait for it, and all read the same file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

from rlhfkernels.ops.native.build import library_path

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
    import fcntl  # here, as Windows has none: nothing is measured there, since nothing is compiled

    path = _path(num_threads)
    seconds = _read(path, candidates)
    if seconds is None:
        try:
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # released as the file is closed
                seconds = _read(path, candidates)
                if seconds is None:
                    seconds = measure(candidates, timer)
                    _write(path, seconds)
        except OSError:
            return list(candidates)[-1]
    return min(seconds, key=seconds.__getitem__)


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


def _read(path: Path, names: Mapping[str, object]) -> dict[str, float] | None:
    """The remembered seconds of ``names``; ``None`` if there are none or the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seconds = {name: float(found[name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seconds if all(0 < each < math.inf for each in seconds.values()) else None


def _write(path: Path, seconds: Mapping[str, float]) -> None:
    """Writes whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        file.write_text(json.dumps(seconds), encoding="utf-8")
        file.replace(path)
