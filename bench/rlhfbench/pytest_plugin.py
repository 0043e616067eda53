"""``pytest --benchmark``: the cases of a sweep as pytest-benchmark tests, timed by the step's own clock.

pytest loads this in every repository where the package is installed, so it imports nothing until ``--benchmark`` asks.
A case is measured as ``rlhfbench run`` measures it, in a forked worker. The seconds of each of its steps are then
played back to pytest-benchmark through a clock that only they move, so that its statistics are exactly the step's.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfkernels.config.case import Case

# What is measured where no sweep is given: every method once, in seconds.
SMALL_GRID = {"models": ["tiny"], "seq_lens": [32], "batch_sizes": [2]}
NODE_NAME = "rlhfbench"
DEFAULT_TIME_BUDGET_S = 2.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--benchmark`` and what belongs to it."""
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
        help="With --benchmark: the TOML file of the sweep. Default: every method, tiny model, 32 tokens, batch 2.",
    )
    group.addoption(
        "--benchmark-time-budget-s",
        metavar="SECONDS",
        type=_positive_seconds,
        default=DEFAULT_TIME_BUDGET_S,
        dest="rlhfbench_time_budget_s",
        help="With --benchmark: the most seconds for timing the steps of a case. Default: %(default)s.",
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
    """Reads the sweep, so that what is wrong with it is said before anything runs."""
    if not config.getoption("rlhfbench"):
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: install rlhfbench[pytest].")
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        raise pytest.UsageError("--benchmark measures one case at a time: pytest-xdist must be off (-n 0).")
    config.pluginmanager.register(_Benchmarks(config), "rlhfbench-benchmarks")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


class _Benchmarks:
    """The part of the plugin that is there only with ``--benchmark``."""

    def __init__(self, config: pytest.Config) -> None:
        self._sweep = _load_sweep(config.getoption("rlhfbench_sweep"))
        self._measurer = Measurer(self._sweep, config.getoption("rlhfbench_time_budget_s"))

    # First, so that selecting, reordering and counting see these tests as any other.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Adds one test per case to what was collected."""
        # The path exists nowhere: it makes node ids that are the same on every machine, so that saved runs compare.
        module = _SweepModule.from_parent(session, path=session.config.rootpath / NODE_NAME)
        module.obj = sys.modules[__name__]
        module.cases, module.measurer = self._sweep.cases, self._measurer
        items.extend(session.genitems(module))

    def pytest_unconfigure(self) -> None:
        """Ends the process that cases are forked from."""
        self._measurer.close()


def _load_sweep(path: str | None) -> Sweep:
    from rlhfbench.cases.preflight import check
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.errors import SweepError

    try:
        sweep = Sweep.from_spec(SMALL_GRID) if path is None else Sweep.from_file(path)
        check(sweep)
    except SweepError as error:
        raise pytest.UsageError(*error.problems) from error
    return sweep


class Measurer:
    """Measures cases as a run does, each in a process of its own; what they are forked from starts with the first."""

    def __init__(self, sweep: Sweep, time_budget_s: float) -> None:
        self._sweep, self._time_budget_s = sweep, time_budget_s
        self._opened = ExitStack()
        self._run: Callable[[Case], dict[str, Any]] | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """The record of ``case``.

        Raises:
            RlhfBenchError: the process that cases are forked from does not start, or the disk is full.
        """
        if self._run is None:
            self._run = self._open()
        return self._run(case)

    def _open(self) -> Callable[[Case], dict[str, Any]]:
        from rlhfbench.records.file import RecordsFile
        from rlhfbench.runs.folder import RunFolder
        from rlhfbench.runs.forkserver import ForkServer
        from rlhfbench.runs.options import RunOptions
        from rlhfbench.runs.runner import Runner

        folder = RunFolder(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="rlhfbench-")))
        folder.prepare(self._sweep, resume=False)
        records = self._opened.enter_context(RecordsFile(folder.path))
        server = self._opened.enter_context(ForkServer())
        runner = Runner(folder, RunOptions(time_budget_s=self._time_budget_s), records, server, _Silent())

        def run(case: Case) -> dict[str, Any]:
            runner.run([case])
            return records.records[-1]

        return run

    def close(self) -> None:
        """Ends the fork server and removes what it wrote."""
        self._opened.close()


class _Silent:
    """A run's progress that says nothing: pytest shows how it goes."""

    def _ignore(self, *args: object, **kwargs: object) -> None: ...

    begin = start_case = doing = finish_case = notice = end = _ignore


class _SweepModule(pytest.Module):
    """The node above the tests of a sweep. A module, as fixtures of module scope need one."""

    cases: Sequence[Case]
    measurer: Measurer

    def collect(self) -> Iterator[pytest.Item]:
        """One test per case, in the sweep's order."""
        for case in self.cases:
            clock = StepClock()
            item = _CaseTest.from_parent(self, name=case_name(case), callobj=_make_test(case, clock, self.measurer))
            item.add_marker(pytest.mark.benchmark(timer=clock.step_seconds, group=group_name(case)))
            # A case that failed has nothing to play back; its failure says so.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))
            yield item


class _CaseTest(pytest.Function):
    """The test of one case."""

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where the test stands: nowhere on this machine's disk."""
        return self.path, 0, self.name


class StepClock:
    """A clock that stands still until it is told how long a step took.

    pytest-benchmark reads it before and after a call of ``step``; it starts each round at 0, so that the difference is
    the step's seconds to the last bit.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._samples_s: Iterator[float] = iter(())

    def load(self, samples_s: Sequence[float]) -> None:
        """What the next calls of ``step`` take."""
        self._samples_s = iter(samples_s)

    def step_seconds(self) -> float:
        """Seconds since the round began."""
        return self._now_s

    def rewind(self) -> None:
        """Begins a round."""
        self._now_s = 0.0

    def step(self) -> None:
        """Takes the next sample's seconds; none at all after the last."""
        self._now_s += next(self._samples_s, 0.0)


def _make_test(case: Case, clock: StepClock, measurer: Measurer) -> Callable[[Any], None]:
    from rlhfbench.errors import RlhfBenchError

    def test_step(benchmark: Any) -> None:
        if benchmark.disabled:
            pytest.skip("--benchmark-disable is set: add --benchmark-enable to measure.")
        try:
            record = measurer.measure(case)
        except RlhfBenchError as error:
            pytest.fail(str(error), pytrace=False)
        benchmark.extra_info.update(extra_info(record))
        _raise_unless_ok(record)
        samples_s = step_samples_s(record)
        clock.load(samples_s)
        benchmark.pedantic(clock.step, setup=clock.rewind, rounds=len(samples_s), iterations=1, warmup_rounds=0)

    return test_step


def _raise_unless_ok(record: dict[str, Any]) -> None:
    """A case that does not fit the machine is a skipped test, any other that gave no numbers a failed one."""
    outcome = record["outcome"]
    if outcome == "ok":
        return
    error = record["error"] or {}
    where = f" in {error['phase']}" if error.get("phase") else ""
    sentence = f"{outcome}{where}: {error.get('message') or 'it said nothing.'}"
    if outcome in ("oom", "skipped"):
        pytest.skip(sentence)
    pytest.fail(sentence, pytrace=False)


def step_samples_s(record: dict[str, Any]) -> list[float]:
    """Seconds of each timed step of a record: the sum of its phases."""
    phases = record["latency"]["phases"].values()
    return [math.fsum(step) for step in zip(*(phase["samples_s"] for phase in phases), strict=True)]


def extra_info(record: dict[str, Any]) -> dict[str, Any]:
    """What stands beside the times in pytest-benchmark's JSON: the record's case, outcome, memory and latencies."""
    latency = dict(record["latency"] or {})
    phases = latency.pop("phases", None) or {}
    latency["phases"] = {name: {"median_s": phase["median_s"]} for name, phase in phases.items()}
    return {
        "case_id": record["case"]["id"],
        "case": record["case"],
        "outcome": record["outcome"],
        "memory": record["memory"],
        "latency": latency,
    }


def case_name(case: Case) -> str:
    """The test's name: ``hydra[tiny-16+16-batch2-cpu-float32]``, and the case's id where that does not say it all."""
    from rlhfkernels.config.case import Case

    model = Path(case.model).name
    size = f"{case.prompt_len}+{case.completion_len}-batch{case.batch_size}"
    plain = Case(
        method=case.method,
        model=model,
        prompt_len=case.prompt_len,
        completion_len=case.completion_len,
        batch_size=case.batch_size,
        device=case.device,
        dtype=case.dtype,
    )
    words = [model, size, case.device.replace(":", ""), case.dtype, *([] if plain.id == case.id else [case.id])]
    return f"{case.method}[{'-'.join(words)}]"


def group_name(case: Case) -> str:
    """The group in which pytest-benchmark compares a case: the methods at one size on one device."""
    where = f"{Path(case.model).name} {case.device} {case.dtype}"
    return f"{where}: {case.seq_len} tokens, batch {case.batch_size}"
