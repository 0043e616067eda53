"""The process of a node that runs tasks, each in a fresh process of its own. Ray makes an actor of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.runs import environment
from rlhfbench.runs.case_process import ThisMachine
from rlhfbench.runs.execution import Task
from rlhfbench.runs.forkserver import ForkServer
from rlhfkernels.config.case import Case

TRACES = "traces"
_THREADS = "OMP_NUM_THREADS"


class Agent:
    """Runs tasks one after the other, on cores that no other agent has.

    Args:
        server: arguments of ``ForkServer``.
        cores: places of the agent's cores among those that this machine may use; ``None`` for all.
    """

    def __init__(self, server: Mapping[str, Any], cores: Sequence[int] | None) -> None:
        _restore_threads()
        if cores is not None and hasattr(os, "sched_setaffinity"):
            usable = sorted(os.sched_getaffinity(0))
            if max(cores) < len(usable):  # Ray may lend more cores than there are
                os.sched_setaffinity(0, [usable[place] for place in cores])
        # The server dies with this process, however it ends.
        self._server = ForkServer(**server)
        self._machine = ThisMachine(self._server)

    def run(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Runs a task.

        Args:
            message: from ``message_of``.

        Returns:
            Fields of ``Ended``, and the content of the files that the task wrote: logs by their names, and traces by
            their paths below ``TRACES``.
        """
        with self._server.scratch() as root:  # the server's imports are no part of the first case's time
            request = message["request"]
            if request is not None and request["settings"].get("profile_dir") is not None:
                request = {**request, "settings": {**request["settings"], "profile_dir": str(root / TRACES)}}
            task = Task(
                case=Case.from_dict(message["case"]),
                request=request,
                log_path=root / message["log_name"],
                timeout_s=message["timeout_s"],
                with_plan=message["with_plan"],
            )
            ended = self._machine.run_task(task)
            files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
            fields = {
                "result": ended.result,
                "started_at": ended.started_at,
                "wall_s": ended.wall_s,
                "max_rss_bytes": ended.max_rss_bytes,
                "driver_peak_bytes": ended.driver_peak_bytes,
                "plan": ended.plan,
                "plan_timeline": ended.plan_timeline,
            }
            return fields, {name: path.read_bytes() for name, path in files.items()}


def message_of(task: Task) -> dict[str, Any]:
    """The message of a task for ``Agent.run``."""
    case = task.case.to_dict() if task.request is None else task.request["case"]
    return {
        "case": case,
        "request": task.request,
        "log_name": task.log_path.name,
        "timeout_s": task.timeout_s,
        "with_plan": task.with_plan,
    }


def describe_node(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The environment of this node. See ``rlhfbench.runs.environment.describe``."""
    _restore_threads()
    return environment.describe(**arguments)


def _restore_threads() -> None:
    """Removes the number of threads that Ray sets in its workers, so that cases have as many as on one machine.

    A number that was set for the node itself stays: it is in the environment that the process was started with.
    """
    try:
        started_with = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return
    if not any(entry.startswith(f"{_THREADS}=".encode()) for entry in started_with):
        os.environ.pop(_THREADS, None)
