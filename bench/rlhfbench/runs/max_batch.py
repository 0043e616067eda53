"""The largest batch that really runs: found by trying, each try a case of its own, with what was planned beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.cases.settings import setting_of
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.planning.devices import Accelerator
from rlhfbench.records.file import Record
from rlhfbench.runs import runner
from rlhfbench.runs.folder import write_atomically
from rlhfbench.runs.runner import Runner, RunResult, RunSettings
from rlhfkernels.config.case import Case
from rlhfkernels.errors import RlhfKernelsError

if TYPE_CHECKING:
    import pandas as pd

RESULT_NAME = "max_batch.json"
_GIB = 2**30

Try = Callable[[Case], Record]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What the search for one kind of case found.

    Attributes:
        case: the kind, with the batch that was tried first.
        largest_ok: the largest batch that ran; 0 where not even one sequence did, ``None`` where nothing is known.
        smallest_failing: the smallest batch that was out of memory, ``None`` where none was.
        stopped_because: why the search ended, in a sentence.
        planned: the largest batch by the plan, at most the limit; ``None`` where no memory to plan for is known.
        tries: (batch size, case id, outcome) in the order of the tries.
    """

    case: Case
    largest_ok: int | None
    smallest_failing: int | None
    stopped_because: str
    planned: int | None
    tries: tuple[tuple[int, str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``max_batch.json``."""
        fields = ("method", "model", "prompt_len", "completion_len", "device", "dtype")
        return {
            **{field: getattr(self.case, field) for field in fields},
            "setting": setting_of(dataclasses.asdict(self.case.options)),
            "largest_ok": self.largest_ok,
            "smallest_failing": self.smallest_failing,
            "stopped_because": self.stopped_because,
            "planned": self.planned,
            "tries": [
                {"batch_size": batch_size, "case_id": case_id, "outcome": outcome}
                for batch_size, case_id, outcome in self.tries
            ],
        }


class Search:
    """Doubles the batch until one is out of memory, then bisects.

    Args:
        case: the kind of case, with the batch to try first.
        limit: the largest batch to try.
        available_bytes: what the measured totals may grow to: a batch that would take more by a straight line through
            them is not tried, as the kernel would end more than the case. ``None``: the device itself says no.
    """

    def __init__(self, case: Case, *, limit: int, available_bytes: int | None) -> None:
        self._case, self._limit, self._available_bytes = case, limit, available_bytes
        self._totals: dict[int, tuple[int, int]] = {}  # batch size to (total, model) bytes
        self._tries: list[tuple[int, str, str]] = []
        self._low: int = 0
        self._high: int | None = None

    def run(self, try_case: Try, *, planned: int | None = None) -> Found:
        """Tries batches with ``try_case``, and says what came of it."""
        reason = None
        guess: int = min(self._case.batch_size, self._limit)
        while reason is None:
            case = dataclasses.replace(self._case, batch_size=guess)
            record = try_case(case)
            self._tries.append((guess, case.id, record["outcome"]))
            reason = self._learn(guess, record)
            if reason is None:
                guess, reason = self._next()
        return Found(
            case=self._case,
            largest_ok=self._low or (0 if self._high == 1 else None),
            smallest_failing=self._high,
            stopped_because=reason,
            planned=planned,
            tries=tuple(self._tries),
        )

    def _learn(self, batch_size: int, record: Record) -> str | None:
        """Takes what became of a try; a reason where it ends the search."""
        if record["outcome"] == "ok":
            self._low = batch_size
            memory = record["memory"]
            if memory["total_bytes"] is not None:
                self._totals[batch_size] = memory["total_bytes"], memory["model_bytes"] or 0
        elif _is_out_of_memory(self._case, record):
            self._high = batch_size
        else:
            return f"batch {batch_size} ended as {record['outcome']}: {record['error']['message']}"
        if self._high is not None and self._high - self._low == 1:
            return f"batch {self._high} was out of memory."
        return f"the limit of {self._limit} was reached." if self._low == self._limit else None

    def _next(self) -> tuple[int, str | None]:
        """The batch to try next, or a reason to try none."""
        guess = min(2 * self._low, self._limit) if self._high is None else (self._low + self._high) // 2
        while guess > self._low and (needed := self._over(guess)):
            if guess - self._low == 1:
                reason = f"batch {guess} would take {needed / _GIB:.3g} GiB by the measured totals, and only "
                return guess, f"{reason}{(self._available_bytes or 0) / _GIB:.3g} GiB are available."
            guess = (self._low + guess) // 2
        return guess, None

    def _over(self, batch_size: int) -> float | None:
        """The predicted total of ``batch_size`` where it is more than there is."""
        if self._available_bytes is None or not self._totals:
            return None
        (b1, (t1, model)), *rest = sorted(self._totals.items(), reverse=True)
        if rest:
            b0, (t0, _) = rest[0]
            per_sequence = (t1 - t0) / (b1 - b0)
        else:  # of one measurement all but the model grows with the batch
            per_sequence = (t1 - model) / b1
        needed = t1 + per_sequence * (batch_size - b1)
        return needed if needed > self._available_bytes else None


def _is_out_of_memory(case: Case, record: Record) -> bool:
    """Whether a try was too large. On a host a kill that nobody explains is the kernel's: its counter may be hidden."""
    killed = record["outcome"] == "crashed" and record["error"]["kind"] == "SIGKILL" and case.device == "cpu"
    return record["outcome"] == "oom" or killed


def find_max_batches(
    sweep: Sweep, out_dir: Path, settings: RunSettings, *, limit: int, resume: bool = False
) -> tuple[RunResult, list[Found]]:
    """Finds the largest batch that runs for everything in ``sweep`` but its batch sizes, and keeps it with the run.

    Every try is a record of the run. A resumed search takes the tries that are recorded as made.

    Args:
        sweep: its smallest batch sizes are tried first, where no device's memory is known to plan for.
        out_dir: the run's folder, as for ``run_sweep``.
        settings: how each try is run.
        limit: the largest batch that is tried.
        resume: go on with the search in ``out_dir``.

    Raises:
        SweepError: the limit is no limit, or an option splits the batch.
        RunFolderError: the folder cannot be used.
    """
    problems = [f"max-batch-limit is {limit}: it must be a whole number of at least 1."] if limit < 1 else []
    if any(case.options.engine.micro_batch_size or case.options.ppo.num_mini_batches > 1 for case in sweep.cases):
        problems.append(
            "--max-batch tries each batch whole: leave out engine.micro_batch_size and ppo.num_mini_batches."
        )
    if problems:
        raise SweepError(problems)
    found: list[Found] = []

    def drive(cases: Runner) -> None:
        for case in _kinds(sweep):
            usable_bytes, available_bytes = _room(case, settings)
            planned = None if usable_bytes is None else _planned(case, usable_bytes, limit)
            if planned and (case.device != "cpu" or settings.memory_limit_bytes is not None):
                case = dataclasses.replace(case, batch_size=planned)
            search = Search(case, limit=limit, available_bytes=available_bytes)
            found.append(search.run(cases.try_case, planned=planned))
            _write(out_dir, found)

    return runner.run_sweep(sweep, out_dir, settings, resume=resume, drive=drive), found


def _kinds(sweep: Sweep) -> Iterator[Case]:
    """The cases of ``sweep`` that differ in more than the batch, each with its smallest batch."""
    smallest: dict[Case, int] = {}
    for case in sweep.cases:
        kind = dataclasses.replace(case, batch_size=1)
        smallest[kind] = min(case.batch_size, smallest.get(kind, case.batch_size))
    for kind, batch_size in smallest.items():
        yield dataclasses.replace(kind, batch_size=batch_size)


def _room(case: Case, settings: RunSettings) -> tuple[int | None, int | None]:
    """(what a plan may count on, what tries may grow to): a host's memory is also everybody else's."""
    limit = settings.memory_limit_bytes
    if case.device == "cpu":
        available_bytes = host_available_bytes()
        return min(available_bytes, limit or available_bytes), available_bytes
    total_bytes = device_bytes(case.device)
    if total_bytes is None:
        return limit, None
    usable_bytes = Accelerator(name=case.device, memory_bytes=total_bytes).usable_bytes
    return min(usable_bytes, limit or usable_bytes), None


def _planned(case: Case, usable_bytes: int, limit: int) -> int | None:
    """The largest batch by the plan, at most ``limit``; ``None`` where it cannot be planned."""
    from rlhfbench.planning.max_batch import BatchSearch
    from rlhfbench.planning.zero import Zero

    try:
        return min(limit, BatchSearch(usable_bytes, Zero()).largest(dataclasses.replace(case, batch_size=1)))
    except RlhfKernelsError:
        return None


def host_available_bytes() -> int:
    """What the host can give without swapping, and no more than what this process's control group may still take."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most, now = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if most == "max" else max(0, min(available, int(most) - int(now)))


def device_bytes(device: str) -> int | None:
    """The whole memory of a CUDA device, asked of the driver; ``None`` where it does not say."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(device.partition(":")[2] or 0))
            return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # whatever the library says: its answer is not there
        return None


def max_batch_frame(found: list[Found]) -> pd.DataFrame:
    """The table that crosses to the reports: see ``rlhfreports.max_batch``."""
    import pandas as pd

    return pd.DataFrame(
        {
            "title": [item.case.role_table.title for item in found],
            "setting": [setting_of(dataclasses.asdict(item.case.options)) for item in found],
            "model": [item.case.model for item in found],
            "seq_len": [item.case.seq_len for item in found],
            "planned": pd.array([item.planned for item in found], dtype="Int64"),
            "largest_ok": pd.array([item.largest_ok for item in found], dtype="Int64"),
            "smallest_failing": pd.array([item.smallest_failing for item in found], dtype="Int64"),
            "num_tries": [len(item.tries) for item in found],
            "stopped_because": [item.stopped_because for item in found],
        }
    )


def _write(out_dir: Path, found: list[Found]) -> None:
    try:
        write_atomically(out_dir / RESULT_NAME, json.dumps([item.to_dict() for item in found], indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"out '{out_dir}' cannot be written: {error.strerror}.") from error
