"""Parts of the evidence on fake CUDA tensors: whatever needs no value and no second process runs to its end."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhfkernels.ops.table import OPS

PROGRAM = Path(__file__).with_name("fake_cuda_parts.py")
STEPS = Path(__file__).parents[2] / "kernels" / "training" / "fake_cuda"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def found(fake_cuda: Path, folder: Path) -> dict[str, Any]:
    """The findings of each part, or the sentence of its error."""
    command = [sys.executable, str(PROGRAM), str(fake_cuda), str(STEPS), str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts: dict[str, Any] = json.loads(done.stdout)
    assert not [part for part in parts.values() if isinstance(part, str)], done.stderr
    return parts


def test_every_op_is_compared_and_timed(found: dict[str, Any]) -> None:
    assert found["ops"].keys() == OPS.keys()
    for op in found["ops"].values():
        assert op["implementations"].keys() >= {"ours", "torch", "reference"}
        assert all("failed" not in each and each["s"] > 0 for each in op["implementations"].values())


def test_decoding_is_timed_with_graphs_and_without(found: dict[str, Any]) -> None:
    items = {key: item for key, item in found["decode"].items() if key != "ceilings"}
    assert list(items) == ["batch 2, with graphs", "batch 2, without graphs"]
    assert all("failed" not in item and item["floor_s"] > 0 for item in items.values())


def test_a_case_is_measured_with_the_views_of_a_device(found: dict[str, Any]) -> None:
    memory, views = found["measurements"]["memory"], found["measurements"]["memory"]["views"]
    assert (views["allocator_peak_bytes"], views["allocator_reserved_bytes"]) == (1000, 2000)
    assert views["workspace_bytes"] == 0
    assert views["driver_peak_bytes"] is None  # the harness samples it from outside
    assert views["allocator_rest_bytes"] == 1000 - memory["total_bytes"] - views["workspace_bytes"]
    assert memory["parts"]["base"] > 0
    assert found["measurements"]["block"]["interference"]["gpu_processes"] is None  # no NVML here


def test_a_step_is_watched_and_waits_for_nothing(found: dict[str, Any], folder: Path) -> None:
    assert found["snapshot"] == {"num_waits": 0, "waits": [], "allocator_peak_bytes": 1000}
    assert pickle.loads((folder / "snapshot" / "snapshot.pickle").read_bytes())["segments"] == []
