import dataclasses
import io
import platform
import sys
from types import SimpleNamespace

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import ForkServerError
from rlhfbench.records.file import read_records
from rlhfbench.runs import runner
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.progress import LineProgress

pytestmark = pytest.mark.usefixtures("fake_server")


class WatchingBlocks(LineProgress):
    """Notes the cases in the order in which blocks of them are timed."""

    def __init__(self):
        super().__init__(io.StringIO())
        self.rounds = []

    def begin_blocks(self, number, num_blocks, num_cases):
        super().begin_blocks(number, num_blocks, num_cases)
        self.rounds.append([])

    def start_block(self, case):
        super().start_block(case)
        self.rounds[-1].append(case.id)


def test_blocks_of_all_cases_alternate_in_random_order(tmp_path, sweep_of, run):
    cases = [dataclasses.replace(sweep_of("blocks").cases[0], batch_size=size) for size in range(1, 7)]
    watching = WatchingBlocks()
    result = run(Sweep(cases=tuple(cases)), tmp_path / "run", progress=watching, blocks=4)
    ids = [case.id for case in cases]
    assert [sorted(ids) == sorted(of_round) for of_round in watching.rounds] == [True] * 3
    assert len({tuple(ids), *map(tuple, watching.rounds)}) == 4
    for record in result.records:
        assert [block["phases"]["generate"] for block in record["latency"]["blocks"]] == [[1.0], [2.0], [3.0], [4.0]]
        size = record["case"]["batch_size"]
        assert record["latency"]["total_s_per_sample"] == pytest.approx(2.5 / size)
        assert record["latency"]["total_block_s_per_sample"] == pytest.approx([n / size for n in (1, 2, 3, 4)])
    assert read_records(tmp_path / "run") == result.records


def test_a_block_that_fails_is_recorded_and_does_not_count(tmp_path, capsys, sweep_of, run):
    (record,) = run(sweep_of("oom-in-block-1"), tmp_path / "run", blocks=3, progress=LineProgress(sys.stderr)).records
    assert record["outcome"] == "ok"
    assert record["latency"]["blocks"][1]["error"]["outcome"] == "oom"
    assert record["latency"]["total_block_s_per_sample"] == [0.5, None, 1.5]
    assert record["latency"]["total_s_per_sample"] == 1.0
    assert "block 2 of 3: oom: no room" in capsys.readouterr().err


def test_blocks_that_are_missing_are_timed_when_resumed(tmp_path, sweep_of, run):
    sweep = sweep_of("blocks", "ok")
    whole = run(sweep, tmp_path / "run", blocks=3).records
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    (cut, _) = read_records(tmp_path / "run")
    assert len(cut["latency"]["blocks"]) == 2
    assert run(sweep, tmp_path / "run", resume=True, blocks=3).records == whole


@pytest.fixture
def cut(tmp_path, sweep_of, run):
    """The sweep of a run of two blocks, of which one is recorded."""
    sweep = sweep_of("blocks")
    run(sweep, tmp_path / "run", blocks=2)
    path = tmp_path / "run" / "records.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    return sweep


def num_blocks(result):
    (record,) = result.records
    return len(record["latency"]["blocks"])


def test_blocks_of_two_machines_are_not_mixed(tmp_path, monkeypatch, cut, run):
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert num_blocks(run(cut, tmp_path / "run", resume=True, blocks=2)) == 1


def test_blocks_of_other_conditions_are_not_mixed(tmp_path, cut, run):
    progress = LineProgress(io.StringIO())
    assert num_blocks(run(cut, tmp_path / "run", progress, resume=True, blocks=2, num_threads=7)) == 1
    assert progress._stream.getvalue().splitlines()[-1] == (
        "No further blocks are timed for 1 case: measured under other conditions, or on a machine that is not here."
    )
    assert num_blocks(run(cut, tmp_path / "run", resume=True, blocks=2)) == 2  # as they were again


def test_blocks_of_edited_sources_are_not_mixed(tmp_path, monkeypatch, cut, run):
    monkeypatch.setattr("rlhfbench.runs.versions.installed", lambda: ("1.0", "edited"))
    assert num_blocks(run(cut, tmp_path / "run", resume=True, blocks=2)) == 1


def test_blocks_of_other_layouts_of_a_launcher_are_not_mixed(tmp_path, monkeypatch, cut, run):
    first = SimpleNamespace(start=lambda: None, run=None, end=lambda: None, layout="2 here, 2 on b")
    monkeypatch.setattr(runner, "find_launch", lambda: SimpleNamespace(rank=0))
    monkeypatch.setattr(runner, "leader", lambda: first)
    progress = LineProgress(io.StringIO())
    assert num_blocks(run(cut, tmp_path / "run", progress, resume=True, blocks=2)) == 1
    assert "launcher's ranks 2 here, 2 on b instead of none" in progress._stream.getvalue()


def test_blocks_of_unknown_conditions_are_not_mixed(tmp_path, cut, run):
    (tmp_path / "run" / "environment.json").unlink()
    assert num_blocks(run(cut, tmp_path / "run", resume=True, blocks=2)) == 1


def test_a_resumed_run_times_as_many_blocks_as_it_is_asked_for(tmp_path, sweep_of, run):
    sweep = sweep_of("blocks")
    run(sweep, tmp_path / "run", blocks=2)
    (record,) = run(sweep, tmp_path / "run", resume=True, blocks=4).records
    assert [block["phases"]["generate"] for block in record["latency"]["blocks"]] == [[1.0], [2.0], [3.0], [4.0]]
    assert record["latency"]["num_blocks"] == 4
    assert run(sweep, tmp_path / "run", resume=True, blocks=3).records == [record]


def test_a_round_is_told_how_long_the_one_before_took(tmp_path, monkeypatch, sweep_of, run):
    told, start = [], ThisMachine.start
    monkeypatch.setattr(
        ThisMachine, "start", lambda machine, round_s=0.0: told.append(round_s) or start(machine, round_s=round_s)
    )
    run(sweep_of("blocks"), tmp_path / "run", blocks=3)
    assert [round_s > 0 for round_s in told] == [False, True, True]
    assert told[1] != told[2]
    assert num_blocks(run(sweep_of("blocks"), tmp_path / "run", resume=True, blocks=4)) == 4
    assert told[3:] == [0.0]  # nothing was run before


def test_a_server_that_cannot_start_anew_loses_no_block_that_was_timed(tmp_path, monkeypatch, sweep_of, run):
    rounds, start = iter((True, True, False)), ThisMachine.start

    def refuse(machine, round_s=0.0):
        if not next(rounds):
            raise ForkServerError("no memory.")
        start(machine, round_s=round_s)

    monkeypatch.setattr(ThisMachine, "start", refuse)
    progress = LineProgress(io.StringIO())
    assert num_blocks(run(sweep_of("blocks"), tmp_path / "run", progress, blocks=4)) == 2
    assert "No further blocks are timed: no memory." in progress._stream.getvalue().splitlines()


def test_a_first_server_that_cannot_start_is_an_error(tmp_path, monkeypatch, cut, run):
    def refuse(machine, round_s=0.0):
        raise ForkServerError("no memory.")

    monkeypatch.setattr(ThisMachine, "start", refuse)
    with pytest.raises(ForkServerError):
        run(cut, tmp_path / "run", resume=True, blocks=2)
