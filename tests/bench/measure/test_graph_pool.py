"""The memory pool of CUDA graphs, which no tensor owns, in the ledger."""

from __future__ import annotations

import pytest
import torch

from rlhfbench.measure.ledger import Ledger
from rlhfkernels.engine.fast.capture import CudaGraphs


def test_the_pool_counts_as_temporary_as_long_as_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    with Ledger("cpu") as ledger, ledger.phase("generate"):
        graphs = CudaGraphs(torch.device("cpu"), ledger, is_required=True)
        graphs._hold(1000)
        graphs._hold(24)
        graphs._hold(0)
        assert ledger.parts["temporary"] == ledger.total_bytes == 1024
        del graphs
        assert ledger.total_bytes == 0
    assert ledger.peaks["generate"].parts["temporary"] == 1024
