"""The least work of a phase, as numbers. Importing this does not import torch: plans travel between processes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The least work of a phase.

    Attributes:
        flops: floating-point operations; a multiply-add is two.
        bytes: bytes read from and written to device memory.
        written_bytes: those of them that are written.
    """

    flops: int
    bytes: int
    written_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.written_bytes + other.written_bytes)

    def floor_s(self, flops_per_s: float, bytes_per_s: float, read_bytes_per_s: float | None = None) -> float:
        """The larger of compute time and memory time, in seconds.

        Args:
            flops_per_s: rate of matmuls.
            bytes_per_s: rate of a copy, both directions counted.
            read_bytes_per_s: rate of reading alone, for the bytes read beyond those written; that of a copy by default.

        Example:
            >>> Work(flops=100, bytes=40).floor_s(flops_per_s=10.0, bytes_per_s=10.0)
            10.0
        """
        only_read = max(self.bytes - 2 * self.written_bytes, 0)
        memory_s = (self.bytes - only_read) / bytes_per_s + only_read / (read_bytes_per_s or bytes_per_s)
        return max(self.flops / flops_per_s, memory_s)
