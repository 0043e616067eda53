"""The command in an empty folder, with fake cases."""

import sys

import pytest

import rlhfbench.runs.drawing
from rlhfbench.cli import main as cli


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path, fake_case_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch, fake_server):
    """Has ``run`` run fake cases and draw a table of one line."""
    monkeypatch.setattr(rlhfbench.runs.drawing, "draw_run", lambda run_dir, **_: f"table of {run_dir}")


@pytest.fixture
def call(capsys, monkeypatch):
    """Calls the command; returns (exit code, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlhfbench", *arguments])
        code = cli.invoke(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
