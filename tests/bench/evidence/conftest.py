"""A whole evidence run at the smallest sizes, whose first part fails, without the libraries that only drawing needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.evidence.collect import collect
from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import Request, Sizes

# Its first part fails: no such model exists.
SMALLEST = Sizes(
    prompt_len=4,
    completion_len=4,
    seq_lens=(8,),
    rank=2,
    dtype="float32",
    verify_model="/no/such-model",  # a name of the Hub would be looked up, for 25 s where there is no network
    op_rows=16,
    decode_batches=(1, 2),
    profile_len=4,
    batch_size=2,
    time_budget_s=0.05,
    blocks=2,
)
DRAWING = ("pandas", "matplotlib", "tabulate", "altair", "vl_convert", "itables")
_BLOCKER = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {DRAWING} else find(name, *rest)
"""


@pytest.fixture(scope="module")
def without_drawing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every Python process that is started lacks what only drawing needs."""
    with _blocked(tmp_path_factory.mktemp("blocker")):
        yield


@contextmanager
def _blocked(folder: Path) -> Iterator[None]:
    (folder / "sitecustomize.py").write_text(_BLOCKER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *_source_roots()]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def _source_roots() -> list[str]:
    root = Path(__file__).parents[3]
    return [str(root / name) for name in ("bench", "kernels", "reports")]


@pytest.fixture(scope="session")
def request_of_all() -> Request:
    """The request of ``evidence``."""
    return Request(model="tiny", device="cpu", sizes=SMALLEST)


@pytest.fixture(scope="session")
def evidence(request_of_all: Request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run of all parts without the libraries of drawing, and its outcomes."""
    folder = tmp_path_factory.mktemp("evidence") / "all"
    with _blocked(tmp_path_factory.mktemp("blocker")):
        return folder, collect(folder, request_of_all, PARTS, 600.0)
