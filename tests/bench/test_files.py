"""Checks of folders that results will be written into."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhfbench.errors import RunFolderError
from rlhfbench.files import check_writable, write_atomically, write_new


@pytest.mark.parametrize("name", [".", "new", "new/below"])
def test_a_folder_that_can_be_made_is_writable_and_is_not_made(name: str, tmp_path: Path) -> None:
    check_writable("out", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", "dangling"])
def test_a_file_is_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(RunFolderError, match=rf"^out '{tmp_path / name}' cannot be written: Not a directory\.$"):
        check_writable("out", tmp_path / name)


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The superuser may write everywhere, so the system's answer is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunFolderError, match=r"^--out '.*new' cannot be written: Permission denied\.$"):
        check_writable("--out", tmp_path / "new")


def test_a_new_file_is_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", lambda fd: os.read(-1, 1))  # an OSError
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_new(path, "torn")
    assert not path.exists()
    monkeypatch.undo()
    write_new(path, "first")
    with pytest.raises(FileExistsError):
        write_new(path, "second")
    assert path.read_text() == "first"


def test_a_write_that_fails_leaves_the_old_content_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda fd: os.read(-1, 1))  # an OSError
    with pytest.raises(OSError, match="Bad file descriptor"):
        write_atomically(tmp_path / "file", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
