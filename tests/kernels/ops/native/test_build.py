from __future__ import annotations

import dataclasses
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfkernels import Case, CaseError, Options
from rlhfkernels.ops.forms import kernels_of
from rlhfkernels.ops.native import build

AUTO = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=4)
NATIVE = dataclasses.replace(AUTO, options=Options.of({"engine.backend": "native"}))

# Leaves a line for every call in the file beside it, and what it was asked to make.
COUNTING = """#!/bin/sh
echo called >> "$0.calls"
while [ "$1" != "-o" ]; do shift; done
cp /dev/null "$2"
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, and nothing remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    before = build.library, build.why_not
    for name, whole in zip(("library", "why_not"), before, strict=True):
        monkeypatch.setattr(build, name, build.functools.cache(whole.__wrapped__))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """Has ``CC`` be a shell script."""

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


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


def told() -> str:
    """Why there is no library, and that ``auto`` does without it while ``native`` says so."""
    failure = build.why_not()
    assert failure is not None
    assert "\n" not in failure
    assert kernels_of(AUTO) == "torch"
    with pytest.raises(CaseError) as caught:
        kernels_of(NATIVE)
    assert caught.value.problems == (f"engine.backend is 'native': its C cannot be compiled here ({failure}).",)
    return failure


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert told() == "no cc, gcc, clang is installed"


def test_a_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nonexistent -m64")
    assert told() == "CC is '/nonexistent', which is no command"


def test_a_compiler_that_fails(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    compiler("#!/bin/sh\necho 'In file included' >&2\necho 'x.c:1:2: error: no such flag' >&2\nexit 1\n")
    assert told() == "the C compiler failed: x.c:1:2: error: no such flag"
    assert not any((tmp_path / "cache" / "rlhfbench").iterdir())


def test_a_compiler_that_says_nothing(compiler: Callable[[str], Path]) -> None:
    compiler("#!/bin/sh\nexit 7\n")
    assert told() == "the C compiler failed: exit 7"


def test_a_compiler_that_is_none(compiler: Callable[[str], Path]) -> None:
    compiler("\x7fELF")
    assert told().startswith("the C compiler could not be run: ")


def test_what_a_compiler_makes_may_be_no_library(compiler: Callable[[str], Path]) -> None:
    compiler(COUNTING)
    assert told().startswith("what was compiled cannot be loaded: ")


def test_torch_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, *_, **__: "7f00-7f01 r-xp 0 0:0 1 /usr/lib/libc.so.6\n")
    assert told() == "torch has no OpenMP library loaded that could be shared"


def test_what_was_compiled_is_found_again(compiler: Callable[[str], Path], tmp_path: Path) -> None:
    script = compiler(COUNTING)
    assert build.compiled() == build.compiled() == only(tmp_path / "cache" / "rlhfbench")
    assert num_calls(script) == 1
    # By another process too, which needs no torch for it.
    code = (
        "import sys; from rlhfkernels.ops.native.build import compiled; print(compiled()); "
        "sys.exit('torch' in sys.modules)"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == str(build.compiled())
    assert num_calls(script) == 1


@pytest.mark.parametrize("changed", ["flags", "source", "header", "compiler", "arguments", "processor"])
def test_what_the_library_depends_on_is_in_its_name(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    script = compiler(COUNTING)
    sources = tmp_path / "sources"
    shutil.copytree(build._SOURCES, sources)
    monkeypatch.setattr(build, "_SOURCES", sources)
    before = build.compiled()
    if changed == "flags":
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g"))
    elif changed in ("source", "header"):
        with (sources / {"source": "norm.c", "header": "tape.h"}[changed]).open("a") as file:
            file.write("\n")
    elif changed == "compiler":
        script.write_text(COUNTING + "# another\n")
    elif changed == "arguments":
        monkeypatch.setenv("CC", f"'{script}' -m64")
    else:
        monkeypatch.setattr(build, "_processor", lambda: "another")
    assert build.compiled() != before
    assert num_calls(script) == 2


def test_a_cache_that_cannot_be_written(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = compiler(COUNTING)
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "temporary"))
    made = build.compiled()
    assert made.is_relative_to(tmp_path / "temporary")
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert build.compiled() == made
    assert num_calls(script) == 1
    # Where others could have put something, nothing is loaded.
    made.parent.chmod(0o777)
    assert told() == f"{made.parent} is not this user's alone"


def test_a_user_without_a_home(
    compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    compiler(COUNTING)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", no_home)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert build.compiled().is_relative_to(tmp_path)


def test_a_full_disk_is_a_sentence(compiler: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    compiler(COUNTING)
    monkeypatch.setattr(build.tempfile, "TemporaryDirectory", full)
    assert told() == "what is compiled cannot be kept: [Errno 28] No space left on device"


def test_with_a_compiler_it_is_taken(library: object) -> None:
    """The real one, into the empty cache."""
    assert build.why_not() is None
    assert kernels_of(AUTO) == kernels_of(NATIVE) == "native"
