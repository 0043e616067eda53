"""The launcher that started this process: none, torchrun or Slurm, as their variables say."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from rlhfbench.errors import SweepError

_SLURM_PORT = 29500  # torch's default
_FIRST_HOST = re.compile(r"([^,\[]+)(?:\[(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The place of this process among those that a launcher started, one for each rank.

    Attributes:
        rank: of this process, among all.
        size: number of processes.
        local_rank: of this process, among those of its machine.
        local_size: processes of this machine.
        host: name or address of the machine of rank 0.
        port: where the processes meet on it.
        has_store: the launcher itself listens there, as torchrun does.
        attempt: how often the launcher has started all processes again. Its store is the same.
        job: name of the launcher's job. Another one on the same machine may meet at the same port.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    has_store: bool = False
    attempt: int = 0
    job: str = ""

    def num_local(self, world_size: int) -> int:
        """Ranks of a case on this process's machine, whose last processes may be beyond the world."""
        return min(self.local_size, world_size - (self.rank - self.local_rank))


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The launcher's variables in ``environment``; ``None`` without a launcher of several processes.

    Those of torchrun: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT``. Else those of Slurm: ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``, ``SLURM_LOCALID``,
    ``SLURM_STEP_TASKS_PER_NODE`` and ``SLURM_STEP_NODELIST`` (else ``SLURM_NODELIST``), with ``MASTER_PORT`` or 29500.

    Raises:
        SweepError: a variable is malformed, or does not fit the others.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = Launch(
            rank=_number(environment, "RANK", 0),
            size=_number(environment, "WORLD_SIZE", 1),
            local_rank=_number(environment, "LOCAL_RANK", 0),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
            host=environment.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(environment, "MASTER_PORT", _SLURM_PORT),
            has_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            job=environment.get("TORCHELASTIC_RUN_ID", ""),
        )
    elif "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        # The tasks of the step, and not those of the job: a shell in an allocation is a step of one task.
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
        found = Launch(
            rank=_number(environment, "SLURM_PROCID", 0),
            size=_number(environment, "SLURM_STEP_NUM_TASKS", 1),
            local_rank=_number(environment, "SLURM_LOCALID", 0),
            local_size=_tasks_per_node(environment),
            host=environment.get("MASTER_ADDR") or first_host(nodes),
            port=_number(environment, "MASTER_PORT", _SLURM_PORT),
            job=".".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")),
        )
    else:
        return None
    if found.rank >= found.size:
        raise SweepError([f"the launcher's rank is {found.rank}: it must be below its number of ranks, {found.size}."])
    return found if found.size > 1 else None


def refuse_launcher(what: str) -> None:
    """Refuses a launcher of several processes, each of which would do the same.

    Raises:
        SweepError: there is one, or its variables are malformed.
    """
    launch = find_launch()
    if launch is not None:
        raise SweepError([f"{what} runs in one process, and a launcher started {launch.size}: start it without one."])


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it, such as ``node[03-05,9],other``."""
    match = _FIRST_HOST.match(nodes)
    return nodes if match is None else match[1] + (match[2] or "")


def _tasks_per_node(environment: Mapping[str, str]) -> int:
    """Slurm's tasks of this machine, from a list such as ``2(x3),1``, whose first entries are the first nodes'."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else 1


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise SweepError([f"{name} is {text!r}: the launcher's variable must be an integer of at least 0."])
    return int(text)
