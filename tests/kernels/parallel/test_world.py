from __future__ import annotations

import pytest
import torch
from torch import distributed

from rlhfkernels.parallel.world import join_world


def test_a_rank_on_cuda_joins_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's collectives of objects take the current device: that of another rank would be taken twice."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(
        distributed, "init_process_group", lambda backend, **options: calls.append((backend, options["device_id"]))
    )
    join_world(rank=1, size=2, address="tcp://localhost:1", device="cuda:1")
    join_world(rank=1, size=2, address="tcp://localhost:1")
    assert calls == ["cuda:1", ("nccl", torch.device("cuda:1")), ("gloo", None)]
