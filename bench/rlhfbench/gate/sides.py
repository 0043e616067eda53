"""The two sides of a comparison: the code of a revision, and the processes that run it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhfbench.errors import GateError

# Writes the files of the modules that a step's module loads to a file: what that module prints is its own. The kernel
# kills it with its parent (PR_SET_PDEATHSIG is 1), and it ends without waiting for threads that the module has started.
_LOADED_FILES = (
    "import ctypes, importlib, json, os, pathlib, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9); "
    "importlib.import_module(sys.argv[1]); "
    "files = {n: getattr(m, '__file__', None) for n, m in list(sys.modules.items())}; "
    "pathlib.Path(sys.argv[2]).write_text(json.dumps(files, default=str)); os._exit(0)"
)
_IMPORT_TIMEOUT_S = 600
# Loads all that a case of a method runs: this package, transformers, PEFT and torch.
_MEASURED = "rlhfbench.measure.measurements"
_SOURCE_FOLDERS = ("", "src", "python", "lib")
_PROJECT_FILES = ("pyproject.toml", "setup.py", "setup.cfg")
_BUILT_OR_IMPORTED = (".py", ".c", ".h")  # a case compiles the kernels that it needs
# The path of a Unix socket has 104 to 108 characters.
_MAX_TEMPORARY_CHARS = 70
# Deletes a folder when its standard input ends: when the gate ends, also by SIGKILL.
# Again while something that outlives the gate for a moment, as a git does, still writes into it.
_CLEANER = """
import os, shutil, sys, time
sys.stdin.read()
for _ in range(50):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.lexists(sys.argv[1]):
        break
    time.sleep(0.1)
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: ``base`` or ``head``.
        title: What it is, in words: a revision with its commit, or the working tree.
        paths: Folders that Python's module search finds first.
    """

    name: str
    title: str
    paths: tuple[str, ...] = ()

    @property
    def takes_turns(self) -> bool:
        """False for a revision of this package from before its steps could be timed in turns."""
        own = self._own_package
        return own is None or Path(own, "measure", "turns.py").is_file()

    @property
    def obstacle(self) -> str | None:
        """One sentence for a revision of this package that cannot be timed at all; ``None`` for others."""
        own = self._own_package
        if own is None or Path(own, "measure", "injection.py").is_file():
            return None
        return "its rlhfbench is from before there was a gate: compare with a later revision."

    @property
    def _own_package(self) -> Path | None:
        found = (Path(path, "rlhfbench") for path in self.paths)
        return next((own for own in found if Path(own, "__init__.py").is_file()), None)


def git(*arguments: str, folder: Path | None = None, index: Path | None = None) -> str:
    """Returns the output of a git command.

    Args:
        *arguments: The command.
        folder: Working folder of the command.
        index: File of the index, in place of the repository's.

    Raises:
        GateError: git is missing, or the command fails.
    """
    environment = None if index is None else {**os.environ, "GIT_INDEX_FILE": str(index)}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # names of files and subjects of commits may be no UTF-8
            check=True,
        )
    except OSError as error:
        raise GateError("git is needed to compare revisions, and is not installed.") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message."]
        # Advice may follow the line that says what is wrong.
        said = next((line for line in lines if line.startswith("fatal: ")), lines[-1])
        raise GateError(f"git {arguments[0]} failed: {said.removeprefix('fatal: ')}") from error
    return done.stdout.strip()


def repository() -> Path:
    """Returns the root of the repository that the working folder lies in.

    Raises:
        GateError: it lies in none, or git refuses it.
    """
    try:
        return Path(git("rev-parse", "--show-toplevel"))
    except GateError as error:
        raise GateError(f"'{Path.cwd()}' lies in no git repository that can be compared: {error}") from error


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
        raise GateError(f"revision '{revision}' is not a commit of '{root}'{cut_off(root)}.") from error


def cut_off(root: Path) -> str:
    """Returns what to say of a commit that was not found where a shallow clone may lack it; else nothing."""
    is_shallow = git("rev-parse", "--is-shallow-repository", folder=root) == "true"
    return ", whose history is cut off: fetch the rest with git fetch --unshallow" if is_shallow else ""


def head_side(root: Path, roots: Sequence[str], *, step: str | None = None) -> Side:
    """Returns the working tree as it is, uncommitted changes included.

    Args:
        root: The repository.
        roots: Folders of ``root`` that modules are imported from.
        step: ``module:function`` of the user's own step.

    Raises:
        GateError: There is no commit yet, or the step imports a module of the repository from somewhere else.
    """
    commit = git("rev-parse", "--short", commit_of("HEAD", root), folder=root)
    num_changed = len(_changes(root))
    changes = f" with uncommitted changes in {num_changed} file{'s' * (num_changed > 1)}" if num_changed else ""
    if step:
        _check_imports(step, roots, root, root, "the repository")
    return Side(name="head", title=f"the working tree at {commit}{changes}", paths=tuple(roots))


def _changes(root: Path) -> list[str]:
    """Lines of git on what is not committed, without the bytecode that importing a step writes."""
    return [line for line in git("status", "--porcelain", folder=root).splitlines() if "__pycache__" not in line]


def _check_imports(step: str, paths: Sequence[str], files: Path, root: Path, where: str) -> None:
    """Refuses a step that loads a module of the repository from another place, or none: both sides would run one copy.

    Args:
        step: ``module:function``.
        paths: Folders that the side's modules are looked for in first.
        files: Folder that the side's files lie in.
        root: The repository.
        where: ``files`` in words.
    """
    known, loaded = _import_paths(root), _loaded_files(step.partition(":")[0], paths) or {}
    for name, file in sorted(loaded.items()):
        # Some modules name a file that is none, such as ``torch.classes``.
        if file is None or not Path(file).is_absolute() or _is_inside(Path(file), files):
            continue
        # A module that git does not know, such as a new file, if it lies in the working tree.
        is_in_tree = _is_inside(Path(file), root)
        if is_in_tree and not (files / Path(file).resolve().relative_to(root.resolve())).exists():
            raise GateError(
                f"step '{step}' imports '{name}' from '{file}' and not from {where}, which lacks this file: compare "
                "with a revision that has it, and not in a submodule."
            )
        if is_in_tree or _import_path(name, file) in known:
            raise GateError(
                f"step '{step}' imports '{name}' from '{file}' and not from {where}, so both sides would run that "
                "copy: install the project in editable mode, and call the gate in the folder of the step."
            )
    own = [file for file in loaded.values() if file and Path(file).is_absolute()]
    if own and not any(_is_inside(Path(file), files) for file in own):
        raise GateError(
            f"step '{step}' imports no file of {where}, so both sides would run the same code: import the project at "
            "the top of the step's module, and install it in editable mode."
        )


def _loaded_files(module: str, paths: Sequence[str]) -> dict[str, str | None] | None:
    """Files of the modules that importing ``module`` loads, by their names.

    Args:
        module: A module.
        paths: Folders that modules are looked for in first.

    Returns:
        ``None`` if it cannot be imported: the record of the first case says why.
    """
    given = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])])}
    with temporary_folder() as folder:
        written = folder / "files.json"
        command = [sys.executable, "-P", "-c", _LOADED_FILES, module, str(written)]
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            # No pipes: what the module leaves running would hold their other ends.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the record of the first case says why
                process.wait(_IMPORT_TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what the module has started
            process.wait()
        loaded: dict[str, str | None] | None = json.loads(written.read_text("utf-8")) if written.is_file() else None
    return loaded


def _import_paths(root: Path) -> set[str]:
    """The paths of a repository's modules below the folders that its projects are imported from."""
    patterns = ("*.py", *(f"*{name}" for name in _PROJECT_FILES))
    files = [Path(name) for name in git("ls-files", "-z", *patterns, folder=root).split("\0") if name]
    projects = {Path(), *(file.parent for file in files if file.name in _PROJECT_FILES)}
    sources = {project / name for project in projects for name in _SOURCE_FOLDERS}
    return {
        file.relative_to(folder).as_posix()
        for file in files
        for folder in file.parents
        if file.suffix == ".py" and folder in sources
    }


def _import_path(name: str, file: str) -> str | None:
    """The end of ``file`` by which module ``name`` is imported; ``None`` for the standard library's."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return None
    num_parts = name.count(".") + 1 + (Path(file).stem == "__init__")
    return "/".join(Path(file).parts[-num_parts:])


@contextlib.contextmanager
def unedited(root: Path, roots: Sequence[str]) -> Iterator[None]:
    """Refuses what the block has measured if a module of the working tree was edited meanwhile.

    The servers of a side start anew while a comparison runs, and import what the files hold then.

    Args:
        root: The repository.
        roots: Folders of ``root`` that modules are imported from.

    Raises:
        GateError: A file of Python or C that git does not ignore was edited or removed.
    """
    before = _times_of_change(root, roots)
    yield
    now = _times_of_change(root, roots)
    for file, changed_ns in before.items():
        if now.get(file) != changed_ns:
            raise GateError(f"'{file}' was edited while the gate ran, which measured two codes as one: run it again.")


def _times_of_change(root: Path, roots: Sequence[str]) -> dict[str, int]:
    folders = [str(Path(path).resolve().relative_to(root.resolve())) for path in roots]
    command = ("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders)
    names = [name for name in git(*command, folder=root).split("\0") if name.endswith(_BUILT_OR_IMPORTED)]
    return {name: (root / name).stat().st_mtime_ns for name in names if (root / name).is_file()}


def sameness(base: str, root: Path) -> str:
    """Returns a sentence where the working tree is the revision ``base``; else nothing."""
    is_same = commit_of(base, root) == commit_of("HEAD", root) and not _changes(root)
    return "Base and head are the same commit: there was no change to judge." if is_same else ""


@contextlib.contextmanager
def checked_out(
    revision: str, root: Path, name: str, roots: Sequence[str], *, step: str | None = None
) -> Iterator[Side]:
    """Yields the side of ``revision``, whose files lie in a temporary folder until the block ends.

    Args:
        revision: A commit.
        root: The repository.
        name: Of the side.
        roots: Folders of ``root`` that modules are imported from; the same folders of the revision are used.
        step: ``module:function`` of the user's own step.

    Raises:
        GateError: There is no such commit, it cannot be checked out, it lacks these folders, or the step imports a
            module of the repository from somewhere else.
    """
    commit = commit_of(revision, root)
    with temporary_folder() as folder:
        files, index = folder / "files", folder / "index"
        # Neither a worktree, which leaves an entry in the repository if this process is killed, nor an archive, which
        # lacks what the repository's attributes leave out of releases.
        git("read-tree", commit, folder=root, index=index)
        # Forced: a file system without case has one file for two names, as git's own checkout does.
        git("checkout-index", "--all", "--force", f"--prefix={files}/", folder=root, index=index)
        folders = {path: files / Path(path).resolve().relative_to(root.resolve()) for path in roots}
        missing = [path for path, own in folders.items() if not own.is_dir()]
        # Without the folder of one of this package's parts, the part would come from the working tree.
        if len(missing) == len(folders) or (missing and step is None):
            raise GateError(f"revision '{revision}' lacks '{missing[0]}', which modules are imported from.")
        paths = tuple(str(own) for path, own in folders.items() if path not in missing)
        if step:
            _check_imports(step, paths, files, root, f"revision '{revision}'")
        short = git("rev-parse", "--short", commit, folder=root)
        title = short if short.startswith(revision) or revision.startswith(short) else f"{revision} ({short})"
        yield Side(name=name, title=title, paths=paths)


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
        GateError: there are none, or only folders of modules that no method runs: another revision would run the same
            code. Or Python's search path cannot hold one.
    """
    found = [*([str(Path.cwd())] if with_working_folder else []), *sys.path]
    inside = [path for path in dict.fromkeys(found) if path and _is_inside(Path(path), root)]
    if not inside or not (with_working_folder or _runs_in_methods(inside, root)):
        raise GateError(
            f"nothing is imported from '{root}': install the project in editable mode, or name a step with --step."
        )
    for path in inside:
        if os.pathsep in path:
            raise GateError(f"'{path}' has '{os.pathsep}' in its name, which divides Python's search path: rename it.")
    return inside


def _runs_in_methods(roots: Sequence[str], root: Path) -> bool:
    """True if a case of a method would run code of these folders: this package's, transformers', PEFT's or torch's."""
    if any(Path(path, "rlhfbench", "__init__.py").is_file() for path in roots):
        return True
    loaded = _loaded_files(_MEASURED, roots)
    return loaded is None or any(_is_inside(Path(file), root) for file in loaded.values() if file)


def _is_inside(path: Path, root: Path) -> bool:
    """True if ``path`` is among the files of ``root``, and not of an environment or of a Python in it.

    A command of an environment has the environment's ``bin`` on its path.
    """
    path, root = path.resolve(), root.resolve()
    prefixes = [Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)]
    # Below an environment that was made in the root lies the whole repository.
    prefixes = [prefix / "bin" if prefix == root else prefix for prefix in prefixes]
    is_of_environment = any(prefix.is_relative_to(root) and path.is_relative_to(prefix) for prefix in prefixes)
    return path.is_relative_to(root) and not is_of_environment and "site-packages" not in path.parts


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
        except OSError as error:  # some shared file systems have no locks
            raise GateError(
                f"'{path}' cannot be locked: {error.strerror}. Set TMPDIR to a folder on a disk of this machine."
            ) from error
        yield
