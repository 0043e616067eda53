from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate import Compared
from rlhfbench.gate.findings import Finding
from rlhfbench.pytest_plugin import benchmarks, measurer
from rlhfbench.pytest_plugin.benchmarks import ReplayTimer, block_steps_s, case_name, group_name
from rlhfbench.pytest_plugin.measurer import Measurer
from rlhfbench.records.blocks import summarize
from rlhfbench.records.file import make_record
from rlhfbench.runs import forkserver
from rlhfbench.runs.folder import RunFolder
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.methods.table import METHODS, families

pytest_plugins = "pytester"

CASE = Case(method="hydra", model="tiny", prompt_len=16, completion_len=16, batch_size=2)
GENERATE_S = [0.1, 0.3, 0.2]
OPTIMIZE_S = [1.0, 2.0, 4.0]
STEPS_S = [1.1, 2.3, 4.2]
MEMORY = {
    "model_bytes": 70,
    "activation_bytes": 20,
    "rollout_bytes": 10,
    "total_bytes": 100,
    "parts": {"base": 60, "adapters": 10, "activations": 20, "rollout": 10},
}


def record_of(case: Case, outcome: str = "ok") -> dict:
    measured = {
        "memory": MEMORY,
        "latency": {"phases": {"generate": {"kind": "inference"}, "optimize": {"kind": "update"}}, "num_blocks": 3},
    }
    error = None if outcome == "ok" else {"kind": "K", "message": "the reason.", "phase": "score"}
    record = make_record(
        case, outcome=outcome, error=error, measured=measured if outcome == "ok" else {}, started_at="now", wall_s=1.0
    )
    if outcome == "ok":
        record["latency"]["blocks"] = [
            {"phases": {"generate": [a], "optimize": [b]}, "stopped_because": "budget", "error": None}
            for a, b in zip(GENERATE_S, OPTIMIZE_S, strict=True)
        ]
    return summarize(record)


@pytest.fixture
def measured(monkeypatch) -> list:
    """Replaces measuring: every case is ok at once. The list has the requested cases, then ``"closed"``."""
    asked: list = []

    class Stub:
        def __init__(self, sweep, time_budget_s):
            self.time_budget_s = time_budget_s

        def measure(self, case):
            asked.append((case, self.time_budget_s))
            return record_of(case)

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(benchmarks, "Measurer", Stub)
    return asked


@pytest.fixture
def bench(pytester):
    # Collecting CPU facts takes pytest-benchmark a second per saved file, and importing hypothesis a second per run.
    pytester.makeconftest("def pytest_benchmark_generate_machine_info(): return {'node': 'n'}")
    without = ("cacheprovider", "xdist", "hypothesispytest")
    return partial(pytester.runpytest_inprocess, *(word for name in without for word in ("-p", f"no:{name}")))


def loaded(path: Path) -> list[dict]:
    return json.loads(path.read_text())["benchmarks"]


def test_without_the_option_nothing_is_benchmarked(bench, pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    result = bench("-v")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*rlhfbench::*")
    assert measured == []


def test_a_sweep_file_alone_benchmarks_nothing(bench, pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    bench("--benchmark-sweep", "nowhere.toml").assert_outcomes(passed=1)
    assert measured == []


def test_loading_the_plugin_imports_nothing_heavy():
    heavy = ("torch", "pandas", "numpy", "matplotlib", "rich", "rlhfkernels", "rlhfbench.cases.sweep", "rlhfbench.runs")
    code = f"import sys, rlhfbench.pytest_plugin; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_ppo_method_is_a_test_in_an_empty_folder(bench, measured):
    result = bench("--benchmark", "-v")
    result.assert_outcomes(passed=5)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*collected 5 items*", "rlhfbench::hydra[[]tiny-16+16-batch2-cpu-float32[]] PASSED*"])
    assert [asked[0].method for asked in measured[:-1]] == list(families()["PPO"])
    assert measured[-1] == "closed"


def test_without_a_path_the_repositorys_own_tests_stay_out(bench, pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    bench("--benchmark").assert_outcomes(passed=5)


def test_with_a_path_they_run_too(bench, pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    bench("--benchmark", ".").assert_outcomes(passed=6)


def test_benchmark_only_skips_the_others(bench, pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    bench("--benchmark", "--benchmark-only", ".").assert_outcomes(passed=5, skipped=1)


def test_k_selects_by_method(bench, measured):
    bench("--benchmark", "-k", "lora and not dynamic").assert_outcomes(passed=1, deselected=4)
    assert [asked[0].method for asked in measured[:-1]] == ["lora"]


def test_the_times_are_those_of_the_steps_to_the_last_bit(bench, pytester, measured):
    bench("--benchmark", "-k", "full", "--benchmark-json=out.json").assert_outcomes(passed=1, deselected=4)
    (found,) = loaded(pytester.path / "out.json")
    assert found["stats"]["data"] == block_steps_s(record_of(CASE)) == pytest.approx(STEPS_S)
    assert found["stats"]["rounds"] == 3
    assert found["stats"]["iterations"] == 1
    assert found["stats"]["mean"] == pytest.approx(statistics.fmean(STEPS_S), rel=1e-15)
    assert found["stats"]["mean"] == pytest.approx(2 * record_of(CASE)["latency"]["total_s_per_sample"], rel=1e-15)


def test_extra_info_has_the_case_the_memory_and_the_latencies(bench, pytester, measured):
    bench("--benchmark", "-k", "full", "--benchmark-json=out.json")
    (found,) = loaded(pytester.path / "out.json")
    info = found["extra_info"]
    case = dataclasses.replace(CASE, method="full")
    assert info["case_id"] == case.id
    assert info["case"] == case.to_dict()
    assert info["outcome"] == "ok"
    assert info["memory"]["parts"] == MEMORY["parts"]
    assert info["memory"]["total_bytes"] == 100
    assert info["latency"]["update_s_per_sample"] == pytest.approx(7 / 3 / 2)
    assert info["latency"]["total_half_width_s_per_sample"] > 0
    assert info["latency"]["phases"] == {
        "generate": {"mean_s": pytest.approx(0.2)},
        "optimize": {"mean_s": pytest.approx(7 / 3)},
    }
    assert found["fullname"] == "rlhfbench::full[tiny-16+16-batch2-cpu-float32]"
    assert found["group"] == "tiny cpu float32: 32 tokens, batch 2"


def test_a_saved_run_compares_with_the_next(bench, measured):
    bench("--benchmark", "--benchmark-save=first").assert_outcomes(passed=5)
    result = bench("--benchmark", "--benchmark-compare=0001", "--benchmark-compare-fail=mean:1%")
    result.assert_outcomes(passed=5)
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*hydra[[]tiny-16+16-batch2-cpu-float32[]] (NOW)*"])


def test_a_slower_step_fails_the_comparison(bench, measured, monkeypatch):
    bench("--benchmark", "-k", "full", "--benchmark-save=first")
    monkeypatch.setattr(benchmarks, "block_steps_s", lambda record: [2 * s for s in STEPS_S])
    result = bench("--benchmark", "-k", "full", "--benchmark-compare=0001", "--benchmark-compare-fail=mean:10%")
    assert result.ret != pytest.ExitCode.OK


def in_words(findings, note=""):
    """The return value of a gate."""
    return Compared(list(findings), "the base", "the head", note)


def test_a_gate_fails_the_tests_of_cases_with_a_regression(bench, measured, monkeypatch):
    asked = []

    def compare(base, sweep, out):
        asked.append(base)
        verdicts = {"full": "larger", "hydra": "ambiguous"}
        return in_words(
            Finding(
                case=c,
                quantity="memory total",
                verdict=verdicts.get(c.method, "same"),
                is_regression=c.method == "full",
            )
            for c in sweep.cases
        )

    monkeypatch.setattr(measurer, "compare_in_words", compare)
    result = bench("--benchmark", "--benchmark-gate=main", "-rs")
    result.assert_outcomes(passed=3, failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["*gate-full*", "*the head against the base.*", "*memory total*larger*", "*the gate cannot tell*"]
    )
    assert asked == ["main"]  # once for all cases


def test_a_gate_prints_its_note_once(bench, measured, monkeypatch):
    monkeypatch.setattr(
        measurer,
        "compare_in_words",
        lambda base, sweep, out: in_words(
            (Finding(case=case, quantity="total s", verdict="same") for case in sweep.cases), "It is one commit."
        ),
    )
    result = bench("--benchmark", "--benchmark-gate=main")
    result.assert_outcomes(passed=5)
    assert result.stdout.str().count("It is one commit.") == 1


def found_by_gate(monkeypatch, **more) -> None:
    """Replaces the gate's comparison: it finds the same on every case."""
    monkeypatch.setattr(
        measurer,
        "compare_in_words",
        lambda base, sweep, out: in_words(Finding(case=case, **more) for case in sweep.cases),
    )


def test_a_gate_compares_the_cases_of_the_selected_tests_alone(bench, pytester, measured, monkeypatch):
    asked = []

    def compare(base, sweep, out):
        asked.extend(case.method for case in sweep.cases)
        return in_words(Finding(case=case, quantity="total s", verdict="same") for case in sweep.cases)

    monkeypatch.setattr(measurer, "compare_in_words", compare)
    pytester.makepyfile("def test_full(): pass")
    bench("--benchmark", "--benchmark-gate=main", ".", "-k", "full or gate-hydra").assert_outcomes(
        passed=3, deselected=3
    )
    assert asked == ["full", "hydra"]


def test_a_time_budget_beside_a_gate_is_one_sentence(bench, measured):
    result = bench("--benchmark", "--benchmark-gate=main", "--benchmark-time-budget-s=2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--benchmark-gate takes no --benchmark-time-budget-s: *"])


def test_a_gate_runs_beside_benchmark_only(bench, measured, monkeypatch):
    found_by_gate(monkeypatch, quantity="total s", verdict="slower", is_regression=True)
    bench("--benchmark", "--benchmark-only", "--benchmark-gate=main", "-Werror").assert_outcomes(failed=5)


@pytest.mark.parametrize("verdict", ["failed", "missing"])
def test_a_gate_fails_the_test_of_a_case_that_could_not_be_compared(bench, measured, monkeypatch, verdict):
    found_by_gate(monkeypatch, quantity="", verdict=verdict, reason="base: crashed: the reason.")
    result = bench("--benchmark", "--benchmark-gate=main", "-k", "gate-full")
    result.assert_outcomes(failed=1, deselected=4)
    result.stdout.fnmatch_lines([f"*{verdict}: base: crashed: the reason.*"])


def test_a_gate_that_cannot_compare_fails_its_tests_with_the_sentence(bench, measured, monkeypatch):
    def compare(base, sweep, out):
        raise GateError(f"revision '{base}' is not a commit.")

    monkeypatch.setattr(measurer, "compare_in_words", compare)
    result = bench("--benchmark", "--benchmark-gate=nonsense", "-k", "hydra and not joined")
    result.assert_outcomes(failed=1, deselected=4)
    result.stdout.fnmatch_lines(["*revision 'nonsense' is not a commit.*"])


def test_a_gate_that_cannot_compare_is_not_tried_again_for_each_case(bench, measured, monkeypatch):
    asked = []

    def compare(base, sweep, out):
        asked.append(base)
        raise GateError("the machine is not free.")

    monkeypatch.setattr(measurer, "compare_in_words", compare)
    bench("--benchmark", "--benchmark-gate=main").assert_outcomes(failed=5)
    assert asked == ["main"]


def test_a_gate_of_a_stored_run_has_its_cases(bench, pytester, measured, monkeypatch):
    sweep = Sweep(cases=(dataclasses.replace(CASE, batch_size=5), dataclasses.replace(CASE, method="lora")))
    RunFolder("stored").prepare(sweep, resume=False)
    Path("stored", "records.jsonl").write_text(json.dumps(record_of(sweep.cases[0])) + "\n")
    monkeypatch.setattr(
        measurer,
        "compare_in_words",
        lambda base, own, out: in_words(Finding(case=case, quantity="total s", verdict="same") for case in own.cases),
    )
    bench("--benchmark", "--benchmark-gate=stored").assert_outcomes(passed=2)
    pytester.path.joinpath("mine.toml").write_text('methods = ["lora"]\n')
    result = bench("--benchmark", "--benchmark-gate=stored", "--benchmark-sweep=mine.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--benchmark-gate RUN takes no --benchmark-sweep: the cases are those of the run.*"])
    Path("stored", "records.jsonl").write_text("")
    bench("--benchmark", "--benchmark-gate=stored").stderr.fnmatch_lines(["*baseline 'stored' holds no records*"])


def test_a_gate_finds_a_case_whose_model_is_named_by_a_path_from_here(pytester, monkeypatch):
    pytester.mkdir("mine")
    sweep = Sweep(cases=(dataclasses.replace(CASE, model="mine"),))
    monkeypatch.setattr(
        measurer,
        "compare_in_words",
        lambda base, own, out: in_words(
            Finding(case=c, quantity="total s", verdict="same") for c in own.absolute().cases
        ),
    )
    (found,) = measurer.Gate("main", sweep).findings(sweep.cases[0])
    assert found.case.model == str(pytester.path / "mine")


def test_a_sweep_file_says_what_is_measured(bench, pytester, measured):
    pytester.path.joinpath("mine.toml").write_text('methods = ["lora"]\nseq_lens = [8, 12]\nbatch_sizes = 3\n')
    bench("--benchmark", "--benchmark-sweep=mine.toml", "--benchmark-time-budget-s=0.5").assert_outcomes(passed=2)
    assert [(c.method, c.seq_len, c.batch_size, budget) for c, budget in measured[:-1]] == [
        ("lora", 8, 3, 0.5),
        ("lora", 12, 3, 0.5),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "*sweep file 'bad.toml' cannot be read: No such file or directory.*"),
        ("not toml", "*sweep file 'bad.toml' is not TOML:*"),
        ('methods = "hydr"', "*method 'hydr' is unknown: did you mean 'hydra'*"),
        ('models = "nowhere"', "*nowhere*"),
    ],
)
def test_a_bad_sweep_is_one_sentence(bench, pytester, measured, text, sentence):
    if text is not None:
        pytester.path.joinpath("bad.toml").write_text(text)
    result = bench("--benchmark", "--benchmark-sweep", "bad.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([sentence])
    result.stderr.no_fnmatch_line("*Traceback*")
    assert measured == []


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "soon"])
def test_a_bad_time_budget_is_one_sentence(bench, measured, budget):
    result = bench("--benchmark", f"--benchmark-time-budget-s={budget}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*'{budget}' must be a number of seconds above 0.*"])


def test_without_pytest_benchmark_one_sentence_says_what_to_install(bench, measured):
    result = bench("--benchmark", "-p", "no:benchmark")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--benchmark needs pytest-benchmark: install rlhfbench[[]pytest[]].*"])


def test_a_system_that_cannot_fork_is_one_sentence(bench, measured, monkeypatch):
    monkeypatch.delattr(os, "fork")
    result = bench("--benchmark")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*measuring needs os.fork, which this system lacks*"])


def test_a_launcher_is_one_sentence(bench, measured, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = "pytest --benchmark runs in one process, and a launcher started 2: start it without one."
    result = bench("--benchmark")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{sentence}*"])


def test_without_pytest_benchmark_other_tests_run(pytester, measured):
    pytester.makepyfile("def test_own(): pass")
    pytester.runpytest_inprocess("-p", "no:benchmark").assert_outcomes(passed=1)


def test_xdist_is_refused_in_one_sentence(pytester, measured):
    result = pytester.runpytest_inprocess("--benchmark", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--benchmark measures one case at a time: pytest-xdist must be off (-n 0).*"])


def test_xdist_that_is_off_is_no_problem(pytester, measured):
    pytester.runpytest_inprocess("--benchmark", "-n", "0").assert_outcomes(passed=5)


def test_switched_off_benchmarks_are_skipped_and_say_how_to_switch_them_on(bench, measured):
    result = bench("--benchmark", "--benchmark-disable", "-rs")
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(["*add --benchmark-enable to measure.*"])
    assert measured == ["closed"]


@pytest.mark.parametrize(
    ("outcome", "count"),
    [("oom", "skipped"), ("skipped", "skipped"), ("timeout", "failed"), ("crashed", "failed"), ("invalid", "failed")],
)
def test_a_case_without_numbers_skips_or_fails_with_its_sentence(bench, measured, monkeypatch, outcome, count):
    monkeypatch.setattr(benchmarks.Measurer, "measure", lambda self, case: record_of(case, outcome))
    result = bench("--benchmark", "-k", "full", "-rsf")
    result.assert_outcomes(**{count: 1, "deselected": 4})
    result.stdout.fnmatch_lines([f"*{outcome} in score: the reason.*"])
    result.stdout.no_fnmatch_line("*Traceback*")


def test_autouse_fixtures_of_wide_scope_work(bench, pytester, measured):
    pytester.makeconftest(
        """
        import pytest
        def pytest_benchmark_generate_machine_info(): return {}
        @pytest.fixture(autouse=True, scope="module")
        def everywhere(request): request.module
        @pytest.fixture(autouse=True, scope="package")
        def in_packages(): pass
        """
    )
    bench("--benchmark").assert_outcomes(passed=5)


def test_options_of_pytest_benchmark_work_beside_its_own(bench, measured):
    result = bench(
        "--benchmark-min-time=1", "--benchmark", "--benchmark-enable", "--benchmark-columns=min,median", "-k", "full"
    )
    result.assert_outcomes(passed=1, deselected=4)
    result.stdout.fnmatch_lines(["Name (time in s)*Min*Median*"])


def test_names_are_unique_and_the_same_on_every_machine():
    changes = [
        {},
        {"seed": 1},
        {"options": Options.of({"lora.r": 4})},
        {"options": Options.of({"engine.attn_implementation": "eager"})},
        {"model": "/here/tiny"},
        {"model": "/there/tiny"},
        {"prompt_len": 8, "completion_len": 24},
        {"dtype": "bfloat16"},
        {"device": "cuda:0"},
        {"batch_size": 1},
        {"model": "."},
    ]
    names = [case_name(dataclasses.replace(CASE, **change)) for change in changes]
    assert len(set(names)) == len(names)
    assert names[0] == "hydra[tiny-16+16-batch2-cpu-float32]"
    assert not any("here" in name for name in names)
    assert names[-1].startswith("hydra[.-16+16")


def test_groups_hold_the_methods_at_one_size():
    groups = {group_name(dataclasses.replace(CASE, method=method)) for method in METHODS}
    assert len(groups) == 1
    assert group_name(dataclasses.replace(CASE, batch_size=4)) not in groups
    assert group_name(dataclasses.replace(CASE, model=".")).startswith(". cpu")


def test_the_timer_replays_its_samples():
    timer, samples_s = ReplayTimer(), [0.1, 1e9, 1e-9, 0.3]
    timer.load(samples_s)
    found = []
    for _ in samples_s:
        timer.rewind()
        before = timer.step_seconds()
        timer.step()
        found.append(timer.step_seconds() - before)
    assert found == samples_s


@pytest.mark.usefixtures("fake_case_path")
def test_the_measurer_runs_a_case_in_a_process_of_its_own(monkeypatch):
    server = partial(forkserver.ForkServer, target="fake_case:run_case", preload=())
    monkeypatch.setattr(measurer, "ForkServer", server)
    cases = [dataclasses.replace(CASE, options=Options.of({"data.prompt_field": kind})) for kind in ("ok", "echo")]
    measuring = Measurer(Sweep(cases=tuple(cases)), 0.25)
    try:
        records = [measuring.measure(case) for case in cases]
    finally:
        measuring.close()
    assert [record["case"]["id"] for record in records] == [case.id for case in cases]
    assert [record["outcome"] for record in records] == ["ok", "ok"]
    assert records[1]["prompts"]["settings"]["time_budget_s"] == 0.25
