"""``pytest --benchmark``: the cases of a sweep as pytest-benchmark tests.

pytest loads this module in every repository where the package is installed, so heavy imports wait for ``--benchmark``.
A case is measured as ``rlhfbench run`` measures it, in a forked process. The seconds of each timed step are then
replayed to pytest-benchmark through a timer, so that its statistics are exactly those of the steps.
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
    from rlhfbench.gate.findings import Finding
    from rlhfkernels.config.case import Case

# The default sweep: every PPO method once, in seconds.
SMALL_GRID = {"models": ["tiny"], "seq_lens": [32], "batch_sizes": [2]}
NODE_NAME = "rlhfbench"
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
        default=DEFAULT_TIME_BUDGET_S,
        dest="rlhfbench_time_budget_s",
        help="With --benchmark: seconds for timing the steps of a case. Default: %(default)s.",
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
    config.pluginmanager.register(_Benchmarks(config), "rlhfbench-benchmarks")
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []


class _Benchmarks:
    """Hooks that are registered only with ``--benchmark``."""

    def __init__(self, config: pytest.Config) -> None:
        self._sweep = _load_sweep(config.getoption("rlhfbench_sweep"))
        self._measurer = Measurer(self._sweep, config.getoption("rlhfbench_time_budget_s"))
        base = config.getoption("rlhfbench_gate")
        self._gate = None if base is None else Gate(base, self._sweep)

    # First, so that -k, reordering and counting apply to these tests too.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Adds one test per case to the collected ones."""
        # A path that does not exist gives the same node ids on every machine, so that saved runs can be compared.
        module = _SweepModule.from_parent(session, path=session.config.rootpath / NODE_NAME)
        module.obj = sys.modules[__name__]
        module.cases, module.measurer, module.gate = self._sweep.cases, self._measurer, self._gate
        items.extend(session.genitems(module))

    def pytest_unconfigure(self) -> None:
        """Ends the fork server."""
        self._measurer.close()


def _load_sweep(path: str | None) -> Sweep:
    from rlhfbench.cases.preflight import check
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.errors import ForkServerError, SweepError
    from rlhfbench.launch import refuse_launcher
    from rlhfbench.runs.environment import check_system

    try:
        check_system()
        refuse_launcher("pytest --benchmark")
        sweep = Sweep.from_spec(SMALL_GRID) if path is None else Sweep.from_file(path)
        check(sweep)
    except SweepError as error:
        raise pytest.UsageError(*error.problems) from error
    except ForkServerError as error:
        raise pytest.UsageError(str(error)) from error
    return sweep


class Measurer:
    """Measures cases as ``rlhfbench run`` does, each in its own process. The fork server starts with the first."""

    def __init__(self, sweep: Sweep, time_budget_s: float) -> None:
        self._sweep, self._time_budget_s = sweep, time_budget_s
        self._opened = ExitStack()
        self._run: Callable[[Case], dict[str, Any]] | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """Measures ``case`` and returns its record.

        Raises:
            RlhfBenchError: The fork server does not start, or the disk is full.
        """
        if self._run is None:
            self._run = self._open()
        return self._run(case)

    def _open(self) -> Callable[[Case], dict[str, Any]]:
        from rlhfbench.records.file import RecordsFile
        from rlhfbench.runs.case_process import ThisMachine
        from rlhfbench.runs.case_runner import Runner
        from rlhfbench.runs.folder import RunFolder
        from rlhfbench.runs.forkserver import WARM, ForkServer
        from rlhfbench.runs.options import RunOptions
        from rlhfbench.runs.progress import Silent

        folder = RunFolder(self._opened.enter_context(tempfile.TemporaryDirectory(prefix="rlhfbench-")))
        folder.prepare(self._sweep, resume=False)
        records = self._opened.enter_context(RecordsFile(folder.path))
        server = self._opened.enter_context(ForkServer(optional=WARM))
        runner = Runner(folder, RunOptions(time_budget_s=self._time_budget_s), records, ThisMachine(server), Silent())

        def run(case: Case) -> dict[str, Any]:
            runner.run([case])
            runner.run_blocks([case])
            return records.records[-1]

        return run

    def close(self) -> None:
        """Ends the fork server and removes its files."""
        self._opened.close()


class Gate:
    """Compares every case of a sweep with a revision or a stored run, when the first test asks.

    Args:
        base: The revision, or the folder of a run.
        sweep: The cases.
    """

    def __init__(self, base: str, sweep: Sweep) -> None:
        self._base, self._sweep = base, sweep
        self._findings: list[Finding] | None = None

    def findings(self, case: Case) -> list[Finding]:
        """Returns the findings on ``case``.

        Raises:
            RlhfBenchError: The two cannot be compared.
        """
        from rlhfbench.errors import GateError

        if self._findings is None:
            self._findings = self._compare()
        found = [found for found in self._findings if found.case.id == case.id]
        if not found:
            raise GateError(f"'{self._base}' has no such case: it cannot be compared.")
        return found

    def _compare(self) -> list[Finding]:
        from rlhfbench.gate import compare_with

        with tempfile.TemporaryDirectory(prefix="rlhfbench-") as folder:
            return compare_with(self._base, self._sweep, Path(folder) / "gate")


def _gate_test(case: Case, gate: Gate) -> Callable[[], None]:
    from rlhfbench.errors import RlhfBenchError

    def test_gate() -> None:
        from rlhfbench.gate.output import CANNOT_TELL, REGRESSED, exit_code, markdown

        try:
            findings = gate.findings(case)
        except RlhfBenchError as error:
            pytest.fail(str(error), pytrace=False)
        code, table = exit_code(findings), markdown(findings, "the base", "the working tree")
        if code == REGRESSED:
            pytest.fail(table, pytrace=False)
        if code == CANNOT_TELL:
            pytest.skip(f"the gate cannot tell:\n{table}")

    return test_gate


class _SweepModule(pytest.Module):
    """Parent node of a sweep's tests. It is a module because module-scoped fixtures need one."""

    cases: Sequence[Case]
    measurer: Measurer
    gate: Gate | None

    def collect(self) -> Iterator[pytest.Item]:
        """Yields one test per case, in the sweep's order."""
        for case in self.cases:
            timer = ReplayTimer()
            if self.gate is not None:
                yield _CaseTest.from_parent(self, name=f"gate-{case_name(case)}", callobj=_gate_test(case, self.gate))
                continue
            item = _CaseTest.from_parent(self, name=case_name(case), callobj=_make_test(case, timer, self.measurer))
            item.add_marker(pytest.mark.benchmark(timer=timer.step_seconds, group=group_name(case)))
            # A failed case replays nothing; without this filter pytest-benchmark would warn beside the failure.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))
            yield item


class _CaseTest(pytest.Function):
    """The test of one case."""

    def reportinfo(self) -> tuple[Path, int, str]:
        """Returns the location to report: no file on this machine's disk."""
        return self.path, 0, self.name


class ReplayTimer:
    """Timer for pytest-benchmark that replays measured seconds.

    pytest-benchmark reads it before and after each call of ``step``. Each round starts at 0, so that the difference is
    the sample to the last bit.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._samples_s: Iterator[float] = iter(())

    def load(self, samples_s: Sequence[float]) -> None:
        """Sets the seconds that the next calls of ``step`` take."""
        self._samples_s = iter(samples_s)

    def step_seconds(self) -> float:
        """Returns seconds since the round began."""
        return self._now_s

    def rewind(self) -> None:
        """Begins a round at 0 s."""
        self._now_s = 0.0

    def step(self) -> None:
        """Advances by the next sample; by nothing after the last."""
        self._now_s += next(self._samples_s, 0.0)


def _make_test(case: Case, timer: ReplayTimer, measurer: Measurer) -> Callable[[Any], None]:
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
        samples_s = block_steps_s(record)
        timer.load(samples_s)
        benchmark.pedantic(timer.step, setup=timer.rewind, rounds=len(samples_s), iterations=1, warmup_rounds=0)

    return test_step


def _raise_unless_ok(record: dict[str, Any]) -> None:
    """Skips the test if the case does not fit the machine, and fails it for any other outcome but ``ok``."""
    outcome = record["outcome"]
    if outcome == "ok":
        return
    error = record["error"] or {}
    where = f" in {error['phase']}" if error.get("phase") else ""
    sentence = f"{outcome}{where}: {error.get('message') or 'no message.'}"
    if outcome in ("oom", "skipped"):
        pytest.skip(sentence)
    pytest.fail(sentence, pytrace=False)


def block_steps_s(record: dict[str, Any]) -> list[float]:
    """Returns the seconds of one step by block of ``record``: their mean is the record's, as in every report."""
    from rlhfbench.records.derived import rows_per_step

    blocks = record["latency"]["total_block_s_per_sample"]
    return [seconds * rows_per_step(record) for seconds in blocks if seconds is not None]


def extra_info(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the ``extra_info`` of pytest-benchmark's JSON: the record's case, outcome, memory and latencies."""
    latency = dict(record["latency"] or {})
    phases = latency.pop("phases", None) or {}
    latency.pop("blocks", None)
    latency["phases"] = {name: {"mean_s": phase["mean_s"]} for name, phase in phases.items()}
    return {
        "case_id": record["case"]["id"],
        "case": record["case"],
        "outcome": record["outcome"],
        "memory": record["memory"],
        "latency": latency,
    }


def case_name(case: Case) -> str:
    """Returns the test's name, such as ``hydra[tiny-16+16-batch2-cpu-float32]``.

    The case's id is appended if the name does not determine the case.
    """
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
    """Returns the group in which pytest-benchmark compares methods: one size on one device."""
    where = f"{Path(case.model).name} {case.device} {case.dtype}"
    return f"{where}: {case.seq_len} tokens, batch {case.batch_size}"
