"""The memory pool of CUDA graphs, which no tensor owns, in the ledger."""

from __future__ import annotations

import pytest
import torch

from rlhfbench.measure.ledger import Ledger
from rlhfkernels.engine.fast.capture import GraphPool


class _Graph:
    def capture_begin(self, **options: object) -> None: ...

    def capture_end(self) -> None: ...

    def replay(self) -> None: ...


def test_the_pool_counts_as_temporary_in_every_ledger_that_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = iter((0, 1000, 1000, 1024, 1024, 1024))  # before and after each capture
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    pool = GraphPool(torch.device("cpu"))
    for expected in (1000, 1024):
        with Ledger("cpu") as ledger, ledger.phase("generate"):
            pool.capture(lambda: None)
            ledger.tag("temporary", pool.held)
            ledger.tag("temporary", pool.held)
            assert ledger.parts["temporary"] == ledger.total_bytes == expected
        assert ledger.peaks["generate"].parts["temporary"] == expected
    pool.capture(lambda: None)
    assert sum(tensor.numel() for tensor in pool.held) == 1024
