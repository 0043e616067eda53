from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfkernels import CaseError
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.ops.native import build

# Adds a line to the file beside it at every call, and writes an empty output.
COUNTING = """#!/bin/sh
echo called >> "$0.calls"
while [ "$1" != "-o" ]; do shift; done
cp /dev/null "$2"
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Starts with an empty cache folder and nothing cached in memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    before = build.library, build.unavailable_reason
    for name, function in zip(("library", "unavailable_reason"), before, strict=True):
        monkeypatch.setattr(build, name, build.functools.cache(function.__wrapped__))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Sets ``CC`` to a shell script."""

    def make(text: str) -> Path:
        script = tmp_path / "my cc"
        script.write_text(text)
        script.chmod(0o755)
        monkeypatch.setenv("CC", f"'{script}'")
        return script

    return make


def num_calls(script: Path) -> int:
    calls = script.with_name(script.name + ".calls")
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def only_file(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def failure() -> str:
    """Returns why the library is unavailable; checks that ``auto`` falls back to torch and ``native`` reports it."""
    reason = build.unavailable_reason()
    assert reason is not None
    assert "\n" not in reason
    assert select_backend("auto", "cpu", "float32") == "torch"
    with pytest.raises(CaseError) as caught:
        select_backend("native", "cpu", "float32")
    assert caught.value.problems == (f"engine.backend is 'native': its C cannot be compiled here ({reason}).",)
    return reason


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert failure() == "no cc, gcc, clang is installed"


def test_a_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent -m64")
    assert failure() == "CC is '/nonexistent', not a command"


def test_a_compiler_in_unbalanced_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "gcc '-O2")
    assert failure() == 'CC is "gcc \'-O2", which cannot be split into words: No closing quotation'


def test_a_compiler_that_fails(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler("#!/bin/sh\necho 'In file included' >&2\necho 'x.c:1:2: error: no such flag' >&2\nexit 1\n")
    assert failure() == "the C compiler failed: x.c:1:2: error: no such flag"
    assert not any((tmp_path / "cache" / "rlhfbench").iterdir())


def test_a_compiler_that_fails_silently(compiler: Callable[[str], Path]) -> None:
    compiler("#!/bin/sh\nexit 7\n")
    assert failure() == "the C compiler failed: exit 7"


def test_a_compiler_that_cannot_be_executed(compiler: Callable[[str], Path]) -> None:
    compiler("\x7fELF")
    assert failure().startswith("the C compiler could not be run: ")


def test_a_compiler_that_writes_no_library(compiler: Callable[[str], Path]) -> None:
    compiler(COUNTING)
    assert failure().startswith("the compiled library cannot be loaded: ")


def test_torch_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: "7f00-7f01 r-xp 0 0:0 1 /usr/lib/libc.so.6\n")
    assert failure() == "torch has loaded no OpenMP library that can be shared"


def test_a_compiled_library_is_reused(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    script = compiler(COUNTING)
    assert build.library_path() == build.library_path() == only_file(tmp_path / "cache" / "rlhfbench")
    assert num_calls(script) == 1
    # Also by another process, without torch.
    code = (
        "import sys; from rlhfkernels.ops.native.build import library_path; print(library_path()); "
        "sys.exit('torch' in sys.modules)"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == str(build.library_path())
    assert num_calls(script) == 1


@pytest.mark.parametrize("changed", ["flags", "source", "header", "compiler", "arguments", "cpu"])
def test_the_file_name_changes_with_all_inputs_of_the_compilation(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    script = compiler(COUNTING)
    sources = tmp_path / "sources"
    shutil.copytree(build._SOURCES, sources)
    monkeypatch.setattr(build, "_SOURCES", sources)
    before = build.library_path()
    if changed == "flags":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    elif changed in ("source", "header"):
        with (sources / {"source": "norm.c", "header": "program.h"}[changed]).open("a") as file:
            file.write("\n")
    elif changed == "compiler":
        script.write_text(COUNTING + "# another\n")
    elif changed == "arguments":
        monkeypatch.setenv("CC", f"'{script}' -m64")
    else:
        monkeypatch.setattr(build, "_cpu", lambda: "another")
    assert build.library_path() != before
    assert num_calls(script) == 2


def test_a_cache_folder_that_is_not_writable(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = compiler(COUNTING)
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    path = build.library_path()
    assert path.is_relative_to(tmp_path / "temporary")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert build.library_path() == path
    assert num_calls(script) == 1
    # A folder that others can write to is refused.
    path.parent.chmod(0o777)
    assert failure() == f"other users can write to {path.parent}: chmod go-w it"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_others_can_write_is_not_loaded(compiler: Callable[[str], Path], kind: str, mode: int) -> None:
    script = compiler(COUNTING)
    path = build.library_path()
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o700, 0o700)
    open_to_all = path if kind == "file" else path.parent
    open_to_all.chmod(mode)
    assert failure() == f"other users can write to {open_to_all}: chmod go-w it"
    assert num_calls(script) == 1
    open_to_all.chmod(0o755)  # others may read
    assert build.library_path() == path


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_belongs_to_another_user_is_not_loaded(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    compiler(COUNTING)
    path = build.library_path()
    theirs = path if kind == "file" else path.parent
    whole = Path.lstat

    class Stat:
        def __init__(self, found: os.stat_result) -> None:
            self.st_mode, self.st_uid = found.st_mode, found.st_uid + 1

    monkeypatch.setattr(Path, "lstat", lambda self: Stat(whole(self)) if self == theirs else whole(self))
    assert failure() == f"{theirs} belongs to another user"


def test_a_link_in_place_of_the_library_is_not_followed(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler(COUNTING)
    path = build.library_path()
    path.rename(tmp_path / "theirs.so")
    path.symlink_to(tmp_path / "theirs.so")
    assert failure() == f"{path} is in the way: move it elsewhere"


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_library_is_built_again(compiler: Callable[[str], Path], damage: str) -> None:
    script = compiler("#!/bin/sh\n" + COUNTING.partition("\n")[2].replace("cp /dev/null", 'cp "$0"'))
    path = build.library_path()
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-9], "changed": b"x" + whole[1:], "empty": b""}[damage])
    assert build.library_path() == path
    assert path.read_bytes() == whole
    assert num_calls(script) == 2


def test_a_library_that_cannot_be_loaded_is_built_again(library: object) -> None:
    path = build.library_path()
    path.write_bytes(hashlib.sha256(b"").digest())  # whole, and no library
    assert build.unavailable_reason() is None
    assert path.stat().st_size > 1000


def test_a_user_without_a_home(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    compiler(COUNTING)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", no_home)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert build.library_path().is_relative_to(tmp_path)


def test_a_full_disk_is_reported(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    compiler(COUNTING)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    assert failure() == "the compiled library cannot be stored: [Errno 28] No space left on device"


def test_a_working_compiler_makes_native_available(library: object) -> None:
    """Compiles with the real compiler into the empty cache."""
    assert build.unavailable_reason() is None
    assert select_backend("auto", "cpu", "float32") == select_backend("native", "cpu", "float32") == "native"
