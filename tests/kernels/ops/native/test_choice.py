from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rlhfkernels.ops import stored_seconds
from rlhfkernels.ops.native import choice
from rlhfkernels.ops.native.choice import Matmul, fastest, measure

GOOD = '{"native": 2.0, "torch": 1.0}'


class Clock:
    """A clock that only matmuls advance, each by what its next run takes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def __call__(self) -> float:
        return self.now

    def candidate(self, name: str, *seconds: float) -> Matmul:
        """A matmul whose runs take ``seconds``, the last for ever."""
        left = list(seconds)

        def run(*operands: torch.Tensor) -> None:
            self.runs.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of the choice, not there yet."""
    file = tmp_path / "matmul.json"
    monkeypatch.setattr(choice, "_path", lambda num_threads: file)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    return file


def unused(*operands: torch.Tensor) -> None:
    pytest.fail("it was measured again")


@pytest.mark.parametrize(("native_s", "expected"), [(0.01, "native"), (0.03, "torch")])
def test_the_faster_one_is_measured_once_and_remembered(path: Path, native_s: float, expected: str) -> None:
    clock = Clock()
    candidates = {"native": clock.candidate("native", native_s), "torch": clock.candidate("torch", 0.02)}
    assert fastest(candidates, 1, clock) == expected
    assert clock.runs[:4] == ["native", "torch", "native", "torch"]
    assert fastest({"native": unused, "torch": unused}, 1, clock) == expected
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".json", ".lock"]


def test_one_disturbed_run_decides_nothing() -> None:
    clock = Clock()
    seconds = measure(
        {"native": clock.candidate("native", 0.001, 9.0, 0.001), "torch": clock.candidate("torch", 0.002)}, clock
    )
    assert seconds == pytest.approx({"native": 0.003, "torch": 0.006})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"native": 1.0}',
        '{"native": "x", "torch": 1.0}',
        '{"native": 3.0, "torch": -1.0}',
        '{"native": 3.0, "torch": NaN}',
    ],
)
def test_a_damaged_file_is_measured_again_and_repaired(path: Path, text: str) -> None:
    path.write_text(text)
    clock = Clock()
    candidates = {"native": clock.candidate("native", 0.01), "torch": clock.candidate("torch", 0.02)}
    assert fastest(candidates, 1, clock) == "native"
    assert fastest({"native": unused, "torch": unused}, 1) == "native"


def test_a_second_process_waits_for_the_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    asked, flock = threading.Event(), fcntl.flock

    def noted(*arguments: Any) -> None:
        asked.set()
        flock(*arguments)

    with path.with_suffix(".lock").open("w") as lock:
        flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", noted)
        second = threading.Thread(target=lambda: found.append(fastest({"native": unused, "torch": unused}, 1)))
        second.start()
        assert asked.wait(timeout=60)  # it found no file before
        path.write_text(GOOD)
    second.join(timeout=60)
    assert found == ["torch"]


def test_what_cannot_be_remembered_is_torch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def fail(*arguments: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(stored_seconds, "_write", fail)
    candidates = {"native": clock.candidate("native", 0.01), "torch": clock.candidate("torch", 0.02)}
    assert fastest(candidates, 1, clock) == "torch"


@pytest.mark.parametrize(
    ("value", "expected"), [("native", "native"), ("torch", "torch"), ("auto", "torch"), ("", "torch")]
)
def test_the_environment_forces_one(path: Path, monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    path.write_text(GOOD)
    monkeypatch.setenv(choice.VARIABLE, value)
    assert fastest({"native": unused, "torch": unused}, 1) == expected


@pytest.mark.usefixtures("library")
def test_threads_torch_and_library_have_choices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [choice._path(1), choice._path(2)]
    monkeypatch.setattr(torch, "__version__", "0.0")
    paths.append(choice._path(1))
    library = choice.library_path()
    monkeypatch.setattr(choice, "library_path", lambda: library.with_name("other.so"))
    paths.append(choice._path(1))
    assert len(set(paths)) == 4
    assert {path.parent for path in paths} == {library.parent}


def test_a_plan_measures_real_tensors(path: Path) -> None:
    kinds: list[type] = []

    def candidate(seconds: float) -> Callable[..., None]:
        inner = clock.candidate("", seconds)

        def run(*operands: torch.Tensor) -> None:
            kinds.extend(map(type, operands))
            inner(*operands)

        return run

    clock = Clock()
    with FakeTensorMode():
        fastest({"native": candidate(1.0), "torch": candidate(2.0)}, 1, clock)
        assert isinstance(torch.empty(1), FakeTensor)
    assert set(kinds) == {torch.Tensor}
