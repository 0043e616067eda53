"""Revisions of a repository, and what is left behind."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhfbench.errors import GateError
from rlhfbench.gate import sides
from rlhfbench.gate.sides import Side


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository with two commits, of which the first has ``src/mine.py`` with VALUE = 1, the second 2."""
    root = tmp_path / "repo"
    (root / "src").mkdir(parents=True)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "a@b")
    sides.git("init", "-q", folder=root)
    for value in (1, 2):
        (root / "src" / "mine.py").write_text(f"VALUE = {value}\n")
        sides.git("add", "-A", folder=root)
        sides.git("commit", "-q", "-m", f"value {value}", folder=root)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(root)
    return root


def value_of(side: Side) -> str:
    """Output of a process that looks for modules in the side's paths, and imports ``mine``."""
    code = "import mine; print(mine.VALUE)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(side.paths)}
    return subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True).stdout


def test_a_revision_is_checked_out_beside_the_working_tree_and_removed(repo):
    with sides.checked_out("HEAD~1", repo, "base", [str(repo / "src")]) as side:
        assert value_of(side) == "1\n"
        folder = Path(side.paths[0])
        assert side.title.startswith("HEAD~1 (")
    assert not folder.exists()
    assert sides.git("worktree", "list", folder=repo).count("\n") == 0
    assert sides.git("status", "--porcelain", folder=repo) == ""


def test_a_killed_gate_leaves_no_folder(repo):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from rlhfbench.gate import sides\n"
        "with sides.temporary_folder() as folder:\n"
        "    (folder / 'x').write_text('')\n"
        "    print(folder, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    bench = str(Path(sides.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, bench], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    folder = Path(process.stdout.readline().strip())
    assert folder.is_dir()
    # The cleaner is the only other process that has the folder's name: wait for its end, whenever that is.
    # Its command line appears a moment after the process has begun.
    cleaners: list[int] = []
    while not cleaners and process.poll() is None:
        cleaners = [
            int(entry.name) for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and int(entry.name) != process.pid and str(folder).encode() in _command(entry)
        ]  # fmt: skip
    (cleaner,) = cleaners
    watched = os.pidfd_open(cleaner)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    import select

    assert select.select([watched], [], [], 30)[0]
    os.close(watched)
    assert not folder.exists()


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_revision_has_the_files_that_releases_leave_out(repo):
    (repo / ".gitattributes").write_text("mine.py export-ignore\n")
    sides.git("add", "-A", folder=repo)
    sides.git("commit", "-q", "-m", "attributes", folder=repo)
    with sides.checked_out("HEAD", repo, "base", [str(repo / "src")]) as side:
        assert value_of(side) == "2\n"
    assert sides.git("status", "--porcelain", folder=repo) == ""


@pytest.mark.parametrize(
    ("revision", "roots", "says"),
    [
        ("nonsense", ["src"], "revision 'nonsense' is not a commit of"),
        ("--help", ["src"], "begins with a dash"),
        ("HEAD", ["other"], "revision 'HEAD' lacks '.*other', which modules are imported from"),
        ("HEAD", ["src", "other"], "revision 'HEAD' lacks '.*other', which modules are imported from"),
    ],
)
def test_a_revision_that_cannot_be_compared_is_one_sentence(repo, revision, roots, says):
    with (
        pytest.raises(GateError, match=says),
        sides.checked_out(revision, repo, "base", [str(repo / root) for root in roots]),
    ):
        pass
    assert list((repo.parent / "temporary").iterdir()) == []


def test_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(GateError, match=r"lies in no git repository that can be compared: .* not a git repository"):
        sides.repository()


def test_a_repository_that_git_refuses_is_told_in_its_words(repo, monkeypatch, tmp_path):
    """As in a container where somebody else owns the checkout: advice on several lines follows what is wrong."""
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(
        "#!/bin/sh\nprintf 'fatal: detected dubious ownership\\n\\n\\tgit config --global\\n' >&2\nexit 128\n"
    )
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent))
    with pytest.raises(GateError, match=r"compared: git rev-parse failed: detected dubious ownership$"):
        sides.repository()
    git.unlink()
    with pytest.raises(GateError, match="and is not installed"):
        sides.repository()


def test_a_repository_without_commits(repo, tmp_path):
    sides.git("init", "-q", str(tmp_path / "empty"))
    with pytest.raises(GateError, match="revision 'HEAD' is not a commit"):
        sides.head_side(tmp_path / "empty", [])


def test_a_dirty_tree_is_said_to_be_compared(repo, monkeypatch):
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # the bytecode of the step is no change
    sides.head_side(repo, [str(repo / "src")], step="mine:make")
    assert (repo / "src" / "__pycache__").is_dir()
    assert sides.sameness("HEAD", repo)
    clean = sides.head_side(repo, [str(repo / "src")], step="mine:make")
    (repo / "new.txt").write_text("")
    dirty = sides.head_side(repo, [str(repo)], step="bench_step:make")
    assert clean.title.startswith("the working tree at ")
    assert "uncommitted" not in clean.title
    assert dirty.title.endswith("with uncommitted changes in 1 file")
    assert value_of(clean) == "2\n"  # from the working tree, wherever else the module is installed


def test_folders_that_modules_come_from(repo, monkeypatch):
    # A command of an environment in the repository has the folder of commands on its path.
    monkeypatch.setattr(sys, "prefix", str(repo / "venv"))
    inside = [str(repo / "src"), str(repo / "venv" / "bin"), str(repo / "other" / "site-packages"), "/usr/lib"]
    monkeypatch.setattr(sys, "path", inside)
    assert sides.module_roots(repo, with_working_folder=True) == [str(repo), str(repo / "src")]
    for measured in ("mine", "no_such_module"):  # of one that cannot be imported, its cases tell why
        monkeypatch.setattr(sides, "_MEASURED", measured)
        assert sides.module_roots(repo, with_working_folder=False) == [str(repo / "src")]
    monkeypatch.setattr(sides, "_MEASURED", "json")  # both sides would run the same code
    with pytest.raises(GateError, match=r"nothing is imported from .*, or name a step with --step"):
        sides.module_roots(repo, with_working_folder=False)
    (repo / "src" / "rlhfbench").mkdir()
    (repo / "src" / "rlhfbench" / "__init__.py").write_text("")
    assert sides.module_roots(repo, with_working_folder=False) == [str(repo / "src")]
    monkeypatch.setattr(sys, "path", inside[1:])
    with pytest.raises(GateError, match="nothing is imported from"):
        sides.module_roots(repo, with_working_folder=False)


def test_an_environment_in_the_root_hides_no_modules(repo, monkeypatch):
    """As ``python -m venv .`` makes one."""
    monkeypatch.setattr(sys, "prefix", str(repo))
    packages = repo / "lib" / "python3.12" / "site-packages"
    monkeypatch.setattr(sys, "path", [str(repo / "bin"), str(packages), str(repo / "src")])
    assert sides.module_roots(repo, with_working_folder=True) == [str(repo), str(repo / "src")]


def test_a_folder_that_pythons_search_path_cannot_hold_is_one_sentence(repo, monkeypatch):
    folder = repo / "a:b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(GateError, match=r"/a:b' has ':' in its name, which divides Python's search path: rename it\.$"):
        sides.module_roots(repo, with_working_folder=True)


def test_a_repository_below_the_environment_has_modules(repo, monkeypatch):
    """As one in ``/usr/src`` has, beside the system's Python."""
    monkeypatch.setattr(sys, "prefix", str(repo.parent))
    monkeypatch.setattr(sys, "path", [str(repo / "src")])
    assert sides.module_roots(repo, with_working_folder=True) == [str(repo), str(repo / "src")]


def test_a_python_in_the_repository_is_none_of_its_modules(repo, monkeypatch):
    """The standard library of an environment that was made with it lies in the repository, outside ``sys.prefix``."""
    monkeypatch.setattr(sys, "base_prefix", str(repo / "python"))
    monkeypatch.setattr(sys, "path", [str(repo / "python" / "lib"), str(repo / "src")])
    assert sides.module_roots(repo, with_working_folder=True) == [str(repo), str(repo / "src")]


def test_the_cleaner_tries_again_where_a_case_still_writes(monkeypatch, tmp_path):
    folder, tries = tmp_path / "folder", []
    folder.mkdir()

    def removes_at_the_third_try(path, ignore_errors):
        tries.append(ignore_errors)
        if len(tries) == 3:
            Path(path).rmdir()

    monkeypatch.setattr(shutil, "rmtree", removes_at_the_third_try)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["-c", str(folder)])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    exec(sides._CLEANER)
    assert tries == [True] * 3


def test_a_temporary_folder_without_locks_is_one_sentence(repo, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    sentence = r"\.lock' cannot be locked: No locks available\. Set TMPDIR to a folder on a disk of this machine\."
    with pytest.raises(GateError, match=sentence), sides.only_gate():
        pass


def test_a_second_gate_is_refused(repo):
    with sides.only_gate(), pytest.raises(GateError, match="another gate of yours runs"), sides.only_gate():
        pass
    with sides.only_gate():
        pass


def test_a_step_that_imports_another_copy_of_the_repository_is_refused(repo, monkeypatch, tmp_path):
    (repo / "bench_step.py").write_text("import mine\n")
    sides.git("add", "-A", folder=repo)
    installed = tmp_path / "installed"
    installed.mkdir()
    (installed / "mine.py").write_text("VALUE = 1\n")
    monkeypatch.setenv("PYTHONPATH", str(installed))
    with pytest.raises(GateError, match=r"imports 'mine' from '.*installed.mine.py' and not from the repository"):
        sides.head_side(repo, [str(repo)], step="bench_step:make")
    monkeypatch.setenv("PYTHONPATH", str(repo / "src"))
    assert sides.head_side(repo, [str(repo)], step="bench_step:make").paths == (str(repo),)


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("src/acme/trainer/__init__.py", "acme.trainer"),  # in a package without __init__.py
        ("packages/trainer/src/trainer/core.py", "trainer.core"),  # of a project in a folder
        ("packages/trainer/flat.py", "flat"),
        ("src/caf\u00e9.py", "caf\u00e9"),
    ],
)
def test_a_step_that_imports_an_installed_copy_from_wherever_it_lies_is_refused(
    repo, monkeypatch, tmp_path, file, module
):
    installed = tmp_path / "installed" / f"{module.replace('.', '/')}{'/__init__' * file.endswith('__init__.py')}.py"
    for path in (repo / file, installed):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (repo / "packages" / "trainer").mkdir(parents=True, exist_ok=True)
    (repo / "packages" / "trainer" / "pyproject.toml").write_text("")
    (repo / "bench_step.py").write_text(f"import {module}\n")
    sides.git("add", "-A", folder=repo)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "installed"))
    with pytest.raises(GateError, match=rf"imports '{module}' from '.*/installed/.*' and not from the repository"):
        sides.head_side(repo, [str(repo)], step="bench_step:make")


def test_a_file_elsewhere_in_the_repository_is_no_module_of_its_projects(repo, monkeypatch, tmp_path):
    """Such as a script that has the name of an installed module."""
    (repo / "scripts").mkdir()
    (repo / "scripts" / "helpful.py").write_text("")
    (tmp_path / "helpful.py").write_text("")
    (repo / "bench_step.py").write_text("import helpful\n")
    sides.git("add", "-A", folder=repo)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert sides.head_side(repo, [str(repo)], step="bench_step:make").name == "head"


def test_a_revision_whose_step_imports_the_working_tree_is_refused(repo, monkeypatch):
    """The module lies in a folder that Python looks into by itself, and the revision in a folder of its own."""
    (repo / "bench").mkdir()
    (repo / "bench" / "bench_step.py").write_text("import mine\n")
    sides.git("add", "-A", folder=repo)
    sides.git("commit", "-q", "-m", "step", folder=repo)
    monkeypatch.setenv("PYTHONPATH", str(repo / "src"))
    with (
        pytest.raises(GateError, match=r"imports 'mine' from '.*repo/src/mine.py' and not from .* 'HEAD', so both"),
        sides.checked_out("HEAD", repo, "base", [str(repo / "bench")], step="bench_step:make"),
    ):
        pass
    roots = [str(repo / "bench"), str(repo / "src")]
    with sides.checked_out("HEAD", repo, "base", roots, step="bench_step:make") as side:
        assert value_of(side) == "2\n"


FOR_EVER = "import threading; wait = threading.Event().wait"


@pytest.mark.parametrize(
    "content",
    [
        "import atexit; atexit.register(print, 'bye')",
        "import sys; sys.exit()",
        "1 / 0",
        f"{FOR_EVER}; threading.Thread(target=wait).start()",
    ],
)
def test_a_step_may_print_and_end_as_it_likes(repo, content):
    (repo / "bench_step.py").write_text(content + "\n")
    assert sides.head_side(repo, [str(repo)], step="bench_step:make").name == "head"


def test_a_step_whose_import_never_ends_is_left_to_its_first_case(repo, monkeypatch):
    monkeypatch.setattr(sides, "_IMPORT_TIMEOUT_S", 0.5)
    (repo / "bench_step.py").write_text(f"{FOR_EVER}; wait()\n")
    assert sides.head_side(repo, [str(repo)], step="bench_step:make").name == "head"


def test_a_step_that_imports_nothing_of_the_repository_is_refused(repo):
    """Both sides would run the installed copy, and nothing could change."""
    sentence = r"step 'json:loads' imports no file of {}, so both sides would run the same code: import the project at"
    with pytest.raises(GateError, match=sentence.format("the repository")):
        sides.head_side(repo, [str(repo / "src")], step="json:loads")
    with (
        pytest.raises(GateError, match=sentence.format("revision 'HEAD'")),
        sides.checked_out("HEAD", repo, "base", [str(repo / "src")], step="json:loads"),
    ):
        pass


def test_a_commit_that_a_shallow_clone_lacks(repo, tmp_path):
    sides.git("clone", "-q", "--depth", "1", f"file://{repo}", str(tmp_path / "clone"), folder=tmp_path)
    with pytest.raises(GateError, match=r"'HEAD~1' is not a commit of '.*clone', whose history is cut off: fetch"):
        sides.commit_of("HEAD~1", tmp_path / "clone")
    with pytest.raises(GateError, match=r"not a commit of '.*repo'\.$"):
        sides.commit_of("HEAD~2", repo)


def test_whether_there_is_a_change_to_judge(repo):
    assert sides.sameness("HEAD", repo) == "Base and head are the same commit: there was no change to judge."
    assert sides.sameness("HEAD~1", repo) == ""
    (repo / "src" / "mine.py").write_text("VALUE = 3\n")
    assert sides.sameness("HEAD", repo) == ""


def test_a_folder_for_sockets_has_a_short_path(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with sides.temporary_folder(for_sockets=True) as folder:
        assert len(str(folder)) < 60
    with sides.temporary_folder() as folder:
        assert folder.parent == long


def test_a_working_tree_that_is_edited_meanwhile_is_refused(repo):
    """Servers start anew while a gate runs, and import what the files hold then."""
    roots, module = [str(repo / "src")], repo / "src" / "mine.py"
    with sides.unedited(repo, roots):
        (repo / "outside.py").write_text("")
        (repo / "src" / "table.md").write_text("what the gate itself may write")
    with (
        pytest.raises(GateError, match=r"^'src/mine\.py' was edited while the gate ran"),
        sides.unedited(repo, roots),
    ):
        os.utime(module, ns=(0, 0))
    with pytest.raises(GateError, match=r"'src/mine\.py' was edited"), sides.unedited(repo, roots):
        module.unlink()
    kernel = repo / "src" / "kernel.c"  # compiled by the case that needs it
    kernel.write_text("")
    with pytest.raises(GateError, match=r"'src/kernel\.c' was edited"), sides.unedited(repo, roots):
        os.utime(kernel, ns=(0, 0))


def test_what_a_steps_module_starts_ends_with_the_check(repo, is_gone):
    started = repo.parent / "pid"
    (repo / "bench_step.py").write_text(
        "import pathlib, subprocess\n"
        f"pathlib.Path({str(started)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid))\n"
    )
    sides.head_side(repo, [str(repo)], step="bench_step:make")
    assert is_gone(int(started.read_text()))


@pytest.mark.parametrize("file", ["new_step.py", "packages/parts/deep.py"])
def test_a_revision_whose_step_imports_a_file_that_it_lacks_from_the_working_tree_is_refused(repo, monkeypatch, file):
    """A new file, or one in a package without ``__init__.py``: git knows no module by its name."""
    (repo / file).parent.mkdir(parents=True, exist_ok=True)
    (repo / file).write_text("")
    module = file.removesuffix(".py").removeprefix("packages/").replace("/", ".")
    (repo / "src" / "step.py").write_text(f"import {module}\n")
    sides.git("add", "src", folder=repo)
    sides.git("commit", "-q", "-m", "step", folder=repo)
    monkeypatch.setenv("PYTHONPATH", str((repo / file).parents[0 if file == "new_step.py" else 1]))
    with (
        pytest.raises(GateError, match=r"imports '.*' from '.*' and not from revision 'HEAD', which lacks this file"),
        sides.checked_out("HEAD", repo, "base", [str(repo / "src")], step="step:make"),
    ):
        pass


def test_a_folder_with_the_name_of_this_package_is_not_the_package(repo):
    (repo / "rlhfbench").mkdir()
    side = sides.Side(name="base", title="", paths=(str(repo),))
    assert (side.takes_turns, side.obstacle) == (True, None)
    (repo / "rlhfbench" / "__init__.py").write_text("")
    assert not side.takes_turns
    assert side.obstacle is not None


def test_names_that_are_no_utf_8_are_no_error(repo):
    name = os.fsdecode(b"caf\xe9.py")
    (repo / "src" / name).write_text("")
    with sides.unedited(repo, [str(repo / "src")]):
        pass
    assert sides.git("ls-files", "-z", "--others", folder=repo).rstrip("\0") == f"src/{name}"
