"""A run on a CUDA device that computes nothing: its processes, limits and views of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench.records.file import Record, read_records

GIB = 2**30
COMMAND = [sys.executable, "-m", "rlhfbench", "run", "--device", "cuda", "--model", "tiny", "--time-budget-s", "0.05"]
CASES = ["--methods", "hydra,best-of-n", "--seq-lens", "16", "--batch-sizes", "2,100000", "--blocks", "1"]


@pytest.fixture(scope="module")
def records(null_cuda: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--memory-limit", "1GiB", "--profile", "--option", "engine.cuda_graphs=on", "--out", str(out)]
    done = subprocess.run([*COMMAND, *CASES, *options], env=null_cuda, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (out / "traces").glob("*/snapshot.pickle")) == ["snapshot.pickle"] * 2
    return read_records(Path(out))


def test_the_limit_of_a_device_without_an_index_is_kept(records: list[Record]) -> None:
    found = [(r["case"]["method"], r["case"]["batch_size"], r["outcome"]) for r in records]
    cases = [(method, batch_size) for batch_size in (2, 100_000) for method in ("hydra", "best-of-n")]
    assert found == [(*case, "ok" if case[1] == 2 else "oom") for case in cases]


def test_the_views_agree(records: list[Record]) -> None:
    for views in (record["memory"]["views"] for record in records if record["outcome"] == "ok"):
        # The pool of graphs counts as reserved in the ledger: at most a segment of 2 MiB is not handed out.
        assert -(2**21) <= views["allocator_rest_bytes"] < 2**20
        # The context, of 500 MiB there, and no buffer of the ceilings.
        assert (
            views["allocator_reserved_bytes"]
            < views["driver_peak_bytes"]
            < 0.5 * GIB + views["allocator_reserved_bytes"]
        )
