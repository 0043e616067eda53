"""The two sides of a comparison: the code of a revision, and the processes that run it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhfbench.errors import GateError

# Prints the files of the modules that a step's module loads.
_LOADED_FILES = (
    "import importlib, json, sys; importlib.import_module(sys.argv[1]); "
    "print(json.dumps({n: getattr(m, '__file__', None) for n, m in list(sys.modules.items()) if '.' not in n}))"
)
# The path of a Unix socket has 104 to 108 characters.
_MAX_TEMPORARY_CHARS = 70
# Deletes a folder when its standard input ends: when the gate ends, also by SIGKILL.
_CLEANER = "import shutil, sys; sys.stdin.read(); shutil.rmtree(sys.argv[1], ignore_errors=True)"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: ``base`` or ``head``.
        title: What it is, in words: a revision with its commit, or the working tree.
        paths: Folders that Python's module search finds first. Empty: those of this process.
    """

    name: str
    title: str
    paths: tuple[str, ...] = ()

    @property
    def takes_turns(self) -> bool:
        """False for a revision of this package from before its steps could be timed in turns."""
        own = [Path(path, "rlhfbench") for path in self.paths if Path(path, "rlhfbench").is_dir()]
        return not own or Path(own[0], "measure", "turns.py").is_file()


def git(*arguments: str, folder: Path | None = None) -> str:
    """Returns the output of a git command.

    Raises:
        GateError: git is missing, or the command fails.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except OSError as error:
        raise GateError("git is needed to compare revisions, and is not installed.") from error
    except subprocess.CalledProcessError as error:
        raise GateError(
            f"git {arguments[0]} failed: {(error.stderr.strip() or 'no message.').splitlines()[-1]}"
        ) from error
    return done.stdout.strip()


def repository() -> Path:
    """Returns the root of the repository that the working folder lies in.

    Raises:
        GateError: it lies in none.
    """
    try:
        return Path(git("rev-parse", "--show-toplevel"))
    except GateError as error:
        raise GateError(f"--base needs a git repository, and '{Path.cwd()}' lies in none.") from error


def commit_of(revision: str, root: Path) -> str:
    """Returns the commit that ``revision`` names.

    Raises:
        GateError: there is none.
    """
    if revision.startswith("-"):
        raise GateError(f"revision '{revision}' begins with a dash: it must name a commit.")
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}", folder=root)
    except GateError as error:
        raise GateError(f"revision '{revision}' is no commit of '{root}'.") from error


def head_side(root: Path, *, step: str | None = None) -> Side:
    """Returns the working tree as it is, uncommitted changes included.

    Args:
        root: The repository.
        step: ``module:function`` of the user's own step, which is imported from the working folder too.

    Raises:
        GateError: The step imports a module of the repository from somewhere else.
    """
    commit = git("rev-parse", "--short", "HEAD", folder=root)
    num_changed = len(git("status", "--porcelain", folder=root).splitlines())
    changes = f" with uncommitted changes in {num_changed} files" if num_changed else ""
    paths = (str(Path.cwd()),) if step else ()
    if step:
        _check_imports(step, paths, root)
    return Side(name="head", title=f"the working tree at {commit}{changes}", paths=paths)


def _check_imports(step: str, paths: Sequence[str], root: Path) -> None:
    """Refuses a step that loads a module of the repository from another place: both sides would run that copy."""
    given = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])])}
    command = [sys.executable, "-P", "-c", _LOADED_FILES, step.partition(":")[0]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return  # the record of its first case says why it cannot be imported
    loaded: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    for name in _module_names(root) & loaded.keys():
        file = loaded[name]
        if file is not None and not _is_inside(Path(file), root):
            raise GateError(
                f"step '{step}' imports '{name}' from '{file}' and not from the repository, so both sides would run "
                "that copy: install the project in editable mode."
            )


def _module_names(root: Path) -> set[str]:
    """The modules and packages at the top of a repository, or of its folder ``src``."""
    found = set()
    for line in git("ls-files", "*.py", folder=root).splitlines():
        first, *rest = Path(line).parts if not line.startswith("src/") else Path(line).parts[1:]
        if not rest or rest == ["__init__.py"]:
            found.add(first.removesuffix(".py"))
    return found


@contextlib.contextmanager
def checked_out(revision: str, root: Path, name: str, roots: Sequence[str]) -> Iterator[Side]:
    """Yields the side of ``revision``, whose files lie in a temporary folder until the block ends.

    Args:
        revision: A commit.
        root: The repository.
        name: Of the side.
        roots: Folders of ``root`` that modules are imported from; the same folders of the revision are used.

    Raises:
        GateError: There is no such commit, or it lacks all of these folders.
    """
    commit = commit_of(revision, root)
    with temporary_folder() as folder:
        # An archive and not a worktree: it leaves nothing in the repository, whatever ends this process.
        with subprocess.Popen(["git", "archive", commit], cwd=root, stdout=subprocess.PIPE) as archive:
            unpacked = subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=False)
        if archive.returncode or unpacked.returncode:
            raise GateError(f"revision '{revision}' cannot be checked out.")
        paths = [folder / Path(path).resolve().relative_to(root.resolve()) for path in roots]
        present = tuple(str(path) for path in paths if path.is_dir())
        if not present:
            raise GateError(f"revision '{revision}' has none of the folders that modules are imported from.")
        short = git("rev-parse", "--short", commit, folder=root)
        title = short if short.startswith(revision) or revision.startswith(short) else f"{revision} ({short})"
        yield Side(name=name, title=title, paths=present)


@contextlib.contextmanager
def temporary_folder(*, for_sockets: bool = False) -> Iterator[Path]:
    """Yields a folder that is deleted when the block ends, and also when this process is killed.

    Args:
        for_sockets: Its path is short enough for a socket in it, whatever ``TMPDIR`` is.
    """
    usual = tempfile.gettempdir()
    parent = "/tmp" if for_sockets and len(usual) > _MAX_TEMPORARY_CHARS else usual
    folder = Path(tempfile.mkdtemp(prefix="rlhfbench-gate-", dir=parent))
    cleaner = subprocess.Popen(
        [sys.executable, "-I", "-c", _CLEANER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert cleaner.stdin is not None
    try:
        yield folder
    finally:
        cleaner.stdin.close()
        cleaner.wait()


def module_roots(root: Path, *, with_working_folder: bool) -> list[str]:
    """Returns the folders of ``root`` that this process imports modules from.

    Raises:
        GateError: there are none: another revision would run the same code.
    """
    found = [*([str(Path.cwd())] if with_working_folder else []), *sys.path]
    inside = [path for path in dict.fromkeys(found) if path and _is_inside(Path(path), root)]
    if not inside:
        raise GateError(
            f"nothing is imported from '{root}': install the project in editable mode, or name a step with --step."
        )
    return inside


def _is_inside(path: Path, root: Path) -> bool:
    path = path.resolve()
    return path.is_relative_to(root.resolve()) and "site-packages" not in path.parts


@contextlib.contextmanager
def only_gate() -> Iterator[None]:
    """Holds the machine's lock: two gates at once would disturb each other.

    Raises:
        GateError: another gate runs.
    """
    path = Path(tempfile.gettempdir()) / f"rlhfbench-gate-{os.getuid()}.lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GateError("another gate of yours runs on this machine: the two would disturb each other.") from error
        yield
