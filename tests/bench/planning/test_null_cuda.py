"""A plan of a large model against torch's own allocator for CUDA, on a device that computes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("null_cuda_case.py")


def test_a_plan_of_llama_7b_is_within_3_percent_of_the_allocator(null_cuda: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], env=null_cuda, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "cuda_graphs" in found["fast_paths"]
    assert found["planned"] == pytest.approx(found["allocator_peak_bytes"] - found["workspace_bytes"], rel=0.03)
