"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Literal

from rlhfbench.errors import RunFolderError


def check_writable(field: str, folder: Path) -> None:
    """Checks that ``folder`` can be written, before work whose results go there. It may not exist yet.

    Raises:
        RunFolderError: it, or the folder that it would be made in, is no folder or cannot be written.
    """
    try:
        # Of a path below a file, the parts below are absent and the file is found.
        place = next(path for path in (folder, *folder.absolute().parents) if _is_present(path))
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RunFolderError(f"{field} '{folder}' cannot be written: {error.strerror}.") from error


def _is_present(path: Path) -> bool:
    """True for a file, a folder and a link; an error where a name is too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_atomically(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` through a temporary file: a killed writer leaves the old content or the new."""
    draft = path.with_name(path.name + ".tmp")
    try:
        _write(draft, text, "w")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_new(path: Path, text: str) -> None:
    """Writes ``text`` to a new file: of several writers one succeeds. A write that fails leaves no file.

    Raises:
        FileExistsError: there is a file of that name.
    """
    try:
        _write(path, text, "x")
    except FileExistsError:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write(path: Path, text: str, mode: Literal["w", "x"]) -> None:
    """Writes a file, and returns when the disk has it."""
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
