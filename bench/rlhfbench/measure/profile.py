"""The profile of a step: a Chrome trace and the top ops of each phase, its stacks, and the CUDA allocator's history.

Ops and stacks come from two steps. Recording every Python frame makes a phase slower by half and its trace ten times as
large, so that the seconds of ops come from a step without it.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from rlhfbench.files import write_atomically
from rlhfbench.measure.allocator import allocator_history, keeps_history, read_allocator_curve
from rlhfbench.measure.options import PROFILE_NAME, SNAPSHOT_NAME
from rlhfbench.measure.trace_events import NATIVE_PREFIX, Event, num_ops, ops_table, read_trace, stack_tree
from rlhfkernels.observer import Observer
from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.launch import OP_NAMES

# A phase of more ops gets no stacks: each op lies under six Python frames, and a frame is 300 bytes of its trace.
MAX_OPS_WITH_STACKS = 50_000


@dataclasses.dataclass(frozen=True, slots=True)
class PhaseTrace:
    """The trace of the first stretch of a phase.

    Attributes:
        path: The file.
        wall_s: Seconds of the stretch under the profiler.
    """

    path: Path
    wall_s: float


class PhaseProfiler(Observer):
    """Profiles the first stretch of each phase and writes it to ``<directory>/<stem>-<phase>.json.gz``.

    Later stretches repeat the first. They are left out, as are shapes, to keep traces small.

    Args:
        directory: Folder of the traces; it is made.
        stem: How the names of the traces begin.
        device: Device of the step.
        phases: Phases to profile; ``None`` for all.
        with_stacks: Whether to record Python frames.

    Attributes:
        traces: Traces written so far, by phase.
    """

    def __init__(
        self,
        directory: str | Path,
        stem: str,
        device: str | torch.device = "cpu",
        *,
        phases: Collection[str] | None = None,
        with_stacks: bool = False,
    ) -> None:
        self._directory = Path(directory)
        self._stem = stem
        self._activities = [ProfilerActivity.CPU]
        self._device = torch.device(device)
        if self._device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._phases = phases
        self._with_stacks = with_stacks
        self._running: tuple[str, profile, float] | None = None
        self._seen: set[str] = set()
        self.traces: dict[str, PhaseTrace] = {}

    def enter_phase(self, name: str) -> None:
        """Starts the profiler if the phase is new and no other phase is being profiled."""
        if self._running is not None or name in self._seen or (self._phases is not None and name not in self._phases):
            return
        self._seen.add(name)
        self._synchronize()
        # There is one cycle. Without the option torch 2.11 warns that another would lose its events.
        profiler = profile(activities=self._activities, with_stack=self._with_stacks, acc_events=True)
        profiler.start()
        self._running = name, profiler, time.perf_counter()

    def exit_phase(self, name: str) -> None:
        """Stops the profiler and writes the trace."""
        if self._running is None or self._running[0] != name:
            return
        _, profiler, started_s = self._running
        self._running = None
        self._synchronize()
        wall_s = time.perf_counter() - started_s
        profiler.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{self._stem}-{name}.json.gz"
        profiler.export_chrome_trace(str(path))
        self.traces[name] = PhaseTrace(path, wall_s)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def num_profiled_steps(device: str) -> int:
    """The number of steps that ``profile_step`` runs: ops, stacks, and the allocator's history."""
    return 3 if _has_history(device) else 2


def _has_history(device: str) -> bool:
    return torch.device(device).type == "cuda" and keeps_history()


def profile_step(run: Callable[[Observer], object], directory: Path, case_id: str, device: str) -> None:
    """Profiles a step into ``directory``: the traces of its phases, and ``profile.json`` with what they say.

    On CUDA also ``snapshot.pickle``, the history of torch's own allocator over one more step.

    Args:
        run: Runs one step under an observer.
        directory: Folder of the profile; it is made.
        case_id: Id of the case.
        device: Device of the step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _native_ops_named():
        plain = PhaseProfiler(directory, case_id, device)
        run(plain)
        phases = {name: _phase_object(name, trace) for name, trace in plain.traces.items()}
        small = [name for name, phase in phases.items() if phase["num_ops"] <= MAX_OPS_WITH_STACKS]
        with tempfile.TemporaryDirectory() as folder:
            profiler = PhaseProfiler(folder, case_id, device, phases=small, with_stacks=True)
            run(profiler)
            for name, trace in profiler.traces.items():
                phases[name]["stacks"] = {"wall_s": trace.wall_s, **stack_tree(read_trace(trace.path))}
    allocator = None
    if _has_history(device):
        with allocator_history(directory / SNAPSHOT_NAME):
            run(Observer())
        allocator = read_allocator_curve(directory / SNAPSHOT_NAME, device)
    summary = {"case_id": case_id, "device": device, "phases": list(phases.values()), "allocator": allocator}
    write_atomically(directory / PROFILE_NAME, json.dumps(summary, separators=(",", ":")) + "\n")


def _phase_object(name: str, trace: PhaseTrace) -> dict[str, Any]:
    events: list[Event] = read_trace(trace.path)
    return {
        "phase": name,
        "trace": trace.path.name,
        "wall_s": trace.wall_s,
        "num_ops": num_ops(events),
        **ops_table(events, trace.wall_s),
        "stacks": None,
    }


@contextmanager
def _native_ops_named() -> Iterator[None]:
    """Makes the ops in C events of the profiler; a step that is not profiled runs no line of this."""
    if not library.cache_info().currsize:  # nothing has run in C; asking would compile it
        yield
        return
    compiled: Any = library()
    run_program = compiled.run_program

    def run_named(commands: Any, num_commands: Any, *rest: Any) -> object:
        # One op comes as a reference to it, a program of several as their array.
        single = getattr(commands, "_obj", None)
        name = "program" if single is None else OP_NAMES.get(single.run, "op")
        with record_function(f"{NATIVE_PREFIX}{name}"):
            return run_program(commands, num_commands, *rest)

    compiled.run_program = run_named
    try:
        yield
    finally:
        compiled.run_program = run_program
