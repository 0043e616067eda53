"""Folders that cannot be written, are in use, or vanish in mid-run."""

import shutil

import pytest

from rlhfbench.errors import RecordsError, RunFolderError, SweepError
from rlhfbench.records.file import RecordsFile

pytestmark = pytest.mark.usefixtures("fake_server")


def test_a_full_disk_ends_the_run_and_it_is_resumed(tmp_path, monkeypatch, sweep_of, run):
    sweep = sweep_of("ok", "chatter")
    whole = RecordsFile.append

    def full(self, record):
        if self.records:
            raise RecordsError("records file cannot be written: No space left on device.")
        whole(self, record)

    monkeypatch.setattr(RecordsFile, "append", full)
    with pytest.raises(RecordsError):
        run(sweep, tmp_path / "run")
    monkeypatch.setattr(RecordsFile, "append", whole)
    assert run(sweep, tmp_path / "run", resume=True).num_ok == 2


def test_nothing_is_written_where_the_sweep_cannot_be_run(tmp_path, sweep_of, run):
    with pytest.raises(SweepError, match="too long"):
        run(sweep_of("ok", prompt_len=5000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use(tmp_path, sweep_of, run):
    sweep = sweep_of("ok")
    run(sweep, tmp_path / "run")
    with RecordsFile(tmp_path / "run"), pytest.raises(RunFolderError, match="in use"):
        run(sweep, tmp_path / "run", resume=True)


def test_a_folder_that_is_removed_in_mid_run_is_one_sentence(tmp_path, sweep_of, run, watching):
    class Removing(watching):
        def finish_case(self, case, record):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunFolderError, match="cannot be used any more: No such file or directory"):
        run(sweep_of("ok", "chatter"), tmp_path / "run", Removing())


def test_a_folder_that_is_removed_during_the_last_case_is_one_sentence(tmp_path, sweep_of, run, watching):
    class Removing(watching):
        def doing(self, what):
            super().doing(what)
            if self.told.count("score") == 2:
                shutil.rmtree(tmp_path / "run")

    with pytest.raises(RunFolderError, match="cannot be used any more: No such file or directory"):
        run(sweep_of("ok", "chatter"), tmp_path / "run", Removing())


def test_records_that_are_removed_during_the_last_case_are_one_sentence(tmp_path, sweep_of, run, watching):
    """The file stays open: without a check, records would go into a file that nobody can read."""

    class Removing(watching):
        def doing(self, what):
            (tmp_path / "run" / "records.jsonl").unlink(missing_ok=True)

    with pytest.raises(RecordsError, match="cannot be written: it was removed"):
        run(sweep_of("ok"), tmp_path / "run", Removing())


def test_a_closed_stream_of_progress_ends_no_run(tmp_path, sweep_of, run, watching):
    progress = watching()
    progress._stream.close()
    assert run(sweep_of("ok", "chatter"), tmp_path / "run", progress).num_ok == 2


def test_a_file_system_without_locks_is_one_sentence(tmp_path, monkeypatch, sweep_of, run):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(RunFolderError, match="cannot be locked or read: Operation not supported"):
        run(sweep_of("ok"), tmp_path / "run")
