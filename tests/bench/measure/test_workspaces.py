from __future__ import annotations

import pytest
import torch

from rlhfbench.measure.workspaces import workspace_bytes


def test_workspaces_are_what_freeing_them_frees(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = {"cuda:0": 100, "cuda:1": 50}

    def clear() -> None:
        allocated["cuda:1"] = 18

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated.get)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    assert workspace_bytes("cuda:1") == 32
    assert workspace_bytes("cuda:0") == 0
