import json
import os

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError
from rlhfbench.files import write_new
from rlhfbench.runs.folder import RunFolder

GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}
SWEEP = Sweep.from_spec(GRID)


def test_a_new_folder_gets_its_sweep_and_can_be_resumed(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b")
    assert not folder.is_run
    folder.prepare(SWEEP, resume=False)
    assert folder.is_run
    assert folder.load_sweep() == SWEEP
    assert folder.traces_dir.is_dir()
    folder.prepare(SWEEP, resume=True)


@pytest.mark.parametrize("name", [".", "absent"])
def test_without_a_run_there_is_nothing_to_resume(tmp_path, name):
    with pytest.raises(RunFolderError, match="there is no run in it, so there is nothing to resume"):
        RunFolder(tmp_path / name).prepare(SWEEP, resume=True)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_another_run(tmp_path):
    RunFolder(tmp_path).prepare(SWEEP, resume=False)
    with pytest.raises(RunFolderError, match="holds another run: continue it with --resume"):
        RunFolder(tmp_path).prepare(SWEEP, resume=False)


def test_a_folder_with_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="holds files of something else: name an empty or a new folder"):
        RunFolder(tmp_path).prepare(SWEEP, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_of_a_different_sweep_says_what_differs(tmp_path):
    RunFolder(tmp_path).prepare(SWEEP, resume=False)
    other = Sweep.from_spec({**GRID, "batch_sizes": [1, 2]})
    with pytest.raises(RunFolderError, match=r"a different sweep: batch_size 1, 2 instead of 1\."):
        RunFolder(tmp_path).prepare(other, resume=True)


def test_records_without_a_sweep_cannot_be_resumed(tmp_path):
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(RunFolderError, match=r"holds no run that can be resumed: sweep file .* cannot be read"):
        RunFolder(tmp_path).prepare(SWEEP, resume=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").prepare(SWEEP, resume=False)
    with pytest.raises(RunFolderError, match="cannot be written: File exists"):
        RunFolder(tmp_path / "file").prepare(SWEEP, resume=False)


def test_the_environment_of_every_start_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    segments = [folder.write_environment({"started_at": number, "host": f"h{number}"}) for number in range(3)]
    kept = json.loads((tmp_path / "environment.json").read_text())
    assert len({segment.run_id for segment in segments} | {kept.pop("run_id")}) == 1
    assert [(segment.number, segment.host) for segment in segments] == [(0, "h0"), (1, "h1"), (2, "h2")]
    for environment in (kept, *kept["resumed"]):
        del environment["host"]
    assert kept == {"started_at": 0, "resumed": [{"started_at": 1}, {"started_at": 2}]}


@pytest.mark.parametrize(
    ("text", "fault"),
    [("{", "is not JSON"), ("[]", "is not the environment of a run"), ('{"resumed": [1]}', "is not the")],
)
def test_a_broken_environment_is_one_sentence_that_keeps_the_id_of_the_run(tmp_path, text, fault):
    """Without the file, records of a resumed run would have another id and stand beside those of its start."""
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(RunFolderError, match=rf"{fault}.*: restore it; only a new run can do without it\.$"):
        RunFolder(tmp_path).write_environment({})


def test_a_failed_write_leaves_no_draft(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFolderError, match="cannot be written: No space left on device"):
        RunFolder(tmp_path).prepare(SWEEP, resume=False)
    assert not list(tmp_path.glob("sweep*"))
    monkeypatch.undo()
    RunFolder(tmp_path).prepare(SWEEP, resume=False)  # the start that failed left nothing in the way


def test_of_two_starts_at_once_the_second_changes_nothing(tmp_path, monkeypatch):
    other = Sweep.from_spec({**GRID, "batch_sizes": [2]})

    def late(path, text):
        monkeypatch.undo()
        RunFolder(tmp_path).prepare(other, resume=False)
        write_new(path, text)

    monkeypatch.setattr("rlhfbench.runs.folder.write_new", late)
    with pytest.raises(RunFolderError, match="holds another run: continue it with --resume"):
        RunFolder(tmp_path).prepare(SWEEP, resume=False)
    assert RunFolder(tmp_path).load_sweep() == other
