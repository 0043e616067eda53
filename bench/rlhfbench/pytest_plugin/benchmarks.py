"""The tests of ``pytest --benchmark``: one for each case of a sweep.

A case is measured as ``rlhfbench run`` measures it, in a forked process. The seconds of a step in each block
are then replayed to pytest-benchmark through a timer, so that its mean is that of the record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RlhfBenchError
from rlhfbench.gate.output import PASS, exit_code, markdown, open_verdicts
from rlhfbench.pytest_plugin import DEFAULT_TIME_BUDGET_S
from rlhfbench.pytest_plugin.measurer import Gate, Measurer
from rlhfbench.records.derived import rows_per_step
from rlhfkernels.config.case import Case

NODE_NAME = "rlhfbench"


class Benchmarks:
    """Hooks that are registered only with ``--benchmark``."""

    def __init__(self, config: pytest.Config, sweep: Sweep) -> None:
        self._sweep = sweep
        time_budget_s = config.getoption("rlhfbench_time_budget_s")
        self._measurer = Measurer(sweep, DEFAULT_TIME_BUDGET_S if time_budget_s is None else time_budget_s)
        base = config.getoption("rlhfbench_gate")
        self._gate = None if base is None else Gate(base, sweep)

    # First, so that -k, reordering and counting apply to these tests too.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Adds one test per case to the collected ones."""
        # A path that does not exist gives the same node ids on every machine, so that saved runs can be compared.
        module = _SweepModule.from_parent(session, path=session.config.rootpath / NODE_NAME)
        module.obj = sys.modules[__name__]
        module.cases, module.measurer, module.gate = self._sweep.cases, self._measurer, self._gate
        items.extend(session.genitems(module))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Has the gate compare the cases of the selected tests alone."""
        if self._gate is not None:
            self._gate.select([item.case for item in session.items if isinstance(item, _CaseTest)])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Prints the gate's note, such as that base and head are one commit."""
        if self._gate is not None and self._gate.compared is not None and self._gate.compared.note:
            terminalreporter.write_line(self._gate.compared.note)

    def pytest_unconfigure(self) -> None:
        """Ends the fork server."""
        self._measurer.close()


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
                item = _CaseTest.from_parent(self, name=f"gate-{case_name(case)}", callobj=_gate_test(case, self.gate))
            else:
                item = _CaseTest.from_parent(self, name=case_name(case), callobj=_make_test(case, timer, self.measurer))
                item.add_marker(pytest.mark.benchmark(timer=timer.step_seconds, group=group_name(case)))
            item.case = case
            # A failed case and a gate replay nothing; without this filter pytest-benchmark would warn beside them.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))
            yield item


class _CaseTest(pytest.Function):
    """The test of one case."""

    case: Case

    def reportinfo(self) -> tuple[Path, int, str]:
        """Returns the location to report: no file on this machine's disk."""
        return self.path, 0, self.name


def _gate_test(case: Case, gate: Gate) -> Callable[[], None]:
    # With --benchmark-only, pytest-benchmark skips every test without its fixture.
    @pytest.mark.usefixtures("benchmark")
    def test_gate() -> None:
        try:
            findings = gate.findings(case)
        except RlhfBenchError as error:
            pytest.fail(str(error), pytrace=False)
        if exit_code(findings) == PASS:
            return
        assert gate.compared is not None
        table = markdown(findings, gate.compared.base, gate.compared.head)
        is_regression = any(found.is_regression for found in findings)
        if not is_regression and open_verdicts(findings) == {"ambiguous"}:
            pytest.skip(f"the gate cannot tell:\n{table}")
        pytest.fail(table, pytrace=False)

    return test_gate


def _make_test(case: Case, timer: ReplayTimer, measurer: Measurer) -> Callable[[Any], None]:
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
    model = Path(case.model).name or case.model  # which a folder such as "." has not
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
    where = f"{Path(case.model).name or case.model} {case.device} {case.dtype}"
    return f"{where}: {case.seq_len} tokens, batch {case.batch_size}"
