"""``pytest --benchmark``: the cases of a sweep as pytest-benchmark tests.

pytest loads this module in every repository where the package is installed, so heavy imports wait for ``--benchmark``.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep

# The default sweep: every PPO method once, in seconds.
SMALL_GRID = {"models": ["tiny"], "seq_lens": [32], "batch_sizes": [2]}
DEFAULT_TIME_BUDGET_S = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--benchmark`` and its options."""
    group = parser.getgroup("rlhfbench", "benchmarks of training steps")
    group.addoption(
        "--benchmark",
        action="store_true",
        dest="rlhfbench",
        help="Measure the cases of a sweep as benchmarks. Without a path only these run; with paths, their tests too.",
    )
    group.addoption(
        "--benchmark-sweep",
        metavar="FILE",
        dest="rlhfbench_sweep",
        help="With --benchmark: the TOML file of the sweep. Default: every PPO method, tiny model, 32 tokens, batch 2.",
    )
    group.addoption(
        "--benchmark-time-budget-s",
        metavar="SECONDS",
        type=_positive_seconds,
        dest="rlhfbench_time_budget_s",
        help=f"With --benchmark: seconds for timing the steps of a case. Default: {DEFAULT_TIME_BUDGET_S}.",
    )
    group.addoption(
        "--benchmark-gate",
        metavar="REV-or-RUN",
        dest="rlhfbench_gate",
        help="With --benchmark: compare with this revision, or with the run in this folder; a regression is a failure.",
    )


def _positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0.")
    return value


def pytest_configure(config: pytest.Config) -> None:
    """Reads and checks the sweep, so that its problems are reported before anything runs."""
    if not config.getoption("rlhfbench"):
        if config.getoption("rlhfbench_gate") is not None:
            raise pytest.UsageError("--benchmark-gate needs --benchmark.")
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: install rlhfbench[pytest].")
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark measures one case at a time: pytest-xdist must be off (-n 0).")
    gate = config.getoption("rlhfbench_gate")
    if gate is not None and config.getoption("rlhfbench_time_budget_s") is not None:
        raise pytest.UsageError(
            "--benchmark-gate takes no --benchmark-time-budget-s: a gate times a case until the answer is clear."
        )
    sweep = _load_sweep(config.getoption("rlhfbench_sweep"), gate)
    from rlhfbench.pytest_plugin.benchmarks import Benchmarks  # on a system that can fork

    config.pluginmanager.register(Benchmarks(config, sweep), "rlhfbench-benchmarks")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


def _load_sweep(path: str | None, gate: str | None) -> Sweep:
    """Returns the cases: those of the stored run that a gate compares with, else of the file, else the default ones."""
    from rlhfbench.cases.preflight import check
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.errors import ForkServerError, GateError, SweepError
    from rlhfbench.launch import refuse_launcher
    from rlhfbench.runs.environment import check_system
    from rlhfbench.runs.folder import RunFolder

    is_stored = gate is not None and RunFolder(gate).is_run
    if is_stored and path is not None:
        raise pytest.UsageError("--benchmark-gate RUN takes no --benchmark-sweep: the cases are those of the run.")
    try:
        check_system()
        refuse_launcher("pytest --benchmark")
        if gate is not None and is_stored:
            from rlhfbench.gate.baseline import baseline_sweep

            sweep = baseline_sweep(Path(gate))
        else:
            sweep = Sweep.from_spec(SMALL_GRID) if path is None else Sweep.from_file(path)
        check(sweep)
    except SweepError as error:
        raise pytest.UsageError(*error.problems) from error
    except (ForkServerError, GateError) as error:
        raise pytest.UsageError(str(error)) from error
    return sweep
