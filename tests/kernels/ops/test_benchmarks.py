from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
BENCHMARKS = ROOT / "benchmarks" / "kernels" / "ops"
# Sizes by directions, and by the op and its reference.
NUM_WITH_GRADIENT, NUM_WITHOUT = 2 * 2 * 2, 2 * 2


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout


def test_every_op_has_its_benchmark() -> None:
    files = (ROOT / "kernels" / "rlhfkernels" / "ops").glob("*.py")
    ops = {path.stem for path in files if "_reference(" in path.read_text()}
    assert {path.stem.removeprefix("test_") for path in BENCHMARKS.glob("test_*.py")} == ops


def timed_tables(forms: str) -> tuple[str, list[str]]:
    """What pytest says of the benchmarks of one size in these forms, and the heads of its tables."""
    arguments = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    out = run_pytest("benchmarks", "--benchmark", "-k", f"test_ and tiny and {forms}", *arguments)
    return out, [line for line in out.splitlines() if "- benchmark '" in line]


def test_every_benchmark_stands_beside_its_reference_in_the_table() -> None:
    out, tables = timed_tables("not liger and not native")
    num_tables = (NUM_WITH_GRADIENT * 6 + NUM_WITHOUT * 5) // 4
    assert f"\n{2 * num_tables} passed" in out, out
    assert len([line for line in tables if ": 2 tests" in line]) == num_tables


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmarks take the GPU, and C is a processor's")
def test_what_has_a_form_in_c_has_it_in_the_table() -> None:
    out, tables = timed_tables("native")
    passes = ("causal_attention", "logprobs", "lora_linear", "rms_norm", "rotary", "swiglu")
    expected = {f"{op} {direction}" for op in passes for direction in ("forward", "forward+backward")}
    ops = ("decode_attention", "product", "rms_norm_of_few_rows", "skinny_linear", "swiglu_of_few_rows")
    expected |= {f"{op} forward" for op in ops}
    assert f"\n{len(expected)} passed" in out, out
    heads = [line.split("'")[1].split() for line in tables]
    assert {f"{words[0]} {words[-1]}" for words in heads} == expected


def test_only_where_they_are_asked_for_is_anything_timed() -> None:
    out = run_pytest("benchmarks/kernels/ops/test_product.py", "-rs")
    assert f"{NUM_WITHOUT} skipped" in out, out
    assert "add --benchmark" in out
