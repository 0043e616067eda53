"""The ranks of a step, and the sums over them.

A process that is alone is a world of one: its sums are its own, and nothing is sent.
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import torch
from torch import distributed

# A collective that waits longer fails: a rank that is gone must not hold the others for ever.
TIMEOUT_S = 1800.0
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclasses.dataclass(frozen=True, slots=True)
class World:
    """The place of this process among the ranks of a step.

    Attributes:
        rank: from 0.
        size: number of ranks.
    """

    rank: int = 0
    size: int = 1

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` added up over all ranks, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of ``tensor`` over all ranks, element by element, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def all_true(self, value: bool, device: torch.device) -> bool:
        """True where ``value`` is true on every rank; ``device`` is that of the process group."""
        return bool(self.all_sum(torch.tensor(float(value), device=device)) == self.size)

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, an object that can be pickled."""
        if self.size == 1:
            return value
        found = [value]
        distributed.broadcast_object_list(found, src=0)
        return found[0]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, an object that can be pickled, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.size > 1:
            distributed.barrier()


ALONE = World()


def join_world(*, rank: int, size: int, address: str, device: str = "cpu", timeout_s: float = TIMEOUT_S) -> World:
    """Joins the process group of a step; waits for the other ranks.

    Args:
        rank: of this process.
        size: number of ranks.
        address: where rank 0 listens: ``tcp://HOST:PORT``.
        device: of this rank; gloo connects CPUs, NCCL connects CUDA devices. A CUDA device becomes the current one, on
            which torch sends the objects of ``broadcast`` and ``gather``.
        timeout_s: seconds after which a collective that waits fails.

    Raises:
        torch.distributed.DistNetworkError: the other ranks did not come, or the port is in use.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        _BACKENDS[kind],
        init_method=address,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=torch.device(device) if kind == "cuda" else None,
    )
    return World(rank, size)


def leave_world() -> None:
    """Leaves the process group, where there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
