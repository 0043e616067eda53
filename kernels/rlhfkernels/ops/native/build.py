"""Compiles the C files of this folder for this machine's CPU, once, and loads the library."""

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
from collections.abc import Callable
from pathlib import Path

_SOURCES = Path(__file__).parent
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
_TIMEOUT_S = 120
_HASH_BYTES = hashlib.sha256().digest_size


class BuildError(Exception):
    """The library cannot be built; the message says why in one sentence."""


@functools.cache
def library() -> ctypes.CDLL:
    """Returns the compiled ops.

    Raises:
        BuildError: no compiler, a compiler error, or no OpenMP library to share with torch.
    """
    openmp = _torch_openmp()
    path = library_path()
    try:
        # A second OpenMP library would have its own thread pool, which competes with torch's.
        ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)
            return ctypes.CDLL(str(library_path()))
    except OSError as error:
        raise BuildError(f"the compiled library cannot be loaded: {error}") from None


def library_path() -> Path:
    """Returns the library's file, compiled if it does not exist yet or is damaged. Does not import torch.

    Raises:
        BuildError: no compiler, a compiler error, no writable folder, or a folder or file that others can write.
    """
    compiler = _compiler()
    try:
        path = cache_folder() / f"{_key(compiler)}.so"
        if path.is_symlink() or path.exists():
            _check_owner(path, stat.S_ISREG)
        if not _is_whole(path):
            _compile(compiler, path)
    except OSError as error:
        raise BuildError(f"the compiled library cannot be stored: {error}") from None
    return path


@functools.cache
def unavailable_reason() -> str | None:
    """Returns why the library cannot be built on this machine, in one line, or ``None`` if it can."""
    try:
        library()
    except BuildError as error:
        return str(error)
    return None


def _torch_openmp() -> str:
    """Returns the OpenMP library that torch has loaded."""
    import torch  # noqa: F401  (loads OpenMP)

    maps = Path("/proc/self/maps")
    paths = [line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()] if maps.exists() else []
    for path in paths:
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise BuildError("torch has loaded no OpenMP library that can be shared")


def _compiler() -> list[str]:
    """Returns the compiler's command, with the arguments in ``CC``."""
    text = os.environ.get("CC", "")
    try:
        requested = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CC is {text!r}, which cannot be split into words: {error}") from error
    names = requested[:1] or _COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        if requested:
            raise BuildError(f"CC is {requested[0]!r}, not a command")
        raise BuildError(f"no {', '.join(names)} is installed")
    return [found, *requested[1:]]


def _key(compiler: list[str]) -> str:
    """Returns a hash of the sources, the compiler, its flags and the CPU."""
    parts = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]"))]
    file = Path(compiler[0]).resolve()
    parts += [repr((str(file), file.stat().st_mtime_ns, compiler[1:], _FLAGS)).encode(), _cpu().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    """Describes the CPU as far as ``-march=native`` depends on it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    kept = {line for line in lines if line.startswith(("model", "vendor", "flags", "Features", "CPU "))}
    return "\n".join([platform.machine(), *sorted(kept)])


def cache_folder() -> Path:
    """Returns the user's cache folder, or a folder of the user in the temporary directory if it is not writable."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhfbench"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return _temporary_folder()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return _temporary_folder()
    _check_owner(folder.resolve(), stat.S_ISDIR)
    return folder


def _temporary_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"rlhfbench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_owner(folder, stat.S_ISDIR)
    return folder


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Checks that ``path`` is of the right kind, and that no other user can write to it: code is loaded from there.

    Raises:
        BuildError: it is something else, belongs to another user, or has a mode that lets others write.
    """
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise BuildError(f"{path} is in the way: move it elsewhere")
    if found.st_uid != os.getuid():
        raise BuildError(f"{path} belongs to another user")
    if found.st_mode & 0o022:
        raise BuildError(f"other users can write to {path}: chmod go-w it")


def _is_whole(path: Path) -> bool:
    """True if the file ends with the hash of the rest: a damaged library can kill the process that loads it."""
    data = path.read_bytes() if path.exists() else b""
    return data[-_HASH_BYTES:] == hashlib.sha256(data[:-_HASH_BYTES]).digest()


def _compile(compiler: list[str], path: Path) -> None:
    """Compiles to a temporary file and moves it into place, so that processes can compile at the same time."""
    sources = [str(source) for source in sorted(_SOURCES.glob("*.c"))]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        command = [*compiler, *_FLAGS, "-o", str(output), *sources, "-lm"]
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"the C compiler could not be run: {error}") from None
        if process.returncode:
            errors = [line for line in process.stderr.splitlines() if "error" in line]
            message = errors[0] if errors else f"exit {process.returncode}"
            raise BuildError(f"the C compiler failed: {message}")
        data = output.read_bytes()
        output.write_bytes(data + hashlib.sha256(data).digest())  # a loader ignores what follows the sections
        output.chmod(0o700)
        output.replace(path)
