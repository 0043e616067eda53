"""A stored run as the base: memory is always judged, times only on the same machine and environment."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError, RecordsError, RunFolderError, SweepError
from rlhfbench.files import write_atomically
from rlhfbench.gate.compare import GateOptions
from rlhfbench.gate.decide import SIGNIFICANCE, Effects, estimate_unpaired
from rlhfbench.gate.findings import Finding, failure, findings_of, one_sided
from rlhfbench.records.blocks import block_values
from rlhfbench.records.derived import at
from rlhfbench.records.file import RECORDS_NAME, Record, read_records
from rlhfbench.runs import environment
from rlhfbench.runs.drawing import remove_drawings
from rlhfbench.runs.folder import ENVIRONMENT_NAME, SWEEP_NAME, RunFolder
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep
from rlhfbench.runs.titles import Titles
from rlhfkernels.config.case import Case
from rlhfkernels.config.content import content_hash


def baseline_sweep(folder: Path) -> Sweep:
    """Returns the sweep of a stored run.

    Raises:
        GateError: the folder holds no run, one without records, or one that cannot be read.
    """
    run = RunFolder(folder)
    if not run.is_run:
        raise GateError(f"baseline '{folder}' holds no run: make one with rlhfbench run --out.")
    try:
        if not run.sweep_path.is_file():
            raise GateError(f"baseline '{folder}' has no {run.sweep_path.name}: it cannot be run again.")
        if not read_records(folder):
            raise GateError(f"baseline '{folder}' holds no records: nothing can be compared with it.")
        run.environments()
        return Sweep.from_file(run.sweep_path)
    except (RecordsError, RunFolderError, SweepError) as error:
        raise GateError(f"baseline '{folder}' cannot be compared with: {str(error).splitlines()[0]}") from error


def time_obstacle(base: Path, head: Path) -> str | None:
    """Returns one sentence on why times of two runs cannot be compared; ``None`` if they can."""
    earlier, now = RunFolder(base).environments(), RunFolder(head).environments()
    if not earlier or not now:
        return "Times are not judged: the environment of the baseline is not recorded."
    # The cases of a cluster ran on its nodes.
    machines = [each for segment in earlier for each in (segment, *(segment.get("nodes") or {}).values())]
    # Threads are compared by case: the environment has those that were asked for.
    changed = environment.differences(now[0], machines, without=("commit", "sources", "rlhfbench", "threads"))
    return f"Times are not judged: {'; '.join(changed)}." if changed else None


def baseline_findings(base: Path, head: Path, effects: Effects, *, times_obstacle: str | None) -> list[Finding]:
    """Returns the findings of every case that either run has.

    Args:
        base: Folder of the stored run.
        head: Folder of the new run.
        effects: What counts.
        times_obstacle: One sentence on why times cannot be compared; ``None`` if they can.
    """
    old, new = ({r["case"]["id"]: r for r in read_records(folder)} for folder in (base, head))
    cases = {case.id: case for folder in (base, head) for case in RunFolder(folder).load_sweep().cases}

    def times_of(case: Case, base: Record, head: Record) -> Iterator[Finding]:
        return _times(case, base, head, times_obstacle)

    return findings_of(cases.values(), old, new, effects, SIGNIFICANCE, times_of)


def _times(case: Case, base: Record, head: Record, obstacle: str | None) -> Iterator[Finding]:
    """Yields the times of one case, not judged yet, or one finding on why they cannot be."""
    values = [_counted_values(record) for record in (base, head)]
    if obstacle is None and base["num_threads"] != head["num_threads"]:
        obstacle = f"Times are not judged: {head['num_threads']} threads instead of {base['num_threads']}."
    if obstacle is None and min(map(len, values)) < 2:
        obstacle = "a side has fewer than two blocks."
    if obstacle is not None:
        yield Finding(case=case, quantity="times", verdict="ambiguous", reason=obstacle)
        return
    for name in dict.fromkeys(name for side in values for value in side for name in value):
        seconds = [[value[name] for value in side if name in value] for side in values]
        if not all(seconds):
            yield one_sided(case, f"{name} s", in_base=bool(seconds[0]))
            continue
        base_s, head_s = map(statistics.fmean, seconds)
        known = Finding(case=case, quantity=f"{name} s", verdict="same", base=base_s, head=head_s)
        if min(map(min, seconds)) > 0:
            yield dataclasses.replace(known, estimates=(estimate_unpaired(*seconds),))
        elif base_s or head_s:
            yield dataclasses.replace(known, verdict="ambiguous", reason="it took no time in some blocks.")
        else:
            yield known


def _counted_values(record: Record) -> list[dict[str, float]]:
    """Seconds by quantity of the blocks of ``record`` that count."""
    counted = record["latency"]["total_block_s_per_sample"] or ()
    pairs = zip(block_values(record), counted, strict=False)
    return [value for value, total in pairs if value is not None and total is not None]


def compare_with_run(baseline: Path, out: Path, options: GateOptions, *, memory_only: bool = False) -> list[Finding]:
    """Runs the cases of a stored run again, with its settings, and compares.

    Args:
        baseline: Folder of the stored run.
        out: A new folder for the new run.
        options: How to compare.
        memory_only: Judge no times.

    Raises:
        GateError: The baseline cannot be compared with, or a data file has changed since it was made.
        KeyboardInterrupt: Ctrl-C ended the new run.
    """
    cases = baseline_sweep(baseline)
    _check_data_files(baseline, cases)
    settings = RunFolder(baseline).settings()
    threads = {"num_threads": options.num_threads or settings.get("num_threads") or _threads(baseline)}
    if run_sweep(cases, out, RunOptions.recorded({**settings, **threads, "with_plan": False})).interrupted:
        raise KeyboardInterrupt
    obstacle = None if memory_only else time_obstacle(baseline, out)
    findings = baseline_findings(baseline, out, options.effects, times_obstacle=obstacle)
    return [found for found in findings if not memory_only or found.is_memory or not found.quantity]


def _check_data_files(baseline: Path, cases: Sweep) -> None:
    """Refuses data that have changed: the code would be blamed for what other rows take."""
    environments = RunFolder(baseline).environments()
    before = environments[0].get("data_files") if environments else None
    for file in dict.fromkeys(case.data_file for case in cases.cases if case.data_file is not None):
        now = content_hash(file)
        if isinstance(before, dict) and before.get(file, now) != now:
            raise GateError(
                f"data file '{file}' is not that of baseline '{baseline}': make a new one in another folder."
            )


def _threads(baseline: Path) -> int | None:
    """The threads of the cases of a stored run, whose scratch buffers grow with them; ``None`` if cases differ."""
    found = {record["num_threads"] for record in read_records(baseline)} - {None}
    return found.pop() if len(found) == 1 else None


def storing_obstacle(run: Path) -> str | None:
    """Returns one sentence on the first case of ``run`` that failed, which keeps it from being a baseline.

    A gate against such a run could never pass: the base has no figures of the case. ``None`` if no case failed.
    """
    records = {record["case"]["id"]: record for record in read_records(run)}
    cases = RunFolder(run).load_sweep().cases
    for case in cases:
        why = failure(records.get(case.id))
        if why is not None:
            return f"The run is not stored as a baseline: case {Titles(cases)(case)} failed: {why.rstrip('.')}."
    return None


def run_title(run: Path) -> str:
    """Returns a new run in words: with the commit of this package's checkout, and whether that had other changes.

    Raises:
        RunFolderError: the environment cannot be read.
    """
    now = next(iter(RunFolder(run).environments()), {})
    commit = at(now, "source.commit")
    changes = " with uncommitted changes" if at(now, "source.dirty") else ""
    return "a new run" if commit is None else f"a new run at {commit[:10]}{changes}"


def update_baseline(head: Path, baseline: Path) -> None:
    """Replaces the stored run by ``head``: what the gate reads of it and its timelines, without logs and traces.

    Logs, traces, tables and pictures of the run that was stored before are removed: they would pass as the new one's.

    Raises:
        GateError: ``baseline`` holds something else, or cannot be written.
    """
    if baseline.exists() and any(baseline.iterdir()) and not RunFolder(baseline).is_run:
        raise GateError(f"baseline '{baseline}' holds files of something else: name an empty or a new folder.")
    try:
        baseline.mkdir(parents=True, exist_ok=True)
        # Old records are gone before the files that they would be read with change, and new ones come last: without
        # them, the folder is a run that lacks its cases.
        (baseline / RECORDS_NAME).unlink(missing_ok=True)
        new, old = RunFolder(head), RunFolder(baseline)
        remove_drawings(baseline)
        for folder in (old.logs_dir, old.traces_dir, old.timelines_dir):
            if folder.exists():
                shutil.rmtree(folder)
        timelines = sorted(str(path.relative_to(head)) for path in new.timelines_dir.glob("*.json"))
        if timelines:
            old.timelines_dir.mkdir()
        for name in (SWEEP_NAME, ENVIRONMENT_NAME, *timelines, RECORDS_NAME):
            write_atomically(baseline / name, (head / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise GateError(f"baseline '{baseline}' cannot be written: {error.strerror or error}.") from error
