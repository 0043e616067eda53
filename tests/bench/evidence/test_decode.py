from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.errors import EvidenceError
from rlhfbench.evidence import decode
from rlhfbench.evidence.request import MINIATURE, Request
from rlhfkernels.errors import CaseError


def keys(device: str, folder: Path) -> list[tuple[str, str | None]]:
    """(key, failure) of the kept items of two batches."""
    sizes = dataclasses.replace(MINIATURE, decode_batches=(1, 16))
    decode.run_decode(Request(model="tiny", device=device, sizes=sizes), folder, 60.0)
    found = json.loads((folder / "decode.json").read_text())
    assert found.pop("ceilings") == {"x": 1.0}
    assert all(key == f"batch {item['batch_size']}, {item['by']}" for key, item in found.items())
    return [(key, item.get("failed")) for key, item in found.items()]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The values asked of ``engine.cuda_graphs``; captures fail at batch 16."""
    asked: list[str] = []

    def measure(request: Request, batch_size: int, cuda_graphs: str, ceilings: dict[str, float]) -> dict[str, Any]:
        asked.append(cuda_graphs)
        if cuda_graphs == "on" and batch_size == 16:
            raise RuntimeError("operation not permitted when stream is capturing\nlong advice")
        return {"floor_fraction": 0.5}

    monkeypatch.setattr(decode, "measure_ceilings", lambda device, dtype: {"x": 1.0})
    monkeypatch.setattr(decode, "_measure", measure)
    return asked


def test_a_gpu_decodes_with_graphs_and_without_and_one_that_fails_hides_no_other(
    asked: list[str], tmp_path: Path
) -> None:
    failure = "RuntimeError: operation not permitted when stream is capturing"
    assert keys("cuda", tmp_path) == [
        ("batch 1, with graphs", None),
        ("batch 1, without graphs", None),
        ("batch 16, with graphs", failure),
        ("batch 16, without graphs", None),
    ]
    assert asked == ["on", "off", "on", "off"]


def test_a_model_without_graphs_is_decoded_without(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(request: Request, batch_size: int, cuda_graphs: str, ceilings: dict[str, float]) -> dict[str, Any]:
        if cuda_graphs == "on":
            raise CaseError(["the plain trunk has no graphs."])
        return {"floor_fraction": 0.5}

    monkeypatch.setattr(decode, "_measure", measure)
    failure = "CaseError: the plain trunk has no graphs."
    assert keys("cuda", tmp_path) == [
        ("batch 1, with graphs", failure),
        ("batch 1, without graphs", None),
        ("batch 16, with graphs", failure),
        ("batch 16, without graphs", None),
    ]


def test_a_part_without_any_batch_has_failed_and_is_tried_again(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> dict[str, Any]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_measure", fail)
        with pytest.raises(EvidenceError, match=r"^no batch could be decoded: RuntimeError: CUDA error: unspecified"):
            keys("cpu", tmp_path)
    assert keys("cpu", tmp_path) == [("batch 1, without graphs", None), ("batch 16, without graphs", None)]


def test_a_cpu_has_no_graphs(asked: list[str], tmp_path: Path) -> None:
    assert keys("cpu", tmp_path) == [("batch 1, without graphs", None), ("batch 16, without graphs", None)]
