import pytest
import torch

from rlhfbench.measure.workspaces import blas_workspace_bytes, workspace_bytes
from rlhfkernels.engine.fast.capture import side_stream


@pytest.mark.parametrize(
    ("major", "config", "kib"),
    [
        (8, None, 8320),
        (9, None, 32768),
        (10, None, 32768),
        (9, ":4096:2:16:8", 8320),
        (8, ":16:8", 128),
        (8, ":", 8320),
    ],
)
def test_the_bytes_of_one_workspace(major, config, kib):
    assert blas_workspace_bytes(major, config) == kib * 1024


def test_a_step_has_workspaces_of_two_threads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert workspace_bytes("cuda:0") == 2 * 32 * 2**20


def test_the_stream_of_captures_has_a_workspace_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    try:
        side_stream(torch.device("cuda:0"))
        assert workspace_bytes("cuda:0") == 3 * 32 * 2**20
    finally:
        side_stream.cache_clear()
