from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhfbench.evidence.goals import GOALS, Measured, plan_error
from rlhfbench.evidence.request import GIB


def record(method: str = "hydra", **values: float) -> dict[str, Any]:
    """A record with ``total_s``, ``total_gib``, ``planned_gib``, ``peak_gib`` and ``floor_s``."""
    total = values.get("total_gib", 60) * GIB
    phases = ("update_actor", "update_critic", "optimize")
    return {
        "case": {"method": method},
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


def verdicts(*records: dict[str, Any], on_cuda: bool = True, **fractions: float) -> list[str]:
    decode = {
        f"batch {name[1:]}, {by}": {"batch_size": int(name[1:]), "by": by, "floor_fraction": share * fraction}
        for name, fraction in fractions.items()
        for by, share in (("with graphs", 1.0), ("without graphs", 0.5))
    }
    decode["batch 32, with graphs"] = {"batch_size": 32, "by": "with graphs", "failed": "RuntimeError: x"}
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


def test_the_better_of_decoding_with_and_without_graphs_counts() -> None:
    found = Measured(
        on_cuda=True, records=[], decode={"batch 16, a": decoded("a", 0.5), "batch 16, b": decoded("b", 0.7)}
    )
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
