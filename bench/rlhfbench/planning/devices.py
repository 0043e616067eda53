"""Accelerators by name: memory, bandwidth and dense matmul rates from their vendors' data sheets.

Rates are peaks without sparsity. Large matmuls reach 60 to 90 % of them. Memory is what the driver states where that
differs by more than 1 %: error correction takes a sixteenth of GDDR6, and some data sheets count in GB, others in GiB.
"""

from __future__ import annotations

import dataclasses

from rlhfbench.cases.sizes import parse_size
from rlhfbench.errors import SweepError
from rlhfkernels.naming import unknown

_GIB = 2**30
# Estimate of the CUDA context, library workspaces and fragmentation; not yet measured on a GPU.
_CONTEXT_BYTES = 3 * _GIB // 4
_FRAGMENTATION = 0.02
_SMALLEST_BYTES = _CONTEXT_BYTES / (1 - _FRAGMENTATION)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """A device to plan for.

    Attributes:
        name: Name on the command line.
        memory_bytes: Total memory.
        bytes_per_s: Memory bandwidth; ``None`` if only a size was given.
        flops_per_s: Dense matmul rate by dtype; empty if only a size was given.
        source: What states the figures.
    """

    name: str
    memory_bytes: int
    bytes_per_s: float | None = None
    flops_per_s: dict[str, float] = dataclasses.field(default_factory=dict)
    source: str = "given as a size"

    @property
    def reserve_bytes(self) -> int:
        """Estimate of the memory that tensors cannot use: CUDA context, library workspaces, fragmentation."""
        return int(_CONTEXT_BYTES + _FRAGMENTATION * self.memory_bytes)

    @property
    def usable_bytes(self) -> int:
        """Memory left for tensors."""
        return self.memory_bytes - self.reserve_bytes


def _accelerator(name: str, gib: float, tb_per_s: float, bf16: float, f32: float, source: str) -> Accelerator:
    """Returns one row: memory in GiB, bandwidth in TB/s, matmul rates in TFLOP/s."""
    return Accelerator(
        name=name,
        memory_bytes=int(gib * _GIB),
        bytes_per_s=tb_per_s * 1e12,
        flops_per_s={"bfloat16": bf16 * 1e12, "float32": f32 * 1e12},
        source=source,
    )


ACCELERATORS: dict[str, Accelerator] = {
    row.name: row
    for row in (
        _accelerator("a100-40gb", 40, 1.555, 312, 19.5, "NVIDIA A100 data sheet, SXM 40 GB"),
        _accelerator("a100-80gb", 80, 2.039, 312, 19.5, "NVIDIA A100 data sheet, SXM 80 GB"),
        _accelerator("h100-80gb", 80, 3.35, 989, 67, "NVIDIA H100 data sheet, SXM"),
        _accelerator("h200", 139.8, 4.8, 989, 67, "NVIDIA H200 data sheet, SXM; memory: driver"),
        _accelerator("b200", 178.3, 7.7, 2250, 75, "NVIDIA HGX B200 data sheet, per GPU; memory: driver"),
        _accelerator("l4", 23034 / 1024, 0.3, 121, 30.3, "NVIDIA L4 data sheet; memory: driver"),
        _accelerator("l40s", 46068 / 1024, 0.864, 362, 91.6, "NVIDIA L40S data sheet; memory: driver"),
        _accelerator("a10", 23028 / 1024, 0.6, 125, 31.2, "NVIDIA A10 data sheet; memory: driver"),
        _accelerator("rtx-3090", 24, 0.936, 71, 35.6, "NVIDIA GA102 white paper"),
        _accelerator("rtx-4090", 24, 1.008, 165, 82.6, "NVIDIA Ada white paper"),
        _accelerator("rtx-5090", 32, 1.792, 209, 104.8, "NVIDIA RTX Blackwell white paper"),
        _accelerator("mi300x", 192, 5.3, 1307, 163.4, "AMD Instinct MI300X data sheet"),
    )
}


def find_accelerator(text: str) -> Accelerator:
    """Returns the accelerator called ``text``, or one with the memory size that ``text`` states (``24GiB``, ``80GB``).

    Raises:
        SweepError: ``text`` is neither a known name nor a size.
    """
    name = text.strip().lower()
    if name in ACCELERATORS:
        return ACCELERATORS[name]
    try:
        size = parse_size("gpu", text)
    except SweepError:
        raise SweepError([f"{unknown('gpu', text, ACCELERATORS)} A size such as 24GiB is valid too."]) from None
    accelerator = Accelerator(name=text.strip(), memory_bytes=size)
    if accelerator.usable_bytes <= 0:
        raise SweepError(
            [f"gpu is {text!r}: it must be above {_SMALLEST_BYTES / _GIB:.2f} GiB, which CUDA itself takes."]
        )
    return accelerator
