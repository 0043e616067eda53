"""Compiles the C files of this folder for this machine's processor, once, and loads what came out."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
_TIMEOUT_S = 120


class BuildError(Exception):
    """There is no library, and one sentence says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled ops.

    Raises:
        BuildError: no compiler, no OpenMP library that torch uses too, or something the compiler says.
    """
    openmp = _openmp_of_torch()
    path = compiled()
    try:
        # Its own pool of threads would wait on torch's, and torch's on it.
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"what was compiled cannot be loaded: {error}") from None


def compiled() -> Path:
    """The library's file, made if it is not there; without torch.

    Raises:
        BuildError: no compiler, something the compiler says, or no place for the file.
    """
    compiler = _compiler()
    try:
        path = _cache() / f"{_key(compiler)}.so"
        if not path.exists():
            _compile(compiler, path)
    except OSError as error:
        raise BuildError(f"what is compiled cannot be kept: {error}") from None
    return path


@functools.cache
def why_not() -> str | None:
    """Why there is no library on this machine, in one line; ``None`` where there is one."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def _openmp_of_torch() -> str:
    """The OpenMP library that is loaded in this process."""
    import torch  # noqa: F401  (loads it)

    maps = Path("/proc/self/maps")
    paths = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    for path in paths:
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise BuildError("torch has no OpenMP library loaded that could be shared")


def _compiler() -> list[str]:
    """The command, with the arguments that ``CC`` may give it."""
    asked = shlex.split(os.environ.get("CC", ""))
    names = asked[:1] or _COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise BuildError(f"CC is {asked[0]!r}, which is no command" if asked else f"no {', '.join(names)} is installed")
    return [found, *asked[1:]]


def _key(compiler: list[str]) -> str:
    """Changes with the sources, the compiler, its flags and the processor."""
    parts = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]"))]
    file = Path(compiler[0]).resolve()
    parts += [repr((str(file), file.stat().st_mtime_ns, compiler[1:], _FLAGS)).encode(), _processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` goes by."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kept = {line for line in lines if line.startswith(("model", "vendor", "flags", "Features", "CPU "))}
    return "\n".join([platform.machine(), *sorted(kept)])


def _cache() -> Path:
    """Where libraries are kept, by user; a folder of the user's among temporary files where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhfbench"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a user without a home is a RuntimeError
        pass
    return _temporary_folder()


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rlhfbench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    # What lies here is loaded: nobody else may have put it here.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise BuildError(f"{folder} is not this user's alone")
    return folder


def _compile(compiler: list[str], path: Path) -> None:
    """Processes that compile at the same time each write a file of their own; the last one moved into place stays."""
    sources = [str(source) for source in sorted(_SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *_FLAGS, "-o", str(made), *sources, "-lm"]
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"the C compiler could not be run: {error}") from None
        if ended.returncode:
            said = next((line for line in ended.stderr.splitlines() if "error" in line), f"exit {ended.returncode}")
            raise BuildError(f"the C compiler failed: {said}")
        made.replace(path)
