"""Runs of fake cases."""

import dataclasses
import io

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import LineProgress
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


class Watching(LineProgress):
    """Keeps the stages of the cases; raises KeyboardInterrupt at one."""

    def __init__(self, interrupt_at=None):
        super().__init__(io.StringIO())
        self.told = []
        self.interrupt_at = interrupt_at

    def doing(self, what):
        self.told.append(what)
        if self.interrupt_at is not None and what.startswith(self.interrupt_at):
            raise KeyboardInterrupt

    @property
    def text(self):
        return self._stream.getvalue()


@pytest.fixture
def watching():
    """Progress that keeps the stages of the cases, as a class."""
    return Watching


@pytest.fixture
def sweep_of():
    """Makes a sweep of one fake case of each kind; the kind is its ``data.prompt_field``."""

    def sweep_of(*kinds, **changes):
        base = dataclasses.replace(CASE, **changes)
        return Sweep(
            cases=tuple(dataclasses.replace(base, options=Options.of({"data.prompt_field": kind})) for kind in kinds)
        )

    return sweep_of


@pytest.fixture
def run():
    """Runs a sweep with options of ``RunOptions``."""

    def run(sweep, out, progress=None, *, resume=False, retry=(), **options):
        options = RunOptions(**options)
        return run_sweep(sweep, out, options, resume=resume, retry=retry, progress=progress or Watching())

    return run
