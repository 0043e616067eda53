"""Faults put into a step on purpose."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from rlhfbench.measure import injection
from rlhfbench.measure.injection import InjectedStep
from rlhfbench.measure.ledger import Ledger
from rlhfkernels.observer import Observer


class _Time:
    """A clock that a millisecond passes on at each look."""

    now_s = 0.0

    def perf_counter(self) -> float:
        self.now_s += 1e-3
        return self.now_s


class _Clock(Observer):
    """Notes when each phase began and ended."""

    def __init__(self, time: _Time) -> None:
        self._time = time
        self.stretches: list[tuple[str, float]] = []
        self._began_s = 0.0

    def enter_phase(self, name: str) -> None:
        self._began_s = self._time.now_s

    def exit_phase(self, name: str) -> None:
        self.stretches.append((name, self._time.now_s - self._began_s))


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> _Time:
    made = _Time()
    monkeypatch.setattr(injection, "time", made)
    return made


def step(time: _Time) -> Any:
    """A step of two phases of a second each."""

    def run(observer: Observer) -> str:
        for name in ("generate", "update"):
            with observer.phase(name):
                time.now_s += 1.0
        return "stats"

    return types.SimpleNamespace(run=run, phases=("generate", "update"))


def test_a_phase_is_slower_from_the_second_step_on_and_the_other_is_not(time: _Time) -> None:
    slower = InjectedStep(step(time), "cpu", phase="generate", share=0.5)
    clock = _Clock(time)
    assert [slower.run(clock) for _ in range(3)] == ["stats"] * 3
    generated = [seconds for name, seconds in clock.stretches if name == "generate"]
    assert generated == pytest.approx([1.0, 1.5, 1.5], abs=5e-3)
    assert [seconds for name, seconds in clock.stretches if name == "update"] == pytest.approx([1.0] * 3)


def test_without_a_phase_nothing_is_slower(time: _Time) -> None:
    same = InjectedStep(step(time), "cpu")
    clock = _Clock(time)
    for _ in range(2):
        same.run(clock)
    assert [seconds for _, seconds in clock.stretches] == pytest.approx([1.0] * 4)
    assert same.phases == ("generate", "update")


def test_a_tensor_is_held_over_the_step_and_no_longer() -> None:
    def run(observer: Observer) -> None:
        with observer.phase("update"):
            torch.ones(10).sum()

    peaks = []
    for held_bytes in (0, 64 * 1024):
        with Ledger("cpu") as ledger:
            InjectedStep(types.SimpleNamespace(run=run), "cpu", held_bytes=held_bytes).run(ledger)
            peaks.append(ledger.peaks["update"].total_bytes)
            assert ledger.total_bytes == 0
    assert peaks[1] - peaks[0] == 64 * 1024
