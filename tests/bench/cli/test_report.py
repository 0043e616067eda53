import json
from pathlib import Path

import pytest

import rlhfbench.runs.drawing
from rlhfbench.cli import common
from rlhfreports.layouts import Column
from rlhfreports.terminal import terminal

SCHEMA_1 = Path(__file__).parents[1] / "records" / "schema1.jsonl"


def test_report_draws_from_the_records(call, tmp_path):
    record = json.dumps({"schema": 1, "case": {"id": "a"}, "outcome": "ok"})
    (tmp_path / "records.jsonl").write_text(record + "\n")
    drawn = []

    def draw(run_dir, *, whole, with_paper, same_machine):
        drawn.append((run_dir, whole, with_paper, same_machine))
        return "the table"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
        assert call("report", str(tmp_path)) == (0, "the table\n", "")
        assert call("report", str(tmp_path), "--paper") == (0, "the table\n", "")
        assert call("report", str(tmp_path), "--same-machine") == (0, "the table\n", "")
    assert drawn == [(tmp_path, True, *flags) for flags in ((False, False), (True, False), (False, True))]


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


def test_a_table_in_a_pipe_is_200_columns_wide(capsys):
    columns = [Column(heading=f"heading {i}", cells=["1234567"]) for i in range(16)]
    common.print_table(terminal("", columns))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len(lines[0].rstrip()) == 10 * 9 + 6 * 10 + 15 * 2
