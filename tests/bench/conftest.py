"""Fake cases in place of real ones."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfbench.runs import runner
from rlhfbench.runs.forkserver import ForkServer

HERE = Path(__file__).parent
_LONGEST_S = 30.0  # that a process may take to end


@pytest.fixture(scope="session")
def is_gone() -> Callable[[int], bool]:
    """Waits, without polling, until a process has ended; one that nobody waits for has too."""

    def is_gone(pid: int) -> bool:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([fd], [], [], _LONGEST_S)[0])
        finally:
            os.close(fd)

    return is_gone


@pytest.fixture
def fake_case_path(monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts ``fake_case`` on the import path of every process that the test starts; returns that path."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    return path


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch, fake_case_path: str) -> None:
    """Has runs fork fake cases."""
    monkeypatch.setattr(runner, "make_server", lambda models: ForkServer(target="fake_case:run_case", preload=()))
