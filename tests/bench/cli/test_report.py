import json

import pytest

import rlhfbench.runs.drawing
from rlhfbench.cli import common
from rlhfreports.terminal import Column, terminal


def test_report_draws_from_the_records(call, tmp_path):
    record = json.dumps({"schema": 1, "case": {"id": "a"}, "outcome": "ok"})
    (tmp_path / "records.jsonl").write_text(record + "\n")
    drawn = []

    def draw(run_dir, *, whole):
        drawn.append((run_dir, whole))
        return "the table"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhfbench.runs.drawing, "draw_run", draw)
        assert call("report", str(tmp_path)) == (0, "the table\n", "")
    assert drawn == [(tmp_path, True)]


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
