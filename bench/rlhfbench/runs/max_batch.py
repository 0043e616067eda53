"""The largest batch that runs: a search whose tries are cases of a run, beside the batch that was predicted."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.cases.settings import setting_of
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.files import write_atomically
from rlhfbench.launch import find_launch
from rlhfbench.measure import host
from rlhfbench.measure.nvml import device_bytes
from rlhfbench.planning.devices import Accelerator
from rlhfbench.records.derived import options_text, strategy
from rlhfbench.records.file import Record
from rlhfbench.runs import runner
from rlhfbench.runs.case_runner import Runner
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.options import MAX_BATCH, RunOptions
from rlhfbench.runs.progress import Progress
from rlhfbench.runs.runner import RunResult
from rlhfkernels.config.case import Case
from rlhfkernels.errors import RlhfKernelsError

if TYPE_CHECKING:
    import pandas as pd

RESULT_NAME = "max_batch.json"
_GIB = 2**30
# Estimate of what a process on a CPU takes beside its tensors, before any is measured. The libraries take 0.36 GiB.
_PROCESS_BYTES = _GIB // 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MaxBatchResult:
    """The result of the search for one case.

    Attributes:
        case: the case, with the batch that was tried first.
        largest_ok: the largest batch that ran; 0 if batch 1 was out of memory, ``None`` if nothing is known.
        smallest_failing: the smallest batch that was out of memory, ``None`` if none was.
        stopped_because: one sentence.
        planned: the largest batch that a plan predicts to fit, at most the limit; ``None`` without a prediction.
        tries: (batch size, case id, outcome) of each try, in order.
    """

    case: Case
    largest_ok: int | None
    smallest_failing: int | None
    stopped_because: str
    planned: int | None
    tries: tuple[tuple[int, str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """One entry of ``max_batch.json``."""
        fields = ("method", "model", "prompt_len", "completion_len", "device", "dtype", "seed", "options")
        case = self.case.to_dict()
        return {
            **{field: case[field] for field in fields},
            "setting": setting_of(case["options"]),
            "largest_ok": self.largest_ok,
            "smallest_failing": self.smallest_failing,
            "stopped_because": self.stopped_because,
            "planned": self.planned,
            "tries": [
                {"batch_size": batch_size, "case_id": case_id, "outcome": outcome}
                for batch_size, case_id, outcome in self.tries
            ],
        }


class MaxBatchSearch:
    """Doubles the batch until one is out of memory, then bisects.

    Args:
        case: the case, with the batch to try first.
        limit: the largest batch to try.
        available_bytes: memory of the host. A batch whose process would exceed it, by a straight line through what was
            measured so far, is not tried: Linux might kill other processes. ``None`` on a device with its own memory.
    """

    def __init__(self, case: Case, *, limit: int, available_bytes: int | None) -> None:
        self._case, self._limit, self._available_bytes = case, limit, available_bytes
        self._measured: dict[int, tuple[int, int, int]] = {}  # batch size to (process, total, model) bytes
        self._tries: list[tuple[int, str, str]] = []
        self._low: int = 0
        self._high: int | None = None

    def run(self, try_case: Callable[[Case], Record], *, planned: int | None = None) -> MaxBatchResult:
        """Searches with ``try_case``, which runs a case and returns its record."""
        reason = None
        guess: int = min(self._case.batch_size, self._limit)
        while reason is None:
            case = dataclasses.replace(self._case, batch_size=guess)
            record = try_case(case)
            self._tries.append((guess, case.id, record["outcome"]))
            reason = self._learn(guess, record)
            if reason is None:
                guess, reason = self._next()
        return MaxBatchResult(
            case=self._case,
            largest_ok=self._low or (0 if self._high == 1 else None),
            smallest_failing=self._high,
            stopped_because=reason,
            planned=planned,
            tries=tuple(self._tries),
        )

    def _learn(self, batch_size: int, record: Record) -> str | None:
        """Notes the record of a try; returns a sentence if it ends the search."""
        if record["outcome"] == "ok":
            self._low = batch_size
            memory = record["memory"]
            if memory["total_bytes"] is not None:
                total_bytes = memory["total_bytes"]
                process_bytes = max(total_bytes, memory["views"]["host_peak_bytes"] or 0)
                self._measured[batch_size] = process_bytes, total_bytes, memory["model_bytes"] or 0
        elif _is_out_of_memory(self._case, record):
            self._high = batch_size
        else:
            return f"batch {batch_size} ended as {record['outcome']}: {record['error']['message']}"
        if self._high is not None and self._high - self._low == 1:
            return f"batch {self._high} was out of memory."
        return f"the limit of {self._limit} was reached." if self._low == self._limit else None

    def _next(self) -> tuple[int, str | None]:
        """(batch to try next, ``None``), or a sentence in the second place if there is none."""
        guess = min(2 * self._low, self._limit) if self._high is None else (self._low + self._high) // 2
        while guess > self._low and (needed := self._over(guess)):
            if guess - self._low == 1:
                reason = f"batch {guess} would take {needed / _GIB:.3g} GiB by what was measured, and only "
                return guess, f"{reason}{(self._available_bytes or 0) / _GIB:.3g} GiB are available."
            guess = (self._low + guess) // 2
        return guess, None

    def _over(self, batch_size: int) -> float | None:
        """Bytes that ``batch_size`` would take, if more than are available."""
        if self._available_bytes is None or not self._measured:
            return None
        (b1, (process, t1, model)), *rest = sorted(self._measured.items(), reverse=True)
        if rest:
            # The process grows by its tensors at least: its peak may still be that of loading the weights.
            b0, (process0, t0, _) = rest[0]
            bytes_per_row = max(t1 - t0, process - process0) / (b1 - b0)
        else:  # with one measurement: all but the model grows with the batch
            bytes_per_row = (t1 - model) / b1
        needed = process + bytes_per_row * (batch_size - b1)
        return needed if needed > self._available_bytes else None


def _is_out_of_memory(case: Case, record: Record) -> bool:
    """True if the batch was too large. On a CPU an unexplained SIGKILL counts: a container may hide Linux's counter."""
    killed = record["outcome"] == "crashed" and record["error"]["kind"] == "SIGKILL" and case.device == "cpu"
    return record["outcome"] == "oom" or killed


def find_max_batches(
    sweep: Sweep,
    out_dir: Path,
    options: RunOptions | None = None,
    *,
    limit: int = MAX_BATCH,
    resume: bool = False,
    retry: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[RunResult, list[MaxBatchResult]]:
    """Finds the largest batch that runs, for all cases of ``sweep`` that differ in more than the batch size.

    Every try is a record of the run; a resumed search does not repeat recorded tries. The results are also written to
    ``max_batch.json``.

    Args:
        sweep: the cases. Without a memory limit the smallest batch size of a case is tried first, else the predicted.
        out_dir: folder of the run, as for ``run_sweep``.
        options: how each try is run; by default as ``run_sweep`` chooses.
        limit: the largest batch that is tried.
        resume: continue the search in ``out_dir``.
        retry: outcomes whose recorded tries are repeated when resumed.
        progress: receives what happens; by default it is written to standard error.

    Raises:
        SweepError: ``limit`` is below 1, several blocks are asked for, or an option splits the batch.
        RunFolderError: the folder cannot be used.
    """
    if options is None:
        options = RunOptions.recorded(RunFolder(out_dir).settings() if resume else {})
    problems = [f"max-batch-limit is {limit}: it must be an integer of at least 1."] if limit < 1 else []
    if options.blocks not in (None, 1):
        problems.append(
            f"blocks is {options.blocks}: each try of --max-batch has one block: leave it out, or ask for 1."
        )
    if any(case.options.engine.micro_batch_size or case.options.ppo.num_mini_batches > 1 for case in sweep.cases):
        problems.append(
            "--max-batch tries each batch whole: leave out engine.micro_batch_size and ppo.num_mini_batches."
        )
    if problems:
        raise SweepError(problems)
    found: list[MaxBatchResult] = []

    def search(cases: Runner, absolute: Sweep) -> None:
        for case in _smallest_batches(absolute):
            usable_bytes, available_bytes = _memory_limits(case, options)
            planned = None if usable_bytes is None else _planned(case, usable_bytes, limit)
            cases.memory_limit_bytes = min(filter(None, (options.memory_limit_bytes, available_bytes)), default=None)
            found.append(_search(case, cases, planned, limit=limit, available_bytes=available_bytes, options=options))
            _write(out_dir, found)

    result = runner.run_cases(
        search, sweep, out_dir, options, resume=resume, retry=retry, progress=progress, max_batch_limit=limit
    )
    return result, found


def _search(
    case: Case,
    cases: Runner,
    planned: int | None,
    *,
    limit: int,
    available_bytes: int | None,
    options: RunOptions,
) -> MaxBatchResult:
    """Searches from the planned batch where that is safe; on a CPU, no first try is larger than the plan."""
    if available_bytes is not None and planned == 0:
        asked = options.memory_limit_bytes
        if asked is not None and asked < available_bytes - _PROCESS_BYTES:
            room = f"{asked / _GIB:.3g} GiB of --memory-limit"
        else:
            room = f"{available_bytes / _GIB:.3g} GiB that are available"
        reason = f"batch 1 does not fit into the {room}, by its plan."
        return MaxBatchResult(
            case=case, largest_ok=None, smallest_failing=None, stopped_because=reason, planned=0, tries=()
        )
    if planned and (available_bytes is None or options.memory_limit_bytes is not None or planned < case.batch_size):
        case = dataclasses.replace(case, batch_size=planned)
    return MaxBatchSearch(case, limit=limit, available_bytes=available_bytes).run(cases.try_case, planned=planned)


def _smallest_batches(sweep: Sweep) -> Iterator[Case]:
    """The cases of ``sweep`` that differ in more than the batch size, each with its smallest."""
    smallest: dict[Case, int] = {}
    for case in sweep.cases:
        kind = dataclasses.replace(case, batch_size=1)
        smallest[kind] = min(case.batch_size, smallest.get(kind, case.batch_size))
    for kind, batch_size in smallest.items():
        yield dataclasses.replace(kind, batch_size=batch_size)


def _memory_limits(case: Case, options: RunOptions) -> tuple[int | None, int | None]:
    """(bytes that a predicted batch must fit into, bytes that a try must not exceed), each ``None`` if unknown.

    On a CPU the ranks of a case that are on this machine share its memory.
    """
    limit = options.memory_limit_bytes
    if case.device == "cpu":
        launch, world_size = find_launch(), case.options.parallel.world_size
        available_bytes = host.available_bytes() // (world_size if launch is None else launch.num_local(world_size))
        usable_bytes = max(0, available_bytes - _PROCESS_BYTES)
        return min(usable_bytes, limit or usable_bytes), available_bytes
    total_bytes = device_bytes(case.device)
    if total_bytes is None:
        return limit, None
    usable_bytes = Accelerator(name=case.device, memory_bytes=total_bytes).usable_bytes
    return min(usable_bytes, limit or usable_bytes), None


def _planned(case: Case, usable_bytes: int, limit: int) -> int | None:
    """The largest batch that is predicted to fit, at most ``limit``; ``None`` if the case cannot be planned."""
    from rlhfbench.planning.max_batch import BatchSearch

    try:
        return BatchSearch(usable_bytes, None, limit).largest(dataclasses.replace(case, batch_size=1))
    except RlhfKernelsError:
        return None


def max_batch_frame(found: list[MaxBatchResult]) -> pd.DataFrame:
    """The data frame that ``rlhfreports.max_batch`` draws: one row a result."""
    import pandas as pd

    from rlhfreports.columns import with_short_options
    from rlhfreports.ranks import other_options

    cases = [{"case": item.case.to_dict()} for item in found]
    rows = pd.DataFrame(
        {
            "title": [item.case.role_table.title for item in found],
            "setting": [setting_of(dataclasses.asdict(item.case.options)) for item in found],
            "lora_rank": [item.case.options.lora.r for item in found],
            "options": [other_options(options_text(case)) for case in cases],
            "seed": [item.case.seed for item in found],
            "strategy": [strategy(case) for case in cases],
            "world_size": [item.case.options.parallel.world_size for item in found],
            "model": [item.case.model for item in found],
            "seq_len": [item.case.seq_len for item in found],
            "planned": pd.array([item.planned for item in found], dtype="Int64"),
            "largest_ok": pd.array([item.largest_ok for item in found], dtype="Int64"),
            "smallest_failing": pd.array([item.smallest_failing for item in found], dtype="Int64"),
            "num_tries": [len(item.tries) for item in found],
            "stopped_because": [item.stopped_because for item in found],
        }
    )
    return with_short_options(rows)


def _write(out_dir: Path, found: list[MaxBatchResult]) -> None:
    try:
        write_atomically(out_dir / RESULT_NAME, json.dumps([item.to_dict() for item in found], indent=1) + "\n")
    except OSError as error:
        raise RunFolderError(f"out '{out_dir}' cannot be written: {error.strerror}.") from error
