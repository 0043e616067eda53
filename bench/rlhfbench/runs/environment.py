"""The environment of a run: software, hardware and options that its results depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from rlhfbench.errors import ForkServerError, RunFolderError
from rlhfbench.measure.nvml import visible_handles
from rlhfbench.records.derived import at
from rlhfbench.runs import versions

_PACKAGES = (
    *("rlhfbench", "torch", "transformers", "peft", "numpy", "triton"),
    *("deepspeed", "bitsandbytes", "liger-kernel", "flash-attn"),  # which some cases and devices use where installed
)
# Beginnings of environment variables that change speed, memory or the visible devices.
_VARIABLES = (
    "OMP_",
    "MKL_",
    "KMP_",
    "GOMP_",
    "MALLOC_",
    "LD_PRELOAD",  # of another allocator
    "ATEN_CPU_CAPABILITY",
    "DNNL_",
    "ONEDNN_",
    "NCCL_",
    "CUDA_",
    "CUBLAS_",
    "NVIDIA_TF32_",
    "NVIDIA_VISIBLE_",
    "PYTORCH_",
    "TORCH_",
    "RLHFBENCH_",
)
# What times depend on, by the name that a notice uses: its place in an environment.
_COMPARED = {
    "commit": "source.commit",
    "sources": "source.hash",
    "Python": "python",
    **{name: f"versions.{name}" for name in _PACKAGES},
    "host": "host",
    "CPU": "cpu.model",
    "usable cores": "cpu.num_usable_cores",
    "GPUs": "gpus",
    "threads": "num_threads",
    "launcher's ranks": "launched_ranks",
    "revisions": "revisions",
    "variables": "variables",
}


def now() -> str:
    """The current time in UTC, ISO 8601 with milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def describe(
    *,
    argv: Sequence[str],
    settings: dict[str, Any],
    revisions: Mapping[str, str] | None = None,
    data_files: Mapping[str, str | None] | None = None,
    launched_ranks: str = "none",
) -> dict[str, Any]:
    """The content of ``environment.json``; unknown values are ``None``.

    Args:
        argv: the command line.
        settings: the fields of ``RunOptions``.
        revisions: commit on the hub of each model that is loaded from a snapshot.
        data_files: hash of the content of each data file.
        launched_ranks: ranks that a launcher started, by machine.
    """
    return {
        "started_at": now(),
        "argv": [*_program(Path(argv[0])), *argv[1:]] if argv else [],
        "settings": settings,
        "host": platform.node(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": package_versions(),
        "source": {**source(*(versions.folders() or [Path(__file__).parent])), "hash": _source_hash()},
        "cpu": {
            "model": _cpu_model(),
            "num_physical_cores": psutil.cpu_count(logical=False),
            "num_logical_cores": psutil.cpu_count(logical=True),
            "num_usable_cores": _num_usable_cores(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "num_threads": settings.get("num_threads") or _num_usable_cores(),
        "launched_ranks": launched_ranks,
        "gpus": gpus(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "revisions": dict(revisions or {}),
        "data_files": dict(data_files or {}),
    }


def _program(path: Path) -> list[str]:
    """The words that start a program: its name, or those of ``python -m``."""
    return ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]


def check_system() -> None:
    """Checks that the system has what a run needs, before anything is written.

    Raises:
        ForkServerError: cases cannot be forked here.
    """
    if not hasattr(os, "fork"):
        raise ForkServerError(
            "measuring needs os.fork, which this system lacks: on Windows, use its subsystem for Linux."
        )


def check_data_files(now: Mapping[str, str | None], earlier: Sequence[Mapping[str, Any]]) -> None:
    """Checks that no data file has changed since an earlier segment of the run: its cases would be other cases.

    Raises:
        RunFolderError: a file has changed.
    """
    for path, content in now.items():
        for segment in earlier:
            recorded = segment.get("data_files")
            if isinstance(recorded, dict) and recorded.get(path, content) != content:
                raise RunFolderError(f"data file '{path}' has changed since the run started: name a new folder.")


def changes(now: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> str | None:
    """One sentence that names what differs between ``now`` and the environments of ``earlier`` segments of a run.

    ``None`` if nothing differs.
    """
    phrases = differences(now, earlier)
    if not phrases:
        return None
    return f"Resumed under other conditions: {'; '.join(phrases)}. Times before and after do not compare."


def are_alike(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """True if times of two environments compare: nothing is ``unlike``."""
    return not unlike(now, earlier)


def unlike(now: Mapping[str, Any], earlier: Mapping[str, Any], *, without: Collection[str] = ()) -> list[str]:
    """The ``differences`` for which times of two environments do not compare.

    The commit counts only where the hash of the sources is unknown.
    """
    ignored = [] if at(earlier, "source.hash") is None else ["commit"]
    return differences(now, [earlier], without=(*without, *ignored))


def of_host(environment: Mapping[str, Any], host: str | None) -> Mapping[str, Any]:
    """The environment of the machine of that name: of a node of a cluster, else of the machine of the run."""
    nodes = environment.get("nodes")
    found: Mapping[str, Any] = nodes.get(host, environment) if isinstance(nodes, Mapping) else environment
    return found


def differences(
    now: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], *, without: Collection[str] = ()
) -> list[str]:
    """Differences between ``now`` and ``earlier`` environments, a few words each.

    A value that an earlier one did not record is not compared.

    Args:
        now: an environment.
        earlier: others.
        without: names of values that are not compared, such as ``commit``.
    """
    phrases = []
    for name, path in _COMPARED.items():
        if name in without:
            continue
        value = _shown(at(now, path))
        others = dict.fromkeys(_shown(at(segment, path)) for segment in earlier if at(segment, path) is not None)
        others.pop(value, None)
        if others:
            phrases.append(f"{name} {value} instead of {', '.join(others)}")
    return phrases


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return " + ".join(map(_gpu, value)) or "none"
    return "unknown" if value is None else str(value)


def _gpu(gpu: Any) -> str:
    driver = at(gpu, "driver")
    return str(at(gpu, "name")) + ("" if driver is None else f" (driver {driver})")


def source(folder: Path, *others: Path) -> dict[str, Any]:
    """``{"commit", "dirty"}`` of the git checkout that tracks ``folder``; both ``None`` for an installed package.

    Changes beside ``folder`` and ``others`` do not count: a run's own folder in the checkout is no change of the code.
    """
    commit = dirty = None
    # A package installed into an environment inside somebody's checkout is not part of that checkout.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(folder, "rev-parse", "HEAD")
        status = _git(folder, "status", "--porcelain", "--", str(folder), *map(str, others))
        dirty = None if status is None else bool(status)
    return {"commit": commit, "dirty": dirty}


def _source_hash() -> str | None:
    """Hash of the sources, which changes with every edit; ``None`` where they are not found."""
    installed = versions.installed()
    return None if installed is None else installed[1]


def gpus() -> list[dict[str, Any]] | None:
    """Name, driver version and memory of every GPU that CUDA sees, in its order; ``None`` without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # without the package or the driver NVML fails in many ways
        return None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        return [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "driver": driver,
                "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            }
            for handle in visible_handles(pynvml)
        ]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def package_versions() -> dict[str, str | None]:
    """Returns the installed versions of the packages that times depend on; ``None`` for one that is missing."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _num_usable_cores() -> int | None:
    """Number of cores that this process may use; a container or taskset can restrict them."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; ``None`` if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
