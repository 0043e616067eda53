"""Kernels of other libraries for CUDA, used where they are better than this project's own.

Better means: on the device at hand the same values and gradients within rounding, no more memory, and less time. Each
is measured once, at the sizes of a 7B model's layer, and its times are stored. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from rlhfkernels.ops.dispatch import is_installed
from rlhfkernels.ops.fast_paths import note_fast_path
from rlhfkernels.ops.native.build import BuildError, cache_folder
from rlhfkernels.ops.stored_seconds import stored_seconds

Tensors = tuple[torch.Tensor, ...]
OURS = "ours"
# Seconds of a library that fails or is not as good: a file of seconds holds finite ones.
_UNUSABLE_S = 1e9
# The best of several rounds in turn. The first compiles and allocates.
_ROUNDS = 8
# Largest relative error in the norm, against ours: a few roundings.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
# Memory beyond ours that is rounding of the allocator.
_MEMORY_SHARE = 1.01


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LibraryKernel:
    """An op of another library.

    Attributes:
        op: its name here.
        package: of the library, as it is imported.
        ours: computes the op from ``inputs``, the first of which has a gradient.
        theirs: computes the same by the library, which it imports.
        inputs: (device, dtype) to the tensors of a measurement.
    """

    op: str
    package: str
    ours: Callable[[Tensors], torch.Tensor]
    theirs: Callable[[Tensors], torch.Tensor]
    inputs: Callable[[torch.device, torch.dtype], Tensors]

    def applies_to(self, x: torch.Tensor, backend: str) -> bool:
        """Returns whether the library computes the op of ``x``; ``backend`` ``torch`` takes torch's own ops only."""
        if not x.is_cuda or backend == "torch" or x.dtype not in _TOLERANCE or isinstance(x, FakeTensor):
            return False
        return is_installed(self.package) and self.is_faster(x.device, x.dtype)

    def use_for(self, x: torch.Tensor, backend: str) -> bool:
        """Returns ``applies_to``, and notes it: called where the library then computes the op."""
        applies = self.applies_to(x, backend)
        if applies:
            note_fast_path(self.package)
        return applies

    def is_faster(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Returns whether the library is better on ``device``; measures where no times are stored."""
        return _is_faster(self, device, dtype)


@functools.cache
def _is_faster(library: LibraryKernel, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        path = _path(library, device, dtype)
    except (OSError, BuildError):
        return False
    try:
        seconds = stored_seconds(path, (OURS, library.package), lambda: measure(library, device, dtype))
    except torch.OutOfMemoryError:  # the device is full now: nothing is stored, and this process uses ours
        return False
    return seconds is not None and seconds[library.package] < seconds[OURS]


def measure(
    library: LibraryKernel, device: torch.device, dtype: torch.dtype, timer: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Returns the seconds of a forward and a backward by ``ours`` and by the package, the best of several rounds.

    Args:
        library: the op.
        device: where it runs.
        dtype: of its tensors.
        timer: a clock in seconds.
    """
    calls = {OURS: library.ours, library.package: library.theirs}
    # A plan or a memory ledger around this must not see it.
    with _disable_current_modes():
        inputs = library.inputs(device, dtype)
        if not _is_as_good(library, inputs):
            return {OURS: 1.0, library.package: _UNUSABLE_S}
        best = dict.fromkeys(calls, math.inf)
        for _ in range(_ROUNDS):
            for name, call in calls.items():
                _wait(device)
                begun = timer()
                _values(call, inputs)
                _wait(device)
                best[name] = min(best[name], timer() - begun)
    return best


def _is_as_good(library: LibraryKernel, inputs: Tensors) -> bool:
    """Returns whether the library runs, gives our values and gradients, and takes no more memory."""
    tolerance, device = _TOLERANCE[inputs[0].dtype], inputs[0].device
    expected = _values(library.ours, inputs)
    own_bytes = _peak_bytes(library.ours, inputs, device)
    try:
        found = _values(library.theirs, inputs)
        their_bytes = _peak_bytes(library.theirs, inputs, device)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # libraries fail in every way: versions, shapes, drivers
        return False
    errors = [float((a - b).double().norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]
    return max(errors) <= tolerance and their_bytes <= _MEMORY_SHARE * own_bytes


def _values(call: Callable[[Tensors], torch.Tensor], inputs: Tensors) -> list[torch.Tensor]:
    """Returns the result, and the gradient of the first input for a gradient of alternating signs."""
    leaf = inputs[0].detach().clone().requires_grad_()
    with torch.enable_grad():
        out = call((leaf, *inputs[1:]))
        signs = torch.ones_like(out).flatten()
        signs[::2] = -1
        (gradient,) = torch.autograd.grad(out, leaf, signs.view_as(out))
    return [out.detach(), gradient]


def _peak_bytes(call: Callable[[Tensors], torch.Tensor], inputs: Tensors, device: torch.device) -> int:
    """Returns the peak of the CUDA allocator; 0 on other devices."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _values(call, inputs)
    return torch.cuda.max_memory_allocated(device) - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _path(library: LibraryKernel, device: torch.device, dtype: torch.dtype) -> Path:
    """The file of the choice, by device, versions and dtype."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = [torch.__version__, *(_version(package) for package in (library.package, "triton"))]
    key = hashlib.sha256(repr((library.op, name, versions, str(dtype))).encode()).hexdigest()[:16]
    return cache_folder() / f"{library.op}-{key}.json"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
