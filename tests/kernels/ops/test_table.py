from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhfkernels.ops.native.program import Program
from rlhfkernels.ops.table import OPS

ROOT = Path(__file__).parents[3]
OPS_FOLDER = ROOT / "kernels" / "rlhfkernels" / "ops"
BENCHMARKS = ROOT / "benchmarks" / "kernels" / "ops"
# Infrastructure of a backend, in the folder of its ops.
NOT_OPS = {"__init__", "build", "choice", "launch", "program", "structures"}


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_a_reference_a_test_and_a_benchmark_of_its_name(name: str) -> None:
    op = OPS[name]
    assert op.reference.__module__ == op.function.__module__ == f"rlhfkernels.ops.{name}"
    assert op.reference.__name__ == f"{name}_reference"
    assert op.function.__name__.removesuffix("_") == name
    options = ("backend", "chunk", "entropy", "grad_dtype", "reread")
    assert set(inspect.signature(op.function).parameters) - set(options) == set(
        inspect.signature(op.reference).parameters
    )
    assert Path(__file__).with_name(f"test_{name}.py").exists()
    assert (BENCHMARKS / f"test_{name}.py").exists()


def test_the_table_lists_every_reference_and_benchmark() -> None:
    assert {path.stem for path in OPS_FOLDER.glob("*.py") if "_reference(" in path.read_text()} == set(OPS)
    assert {path.stem.removeprefix("test_") for path in BENCHMARKS.glob("test_*.py")} == set(OPS)


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_the_backends_of_an_op_exist(backend: str) -> None:
    files = {path.stem for path in (OPS_FOLDER / backend).glob("*.py")} - NOT_OPS
    methods = set(vars(Program)) & set(OPS) if backend == "native" else set()
    runs_matmul = {"lora_linear"} if backend == "native" else set()
    assert {name for name, op in OPS.items() if backend in op.backends} == files | methods | runs_matmul
    assert all("torch" in op.backends for op in OPS.values())


def run_pytest(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks leave out the native backend")
def test_benchmarks_time_every_op_on_every_backend_of_this_machine(pytestconfig: pytest.Config) -> None:
    pytestconfig.getoption("--benchmark", skip=True)  # of the installed package's plugin
    arguments = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    out = run_pytest("benchmarks", "--benchmark", "-k", "test_ and tiny", "--benchmark-columns=min", *arguments)
    assert " passed" in out, out
    assert "failed" not in out, out
    timed: dict[str, set[str]] = {name: set() for name in OPS}
    for benchmark, implementation in re.findall(r"^test_(\w+)\[(\w+)-tiny", out, re.MULTILINE):
        timed[next(name for name in OPS if benchmark.startswith(name))].add(implementation)
    for name, op in OPS.items():
        assert timed[name] == {"reference", *op.backends} - {"triton"}, name


def test_benchmarks_are_skipped_without_their_option() -> None:
    out = run_pytest("benchmarks/kernels/ops/test_matmul.py", "-rs")
    assert "skipped" in out
    assert "passed" not in out
    assert "add --benchmark" in out
