from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_every_kernel_compiles_for_a_gpu_without_one(tmp_path: Path, capability: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("compile_kernels.py")), "bf16", capability]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 17
