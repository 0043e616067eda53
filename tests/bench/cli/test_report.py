import dataclasses
import json
from pathlib import Path

import pytest

import rlhfbench.runs.drawing
from rlhfbench.cli import common
from rlhfbench.records.file import make_record
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfreports.layouts import Column
from rlhfreports.terminal import terminal

SCHEMA_1 = Path(__file__).parents[1] / "records" / "schema1.jsonl"


def test_report_draws_from_the_records(call, tmp_path):
    record = json.dumps({"schema": 1, "case": {"id": "a"}, "outcome": "ok"})
    (tmp_path / "records.jsonl").write_text(record + "\n")
    drawn = []

    def draw(run_dir, *, whole, with_paper, same_machine, plan_dirs):
        drawn.append((run_dir, whole, with_paper, same_machine, plan_dirs))
        return "the table"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
        assert call("report", str(tmp_path)) == (0, "the table\n", "")
        assert call("report", str(tmp_path), "--paper") == (0, "the table\n", "")
        assert call("report", str(tmp_path), "--same-machine") == (0, "the table\n", "")
        (tmp_path / "plan").mkdir()
        (tmp_path / "plan" / "plan.json").write_text("[]")
        assert call("report", str(tmp_path / "plan"), str(tmp_path)) == (0, "the table\n", "")
    flags = ((False, False, []), (True, False, []), (False, True, []), (False, False, [tmp_path / "plan"]))
    assert drawn == [(tmp_path, True, *each) for each in flags]


def test_a_plan_stands_beside_one_run(call, tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_bytes(SCHEMA_1.read_bytes())
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text("[]")
    plan, *names = (str(tmp_path / name) for name in ("plan", "before", "after"))
    says = f"'{plan}' is a plan: it must be given with one run, and "
    assert call("report", plan) == (2, "", f"{says}0 are given.\n")
    assert call("report", *names, plan) == (2, "", f"{says}2 are given.\n")
    (tmp_path / "plan" / "plan.json").write_text("{")
    code, _, err = call("report", names[0], plan)
    assert (code, "plan.json' cannot be read: " in err, len(err.splitlines())) == (2, True, 1)


@pytest.mark.parametrize("with_ranks", ["run", "plan"])
def test_a_run_and_a_plan_need_cases_over_ranks_to_stand_beside_each_other(call, tmp_path, with_ranks):
    ranks = Options.of({"parallel.strategy": "ddp", "parallel.world_size": 2})
    case = Case(method="dpo", model="tiny", prompt_len=4, completion_len=4, batch_size=1)
    cases = {name: dataclasses.replace(case, options=ranks) if name == with_ranks else case for name in ("run", "plan")}
    record = make_record(cases["run"], outcome="oom", error=None, measured={}, started_at="now", wall_s=1.0)
    for name, file, content in (
        ("run", "records.jsonl", record),
        ("plan", "plan.json", [{"case": cases["plan"].to_dict()}]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content) + "\n")
    (alone,) = {"run", "plan"} - {with_ranks}
    sentence = f"'{tmp_path / alone}' has no case over ranks: a plan is laid beside a run for such cases alone.\n"
    assert call("report", str(tmp_path / "run"), str(tmp_path / "plan")) == (2, "", sentence)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["records.jsonl"]


def test_report_compares_runs(call, tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "records.jsonl").write_bytes(SCHEMA_1.read_bytes())
    names = [str(tmp_path / name) for name in ("before", "after")]
    code, out, err = call("report", *names, "--out", str(tmp_path / "both"))
    assert (code, err) == (0, "")
    assert "after is faster than before in 0, slower in 0" in out
    assert out.splitlines()[-1] == f"The comparison is in {tmp_path / 'both' / 'comparison.html'}."
    assert (tmp_path / "both" / "comparison.html").is_file()


def test_a_report_that_cannot_be_written(call, tmp_path, monkeypatch):
    (tmp_path / "records.jsonl").write_text('{"schema": 1, "case": {"id": "a"}, "outcome": "ok"}\n')

    def draw(run_dir, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
    code, _, err = call("report", ".")
    assert (code, err) == (2, "run '.' cannot be drawn: No space left on device.\n")


def test_a_package_that_only_drawing_needs_is_named(call, tmp_path, monkeypatch):
    (tmp_path / "records.jsonl").write_text('{"schema": 1, "case": {"id": "a"}, "outcome": "ok"}\n')

    def draw(run_dir, **_):
        raise ImportError("`Import tabulate` failed.  Use pip or conda to install the tabulate package.")

    monkeypatch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
    sentence = "run '.' cannot be drawn: `Import tabulate` failed. Use pip or conda to install the tabulate package.\n"
    assert call("report", ".") == (2, "", sentence)


def test_a_table_in_a_pipe_is_200_columns_wide(capsys):
    columns = [Column(heading=f"heading {i}", cells=["1234567"]) for i in range(16)]
    common.print_table(terminal("", columns))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len(lines[0].rstrip()) == 10 * 9 + 6 * 10 + 15 * 2
