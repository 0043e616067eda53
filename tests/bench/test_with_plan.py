"""``--with-plan`` end to end, with real cases in real processes."""

from __future__ import annotations

import io
from pathlib import Path

from rlhfbench.cases.sweep import Sweep
from rlhfbench.records.timelines import planned, read_timeline
from rlhfbench.runs.drawing import draw_run
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import LineProgress
from rlhfbench.runs.runner import run_sweep


def test_a_plan_and_a_measurement_of_a_real_case_agree(tmp_path: Path) -> None:
    spec = {"methods": ["full", "joined-hydra", "hydra"], "models": "tiny", "seq_lens": 8, "batch_sizes": 2}
    options = RunOptions(with_plan=True, time_budget_s=0.01, blocks=1, num_threads=3)  # no default
    result = run_sweep(Sweep.from_spec(spec), tmp_path / "run", options, progress=LineProgress(io.StringIO()))
    assert result.num_ok == 3
    for record in result.records:
        assert record["plan"]["error"] is None
        assert record["plan"]["peak_phase"] == record["memory"]["peak_phase"]
        for name in ("model_bytes", "activation_bytes", "total_bytes"):
            assert record["plan"][name] == record["memory"][name], name
        timeline = read_timeline(tmp_path / "run" / "timelines", record["case"]["id"])
        assert timeline["peak"]["total_bytes"] == record["memory"]["total_bytes"]
        predicted = read_timeline(tmp_path / "run" / "timelines", planned(record["case"]["id"]))
        assert predicted["peak"] == {**timeline["peak"], "event": predicted["peak"]["event"]}
    draw_run(tmp_path / "run")
    assert "batch 2, predicted" in (tmp_path / "run" / "index.html").read_text(encoding="utf-8")
    assert "Farthest off: " in (tmp_path / "run" / "predicted.md").read_text(encoding="utf-8")
    assert len(list((tmp_path / "run" / "timelines").glob("*.svg"))) == 3
