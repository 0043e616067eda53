"""A stored run as the base: memory is always judged, times only on the same machine and environment."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.gate.compare import Finding, GateOptions, findings_of
from rlhfbench.gate.decide import SIGNIFICANCE, Effects, Estimate, estimate_unpaired, judge
from rlhfbench.records.blocks import block_values
from rlhfbench.records.file import Record, read_records
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep


def baseline_sweep(folder: Path) -> Sweep:
    """Returns the sweep of a stored run.

    Raises:
        GateError: the folder holds no run, or one without records.
    """
    run = RunFolder(folder)
    if not run.is_run:
        raise GateError(f"baseline '{folder}' holds no run: make one with rlhfbench run --out, or --update-baseline.")
    if not read_records(folder):
        raise GateError(f"baseline '{folder}' holds no records: nothing can be compared with it.")
    return run.load_sweep()


def time_obstacle(base: Path, head: Path) -> str | None:
    """Returns one sentence on why times of two runs cannot be compared; ``None`` if they can."""
    earlier, now = RunFolder(base).environments(), RunFolder(head).environments()
    if not earlier or not now:
        return "Times are not judged: the environment of the baseline is not recorded."
    changed = environment.differences(now[0], earlier, without=("commit", "rlhfbench"))
    return f"Times are not judged: {'; '.join(changed)}." if changed else None


def baseline_findings(base: Path, head: Path, effects: Effects, *, with_times: bool) -> list[Finding]:
    """Returns the findings of every case that either run has.

    Args:
        base: Folder of the stored run.
        head: Folder of the new run.
        effects: What counts.
        with_times: Judge times too.
    """
    sides = [{r["case"]["id"]: r for r in read_records(folder)} for folder in (base, head)]
    cases = {case.id: case for folder in (base, head) for case in RunFolder(folder).load_sweep().cases}
    findings = findings_of(
        cases.values(), lambda case: sides[0].get(case.id), lambda case: sides[1].get(case.id), effects, SIGNIFICANCE
    )
    memory = [found for found in findings if found.estimate is None]
    if not with_times:
        return memory
    compared = [case for case in cases.values() if all(_is_ok(side.get(case.id)) for side in sides)]
    times = [(case, *found) for case in compared for found in _times(*(side[case.id] for side in sides))]
    verdicts = judge([found for *_, found in times], SIGNIFICANCE, effects)
    for (case, quantity, base_s, head_s, found), verdict in zip(times, verdicts, strict=True):
        memory.append(Finding(case=case, quantity=quantity, verdict=verdict, base=base_s, head=head_s, estimate=found))
    return memory


def _is_ok(record: Record | None) -> bool:
    return record is not None and record["outcome"] == "ok"


def _times(base: Record, head: Record) -> list[tuple[str, float, float, Estimate]]:
    """(quantity, base, head, estimate) of the times that both runs have in two blocks or more."""
    values = [[value for value in block_values(record) if value is not None] for record in (base, head)]
    names = dict.fromkeys(name for side in values for value in side for name in value)
    found = []
    for name in names:
        seconds: list[Sequence[float]] = [[v[name] for v in side if v.get(name, 0) > 0] for side in values]
        if min(map(len, seconds)) >= 2:
            means = [sum(side) / len(side) for side in seconds]
            found.append((f"{name} s", means[0], means[1], estimate_unpaired(*seconds)))
    return found


def compare_with_run(
    baseline: Path, out: Path, options: GateOptions, *, memory_only: bool = False
) -> tuple[list[Finding], str | None]:
    """Runs the cases of a stored run again and compares.

    Args:
        baseline: Folder of the stored run.
        out: A new folder for the new run.
        options: How to compare.
        memory_only: Judge no times.

    Returns:
        The findings, and one sentence on why times were not judged, if they were to be.
    """
    cases = baseline_sweep(baseline)
    run_sweep(cases, out, RunOptions(num_threads=options.num_threads))
    obstacle = None if memory_only else time_obstacle(baseline, out)
    with_times = not memory_only and obstacle is None
    return baseline_findings(baseline, out, options.effects, with_times=with_times), obstacle


def update_baseline(head: Path, baseline: Path) -> None:
    """Replaces the stored run by ``head``: what the gate reads of it, without logs and pictures.

    Raises:
        GateError: ``baseline`` holds something else, or cannot be written.
    """
    if baseline.exists() and any(baseline.iterdir()) and not RunFolder(baseline).is_run:
        raise GateError(f"baseline '{baseline}' holds files of something else: name an empty or a new folder.")
    try:
        baseline.mkdir(parents=True, exist_ok=True)
        for name in ("sweep.toml", "environment.json", "records.jsonl"):
            shutil.copyfile(head / name, baseline / name)
    except OSError as error:
        raise GateError(f"baseline '{baseline}' cannot be written: {error.strerror}.") from error
