"""Fake cases in place of real ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhfbench.runs import runner
from rlhfbench.runs.forkserver import ForkServer

HERE = Path(__file__).parent


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
