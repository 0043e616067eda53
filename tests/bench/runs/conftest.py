"""Runs of fake cases."""

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.runs.forkserver import PRELOAD, ForkServer
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


@pytest.fixture(scope="module")
def make_rank_server():
    """Makes fork servers of real cases, whose import path has ``rank_steps``."""
    here = str(Path(__file__).parents[1])
    with contextlib.ExitStack() as opened:
        yield lambda: opened.enter_context(ForkServer(preload=(*PRELOAD, "rank_steps"), paths=(here,)))


@pytest.fixture(scope="module")
def rank_server(make_rank_server):
    """A fork server of real cases."""
    return make_rank_server()


@pytest.fixture
def rank_request():
    """The request of a case of two ranks whose step is one of ``rank_steps``."""

    def make(kind, **settings):
        options = {"parallel.strategy": "ddp", "parallel.world_size": 2, "data.prompt_field": kind}
        sizes = {"prompt_len": 4, "completion_len": 4, "batch_size": 1}
        return {
            "case": Case(method="dpo", model="tiny", **sizes, options=Options.of(options)).to_dict(),
            "memory_limit_bytes": None,
            "settings": {"time_budget_s": 0.2, "num_blocks": 1, "step": "rank_steps:make", **settings},
        }

    return make
