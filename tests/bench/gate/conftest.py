"""Comparisons of fake cases."""

from __future__ import annotations

import dataclasses

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.gate import compare
from rlhfbench.gate.compare import Comparison, GateOptions
from rlhfbench.gate.decide import MIN_PAIRS
from rlhfbench.gate.sides import Side
from rlhfbench.measure import turns
from rlhfbench.runs.forkserver import ForkServer
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)
NUM_ROUNDS = 20
BASE, HEAD = Side(name="base", title="abc"), Side(name="head", title="the working tree")


@pytest.fixture
def servers(monkeypatch, fake_server):
    """Sides fork fake cases, whose steps take no time: few rounds are as good as many."""
    monkeypatch.setattr(turns, "_MAX_ROUNDS", NUM_ROUNDS)
    monkeypatch.setattr(
        compare, "ForkServer", lambda paths, optional: ForkServer(target="fake_case:run_case", preload=())
    )


@pytest.fixture
def sweep_of():
    """Returns a function that makes a sweep of fake cases of these kinds."""

    def sweep_of(*kinds):
        options = [Options.of({"data.prompt_field": kind}) for kind in kinds]
        return Sweep(cases=tuple(dataclasses.replace(CASE, options=option) for option in options))

    return sweep_of


@pytest.fixture
def compared(servers, sweep_of):
    """Returns a function that compares fake cases of these kinds: the findings, and the lines that it tells."""

    def compared(folder, *kinds, injected=None, **options):
        lines = []
        comparison = Comparison(BASE, HEAD, sweep_of(*kinds), folder / "out", GateOptions(**options), lines.append)
        return comparison.run(None if injected is None else lambda case: injected), lines

    return compared


@pytest.fixture
def verdicts():
    """Returns a function from findings to their verdicts by quantity."""
    return lambda findings: {found.quantity: found.verdict for found in findings}


@pytest.fixture
def record_of():
    """Returns a function that makes a record of two phases whose blocks after the first have these steps."""

    def record_of(generate_s, score_s, *, num_blocks=MIN_PAIRS, **more):
        block = {"phases": {"generate": generate_s, "score": score_s}, "in_turns": True, "error": None}
        kinds = {"generate": {"kind": "inference"}, "score": {"kind": "inference"}}
        blocks = [block] * (num_blocks + 1)
        latency = {"phases": kinds, "blocks": blocks, "total_block_s_per_sample": [1.0] * len(blocks)}
        return {"case": {"batch_size": 1}, "outcome": "ok", "error": None, "latency": latency, "num_threads": 1, **more}

    return record_of
