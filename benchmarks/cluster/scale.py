"""Costs of a run on a cluster for the driver: cases that do nothing, on logical nodes.

The nodes are logical: a few Ray actors stand for all of them, and answer each task at once with the measurements of a
kept run. Everything else is real: Ray's messages, placement, records with their flush to the disk, and progress.

    python benchmarks/cluster/scale.py --cases 10000 --nodes 100
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from rlhfbench.cases.sweep import Sweep
from rlhfbench.cluster.executor import ClusterExecutor
from rlhfbench.cluster.nodes import Need, Node
from rlhfbench.cluster.placement import Claim
from rlhfbench.cluster.ray_transport import RayTransport
from rlhfbench.records.file import read_records
from rlhfbench.runs.execution import Executor, Setup
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.progress import Silent
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case

KEPT = Path(__file__).parents[2] / "reports" / "results" / "default-cpu"
NUM_HOSTS = 4
MIB = 2**20


class Host:
    """Stands for many nodes: answers each task at once."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self._answer = answer

    def run(self, message: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
        return self._answer, {}


class Logical(RayTransport):
    """The transport of Ray, to logical nodes."""

    def __init__(self, num_nodes: int, answer: dict[str, Any]) -> None:
        super().__init__(server={}, describe={}, add_nodes=lambda found: None, tell=print)
        self._nodes = [Node(id=str(i), name=f"node{i}", num_cores=1) for i in range(num_nodes)]
        make = ray.remote(Host).options(num_cpus=0, max_concurrency=-(-num_nodes // NUM_HOSTS))
        self._hosts = [make.remote(answer) for _ in range(NUM_HOSTS)]

    def nodes(self) -> Sequence[Node]:
        return self._nodes

    def _new_agent(self, claim: Claim) -> Any:
        return self._hosts[int(claim.node.id) % NUM_HOSTS]


@dataclasses.dataclass(frozen=True)
class Place:
    num_nodes: int
    answer: dict[str, Any]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def make_executor(self, setup: Setup) -> Executor:
        return ClusterExecutor(
            Logical(self.num_nodes, self.answer),
            need_of=lambda case: Need(device="cpu", num_cores=1),
            group_of=lambda case: case.id,
            progress=setup.progress,
        )


class Meter(Silent):
    """Prints the driver's time and memory every tenth of the run."""

    def __init__(self, num_cases: int) -> None:
        self._every, self._done, self._process = max(1, num_cases // 10), 0, psutil.Process()
        print(f"{'cases':>7} {'CPU ms/case':>12} {'wall ms/case':>13} {'resident MiB':>13}")
        self._since = time.process_time(), time.perf_counter()

    def finish_case(self, case: Case, record: dict[str, Any]) -> None:
        self._done += 1
        if self._done % self._every == 0:
            now = time.process_time(), time.perf_counter()
            cpu, wall = (1000 * (b - a) / self._every for a, b in zip(self._since, now, strict=True))
            resident = self._process.memory_info().rss / MIB
            print(f"{self._done:>7} {cpu:>12.2f} {wall:>13.2f} {resident:>13.1f}", flush=True)
            self._since = now


def kept_answer() -> dict[str, Any]:
    """The fields of a task that ended with the measurements of a kept record."""
    record = next(record for record in read_records(KEPT) if record["outcome"] == "ok")
    latency = {
        "phases": {name: {"kind": phase["kind"]} for name, phase in record["latency"]["phases"].items()},
        "num_blocks": 1,
    }
    sections = {name: record[name] for name in ("memory", "work", "stats", "engine", "kernels", "prompts")}
    result = {"outcome": "ok", "error": None, **sections, "latency": latency, "block": record["latency"]["blocks"][0]}
    return {"result": result, "started_at": record["started_at"], "wall_s": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=100)
    given = parser.parse_args()
    base = Case(method="hydra", model="tiny", prompt_len=8, completion_len=8, batch_size=1)
    sweep = Sweep(cases=tuple(dataclasses.replace(base, seed=seed) for seed in range(given.cases)))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            meter = Meter(given.cases)
            place = Place(given.nodes, kept_answer())
            result = run_sweep(sweep, Path(folder) / "run", RunOptions(blocks=1), progress=meter, place=place)
            print(f"{result.num_ok} ok in {time.perf_counter() - started:.0f} s")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
