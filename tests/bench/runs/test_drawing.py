from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from rich.console import Console

from rlhfbench.errors import RecordsError
from rlhfbench.records.file import RECORDS_NAME, RecordsFile, make_plan, make_record, read_records
from rlhfbench.records.timelines import write_timeline
from rlhfbench.runs import drawing
from rlhfbench.runs.drawing import draw_run, remove_drawings
from rlhfkernels.config.case import Case
from rlhfkernels.observer import PARTS

SUMS = ("model_bytes", "activation_bytes", "total_bytes")
DRAWN = {
    *("memory_table.md", "memory_table.csv", "latency.png", "latency.svg"),
    *("throughput.png", "throughput.svg", "index.html"),
}


def write_run(run_dir, *outcomes: str, plan=None) -> None:
    with RecordsFile(run_dir) as records:
        for place, outcome in enumerate(outcomes):
            case = Case(method="hydra", model="tiny", prompt_len=8 * 2**place, completion_len=8, batch_size=1)
            latency = {f"{name}_s_per_sample": 0.5 for name in ("inference", "update", "total")}
            memory = {"model_bytes": 2**30, "activation_bytes": 0, "rollout_bytes": 0, "total_bytes": 2**30}
            measured = {"memory": memory, "latency": latency} if outcome == "ok" else {}
            error = None if outcome == "ok" else {"kind": "K", "message": "why.", "phase": None}
            records.append(
                make_record(
                    case, outcome=outcome, error=error, measured=measured, started_at="now", wall_s=1.0, plan=plan
                )
            )


@pytest.mark.parametrize("outcomes", [("ok", "ok", "oom"), ("oom",), ()])
def test_a_report_is_drawn_from_the_records_alone(tmp_path, outcomes):
    write_run(tmp_path, *outcomes)
    table = draw_run(tmp_path)
    fitted = {"slopes.md", "slopes.csv"} if outcomes.count("ok") > 1 else set()
    assert {path.name for path in tmp_path.iterdir()} == {RECORDS_NAME, *DRAWN, *fitted}
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table)
    assert console.export_text().count("OOM") >= outcomes.count("oom")
    remove_drawings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_NAME]


def test_a_whole_report_begins_with_the_noise_of_the_run_and_ends_with_its_gain(tmp_path):
    write_run(tmp_path, "ok", "ok")
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(draw_run(tmp_path, whole=True))
    lines = console.export_text().splitlines()
    assert "how sure the times are is not known" in lines[0]
    assert any(line.startswith("Slopes") for line in lines)


def test_a_gain_is_written_if_there_is_one(tmp_path):
    with RecordsFile(tmp_path) as records:
        for method, batch_size, seconds in (("lora", 1, 0.4), ("hydra", 1, 0.2), ("hydra", 2, 0.1)):
            case = Case(method=method, model="tiny", prompt_len=8, completion_len=8, batch_size=batch_size)
            measured = {"memory": {"total_bytes": 2**30}, "latency": {"total_s_per_sample": seconds}}
            records.append(make_record(case, outcome="ok", error=None, measured=measured, started_at="now", wall_s=1.0))
    draw_run(tmp_path)
    assert "| Hydra-PPO | 16 | 1 | 1 | ≥2 | 2.00x | 2.00x | 4.00x | – | – |" in unpadded(tmp_path / "gain.md")
    assert len((tmp_path / "gain.csv").read_text().splitlines()) == 2
    remove_drawings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_NAME]


def unpadded(path) -> str:
    """A Markdown file without the blanks that align its tables."""
    return re.sub(" +", " ", path.read_text())


def timeline_of(*totals: int) -> dict[str, object]:
    sizes = {part: [0] * len(totals) for part in PARTS} | {"base": list(totals)}
    phase = {"names": ["score"], "first_event": 0, "last_event": len(totals)}
    return {"phases": [phase], "events": list(range(1, len(totals) + 1)), "parts_bytes": sizes}


def pictures(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def test_timelines_are_drawn_of_the_largest_case_or_of_all(tmp_path):
    write_run(tmp_path, "ok", "ok", "ok", "oom")
    ids = [record["case"]["id"] for record in read_records(tmp_path)]
    folder = tmp_path / "timelines"
    for case_id in (ids[0], ids[2]):
        write_timeline(folder, case_id, timeline_of(1, 2**30, 5))
    draw_run(tmp_path)
    assert pictures(folder) == [f"{ids[2]}.png", f"{ids[2]}.svg"]
    draw_run(tmp_path, whole=True)
    assert pictures(folder) == sorted(f"{ids[i]}{end}" for i in (0, 2) for end in (".png", ".svg"))


def test_predictions_are_drawn_if_there_are_some(tmp_path):
    write_run(tmp_path, "ok", "oom", plan=make_plan(dict.fromkeys(SUMS, 2**30), None))
    draw_run(tmp_path)
    made = {path.name for path in tmp_path.iterdir()} - {RECORDS_NAME, *DRAWN}
    assert made == {"predicted.md", "predicted.png", "predicted.svg"}
    remove_drawings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [RECORDS_NAME]


def test_all_that_can_be_drawn_is_removed_and_nothing_else(tmp_path):
    """Tables and plots over ranks need runs of several: their names are read from what says they are written."""
    named = re.findall(r"``(\w+)`` \(\.", drawing.draw_run.__doc__)
    assert {"memory_table", "scaling", "planned_ranks"} <= set(named)
    for name in (*(f"{stem}.md" for stem in named), "comparison.html", "notes.md"):
        (tmp_path / name).write_text("")
    remove_drawings(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_drawing_again_gives_the_same_files(tmp_path):
    write_run(tmp_path, "ok", "oom")
    draw_run(tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in DRAWN}
    draw_run(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in DRAWN} == first


def test_a_folder_without_records_is_named(tmp_path):
    with pytest.raises(RecordsError, match=RECORDS_NAME):
        draw_run(tmp_path)


def test_importing_it_imports_nothing_heavy():
    code = "import sys, rlhfbench.runs.drawing; sys.exit(bool({'pandas', 'matplotlib', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
