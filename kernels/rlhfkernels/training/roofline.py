"""The least work of a phase, as numbers. Importing this does not import torch: plans travel between processes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The least work of a phase.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        bytes: bytes read from and written to device memory.
    """

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_s(self, flops_per_s: float, bytes_per_s: float) -> float:
        """The larger of compute time and memory time, in seconds, at these two rates."""
        return max(self.flops / flops_per_s, self.bytes / bytes_per_s)
