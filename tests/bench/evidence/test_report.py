from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhfbench.evidence import report as module
from rlhfbench.evidence.goals import GOALS, Measured, plan_error
from rlhfbench.evidence.items import Items
from rlhfbench.evidence.request import FULL, GIB, Request
from rlhfbench.runs import environment

BUSY = "other processes used 80% of the CPUs"


def record(method: str = "hydra", **values: float) -> dict[str, Any]:
    """A record with ``total_s``, ``total_gib``, ``planned_gib``, ``peak_gib`` and ``floor_s``."""
    total = values.get("total_gib", 60) * GIB
    phases = ("update_actor", "update_critic", "optimize")
    return {
        "case": {"method": method},
        "outcome": "ok",
        "latency": {
            "total_s_per_sample": values.get("total_s", 0.4),
            "phases": {name: {"mean_s": 1.0} for name in phases},
        },
        "memory": {
            "total_bytes": total,
            "views": {"allocator_peak_bytes": values.get("peak_gib", 60) * GIB + 100, "workspace_bytes": 100},
        },
        "plan": {"total_bytes": values.get("planned_gib", 60) * GIB},
        "work": {"phases": {name: {"floor_s": values.get("floor_s", 0.5)} for name in phases}},
    }


def beside_load(record: dict[str, Any], num_disturbed: int = 1, num_counted: int = 1) -> dict[str, Any]:
    """``record`` with disturbed blocks."""
    blocks = [{"error": None}] * (num_counted if num_counted == num_disturbed else num_counted + num_disturbed)
    counts = {"num_disturbed_blocks": num_disturbed, "num_counted_blocks": num_counted, "blocks": blocks}
    return {**record, "latency": {**record["latency"], **counts, "disturbed_by": BUSY}}


def verdicts(*records: dict[str, Any], on_cuda: bool = True, **fractions: float) -> list[str]:
    decode = {
        f"batch {name[1:]}, {by}": {"batch_size": int(name[1:]), "by": by, "floor_fraction": share * fraction}
        for name, fraction in fractions.items()
        for by, share in (("with graphs", 1.0), ("without graphs", 0.5))
    }
    found = Measured(on_cuda=on_cuda, records=records, decode={"ceilings": {}, **decode})
    return [goal.verdict(found)[1] for goal in GOALS]


def test_goals_that_are_reached() -> None:
    assert verdicts(record(), b1=0.1, b16=0.6, b64=0.7) == ["reached"] * 4


@pytest.mark.parametrize(
    ("place", "values", "fractions"),
    [
        (0, {}, {"b16": 0.7, "b64": 0.59}),
        (1, {"floor_s": 0.44}, {"b16": 0.7}),
        (2, {"total_s": 0.51}, {"b16": 0.7}),
        (2, {"total_gib": 71.2}, {"b16": 0.7}),
        (3, {"planned_gib": 62}, {"b16": 0.7}),
        (3, {"planned_gib": 58}, {"b16": 0.7}),
    ],
)
def test_a_goal_that_is_missed(place: int, values: dict[str, float], fractions: dict[str, float]) -> None:
    found = verdicts(record(**values), **fractions)
    assert found == ["missed" if i == place else "reached" for i in range(4)]


def test_goals_without_measurements_and_on_a_cpu() -> None:
    assert verdicts() == ["not measured"] * 4
    assert verdicts(record("lora"), b1=0.7)[0::2] == ["not measured"] * 2
    assert verdicts(record(), on_cuda=False, b16=0.1) == ["for a CUDA device"] * 4


def test_a_goal_of_which_a_part_failed_is_missed() -> None:
    decode = {"batch 64, a": {"batch_size": 64, "by": "a", "failed": "x"}, "batch 16, a": decoded("a", 0.7)}
    found = Measured(on_cuda=True, records=[record(), {**record("lora"), "outcome": "oom"}], decode=decode)
    decoding, update, step, plan = (goal.verdict(found) for goal in GOALS)
    assert decoding == ("batch 16: 0.70 a; batch 64: failed", "missed")
    assert update == ("hydra: 0.50; lora: oom", "missed")
    assert step == ("0.400 s in 60 GiB", "reached")
    assert plan == ("hydra: +0.0 %; lora: oom", "missed")
    failed = Measured(on_cuda=True, records=[{**record(), "outcome": "timeout"}], decode={})
    assert GOALS[2].verdict(failed) == ("timeout", "missed")


def test_a_goal_of_which_a_part_lacks_is_not_reached() -> None:
    asked: dict[str, Any] = {"methods": ("hydra", "lora"), "decode_batches": (1, 16, 64)}
    found = Measured(on_cuda=True, records=[record()], decode={"batch 16, a": decoded("a", 0.7)}, **asked)
    decoding, update, _, plan = (goal.verdict(found) for goal in GOALS)
    assert decoding == ("batch 16: 0.70 a; batch 64: not measured", "partly measured")
    assert update == ("hydra: 0.50; lora: not measured", "partly measured")
    assert plan == ("hydra: +0.0 %; lora: not measured", "partly measured")
    nothing = Measured(on_cuda=True, records=[], decode={}, **asked)
    assert [goal.verdict(nothing) for goal in GOALS] == [("", "not measured")] * 4


def test_the_better_of_decoding_with_and_without_graphs_counts() -> None:
    decode = {"batch 16, a": decoded("a", 0.5), "batch 16, b": decoded("b", 0.7)}
    decode["batch 16, c"] = {"batch_size": 16, "by": "c", "failed": "RuntimeError: x"}
    found = Measured(on_cuda=True, records=[], decode=decode)
    assert GOALS[0].verdict(found) == ("batch 16: 0.70 b", "reached")


def decoded(by: str, fraction: float) -> dict[str, Any]:
    return {"batch_size": 16, "by": by, "floor_fraction": fraction}


def test_the_error_of_a_plan_leaves_out_library_workspaces() -> None:
    assert plan_error(record(planned_gib=61.2)) == pytest.approx(0.02)


def test_the_report_has_table_1_beside_the_papers(evidence: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = evidence
    text = (folder / "report.md").read_text()
    lines = text.splitlines()
    paper = [line for line in lines if line.startswith("| Hydra-PPO | paper")]
    assert paper == ["| Hydra-PPO | paper | 4 | 15.90 | 52.80 | 71.10 | 4.88 | 1.59 | 6.47 |  |"]
    here = [line for line in lines if "PPO | here | 2 |" in line]
    assert len(here) == 5
    # Two blocks give an interval, to each of the three seconds.
    assert all(line.count(" ± ") == 3 for line in here)
    assert text.count("Not measured.") == 1  # the part that failed
    assert "no/such-model" in text
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert min(widths) > 2
    assert "Traces of the phases are in `runs/profile/traces`." in text


def test_a_goal_says_what_disturbed_its_seconds() -> None:
    for goal in (GOALS[1], GOALS[2]):
        quiet = Measured(on_cuda=True, records=[record()], decode={})
        loud = Measured(on_cuda=True, records=[beside_load(record())], decode={})
        shown, verdict = goal.verdict(quiet)
        assert goal.verdict(loud) == (f"{shown} (disturbed: {BUSY})", verdict)
        set_aside = Measured(on_cuda=True, records=[beside_load(record(), 1, 3)], decode={})
        assert goal.verdict(set_aside) == (shown, verdict)


def test_disturbed_seconds_are_marked_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"batch_size": 1, "prompt_len": 4, "completion_len": 4, "options": {}}
    first, second = ({**record(name), "outcome": "ok"} for name in ("hydra", "lora"))
    records = [{**each, "case": {**each["case"], **case}} for each in (first, beside_load(second))]
    text = make_report(tmp_path, monkeypatch, {"methods": records, "lengths": records, "settings": records})
    shown = [
        cell.strip() for line in text.splitlines() for cell in line.split("|") if cell.strip().startswith("0.4000")
    ]
    assert sorted(shown) == ["0.4000"] * 3 + ["0.4000!"] * 3
    note = f"!: 1 of 2 cases was timed while something else used the machine: {BUSY}."
    assert text.splitlines().count(note) == 3


def make_report(folder: Path, monkeypatch: pytest.MonkeyPatch, runs: dict[str, Any]) -> str:
    """The report of a folder with the records of ``runs``."""
    request = Request(model="llama-7b", device="cuda", sizes=FULL)
    request.write(folder)
    monkeypatch.setattr(module, "_records", lambda run: runs.get(run.name, []))
    found = environment.describe(argv=["rlhfbench"], settings={"device": "cuda", "model": "llama-7b"})
    return module.report(folder, {"environment": {**found, "gpus": None}, "parts": {}})


def test_a_method_does_not_fit_if_its_case_of_table_1_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(model="llama-7b", device="cuda", sizes=FULL)
    (tmp_path / "out").mkdir()
    request.write(tmp_path / "out")
    items = Items(tmp_path / "out" / "batches.json")
    for case in (request.case("full"), request.case("lora", seq_len=2048), request.case("hydra", lora__r=64)):
        items.add(case.id, lambda case=case: {"method": case.method, "seq_len": case.seq_len, "batch_size": 0})  # type: ignore[misc]
    lines = make_report(tmp_path / "out", monkeypatch, {}).splitlines()
    assert [line.split("|")[1].strip() for line in lines if "does not fit, by plan" in line] == ["PPO"]


def test_a_goal_names_the_methods_that_lack_and_not_those_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, folder = Request(model="llama-7b", device="cuda", sizes=FULL), tmp_path / "out"
    request.write(folder)
    full = request.case("full")
    Items(folder / "batches.json").add(full.id, lambda: {"method": "full", "seq_len": full.seq_len, "batch_size": 0})
    case = {"method": "hydra", "batch_size": 1, "prompt_len": 4, "completion_len": 4, "options": {}}
    lines = make_report(folder, monkeypatch, {"methods": [{**record(), "case": case}]}).splitlines()
    (line,) = (line for line in lines if line.startswith("| update"))
    lacking = "; ".join(f"{name}: not measured" for name in ("joined-hydra", "lora", "dynamic-lora"))
    assert line.endswith(f"| hydra: 0.50; {lacking} | partly measured |")


def test_the_largest_share_of_a_tolerance_may_be_no_number() -> None:
    checks = [{"name": name, "error": error, "tolerance": 1.0, "outcome": "wrong"} for name, error in SHARES]
    assert module._verify({"float32": checks}) == [("float32", 2, "a, b", "nan")]


SHARES = (("a", 1e-3), ("b", float("nan")))
