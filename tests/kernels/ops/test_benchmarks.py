from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks" / "kernels" / "ops"
# Sizes by directions, and by the op and its reference.
NUM_WITH_GRADIENT, NUM_WITHOUT = 2 * 2 * 2, 2 * 2


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout


def test_every_op_has_its_benchmark() -> None:
    files = {path.stem for path in (ROOT / "kernels" / "rlhfkernels" / "ops").glob("*.py")}
    ops = files - {"__init__", "forms", "heads"}
    assert {path.stem.removeprefix("test_") for path in BENCHMARKS.glob("test_*.py")} == ops


def test_every_benchmark_stands_beside_its_reference_in_the_table() -> None:
    arguments = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    out = run_pytest("benchmarks", "--benchmark", "-k", "test_ and tiny and not liger", *arguments)
    num_tables = (NUM_WITH_GRADIENT * 6 + NUM_WITHOUT * 4) // 4
    assert f"\n{2 * num_tables} passed" in out, out
    assert len([line for line in out.splitlines() if line.startswith("---") and ": 2 tests" in line]) == num_tables


def test_only_where_they_are_asked_for_is_anything_timed() -> None:
    out = run_pytest("benchmarks/kernels/ops/test_wide_product.py", "-rs")
    assert f"{NUM_WITHOUT} skipped" in out, out
    assert "add --benchmark" in out
