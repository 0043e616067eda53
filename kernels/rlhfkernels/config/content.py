"""The content of data files, which the id of a case depends on."""

from __future__ import annotations

import functools
import hashlib
import stat
from pathlib import Path


def content_hash(path: str) -> str | None:
    """The SHA-256 of a file's bytes in hexadecimal; ``None`` if it is no regular file, or cannot be read."""
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would empty it
            return None
        return _hash(Path(path).absolute(), found.st_mtime_ns, found.st_size)
    except (OSError, ValueError):  # ValueError: a null character in the path
        return None


@functools.lru_cache(maxsize=1024)
def _hash(path: Path, mtime_ns: int, size: int) -> str:
    """The SHA-256 of a file. The arguments are the key of the cache: a file that changes is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
