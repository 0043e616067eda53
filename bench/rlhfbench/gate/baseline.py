"""A stored run as the base: memory is always judged, times only on the same machine and environment."""

from __future__ import annotations

from pathlib import Path

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import GateError
from rlhfbench.files import write_atomically
from rlhfbench.gate.compare import GateOptions
from rlhfbench.gate.decide import SIGNIFICANCE, Effects, estimate_unpaired
from rlhfbench.gate.findings import Finding, failure, findings_of, judged
from rlhfbench.records.blocks import block_values
from rlhfbench.records.file import Record, read_records
from rlhfbench.runs import environment
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case


def baseline_sweep(folder: Path) -> Sweep:
    """Returns the sweep of a stored run.

    Raises:
        GateError: the folder holds no run, or one without records.
    """
    run = RunFolder(folder)
    if not run.is_run:
        raise GateError(f"baseline '{folder}' holds no run: make one with rlhfbench run --out.")
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


def baseline_findings(base: Path, head: Path, effects: Effects, *, times_obstacle: str | None) -> list[Finding]:
    """Returns the findings of every case that either run has.

    Args:
        base: Folder of the stored run.
        head: Folder of the new run.
        effects: What counts.
        times_obstacle: One sentence on why times cannot be compared; ``None`` if they can.
    """
    sides = [{r["case"]["id"]: r for r in read_records(folder)} for folder in (base, head)]
    cases = {case.id: case for folder in (base, head) for case in RunFolder(folder).load_sweep().cases}
    paired = findings_of(
        cases.values(), lambda case: sides[0].get(case.id), lambda case: sides[1].get(case.id), effects, SIGNIFICANCE
    )
    # Blocks of two runs are no pairs: times are estimated anew.
    findings = [found for found in paired if not found.quantity.endswith(" s") and found.quantity != "times"]
    for case in cases.values():
        old, new = (side.get(case.id) for side in sides)
        if old is not None and new is not None and failure(old) is failure(new) is None:
            findings += _times(case, old, new, times_obstacle)
    return judged(findings, SIGNIFICANCE, effects)


def _times(case: Case, base: Record, head: Record, obstacle: str | None) -> list[Finding]:
    """The times of one case, not judged yet, or one finding on why they cannot be."""
    values = [_counted_values(record) for record in (base, head)]
    if obstacle is None and min(map(len, values)) < 2:
        obstacle = "a side has fewer than two blocks."
    if obstacle is not None:
        return [Finding(case=case, quantity="times", verdict="ambiguous", reason=obstacle)]
    found = []
    for name in dict.fromkeys(name for side in values for value in side for name in value):
        seconds = [[value[name] for value in side if value.get(name, 0) > 0] for side in values]
        if min(map(len, seconds)) >= 2:
            means = [sum(side) / len(side) for side in seconds]
            estimated = estimate_unpaired(*seconds)
            quantity = f"{name} s"
            found.append(
                Finding(
                    case=case, quantity=quantity, verdict="ambiguous", base=means[0], head=means[1], estimate=estimated
                )
            )
    return found


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
        KeyboardInterrupt: Ctrl-C ended the new run.
    """
    cases = baseline_sweep(baseline)
    settings = RunFolder(baseline).settings()
    threads = {} if options.num_threads is None else {"num_threads": options.num_threads}
    if run_sweep(cases, out, RunOptions.recorded({**settings, **threads, "with_plan": False})).interrupted:
        raise KeyboardInterrupt
    obstacle = None if memory_only else time_obstacle(baseline, out)
    findings = baseline_findings(baseline, out, options.effects, times_obstacle=obstacle)
    return [found for found in findings if not memory_only or found.quantity.startswith("memory") or not found.quantity]


def update_baseline(head: Path, baseline: Path) -> None:
    """Replaces the stored run by ``head``: what the gate reads of it, without logs and pictures.

    Raises:
        GateError: ``baseline`` holds something else, or cannot be written.
    """
    if baseline.exists() and any(baseline.iterdir()) and not RunFolder(baseline).is_run:
        raise GateError(f"baseline '{baseline}' holds files of something else: name an empty or a new folder.")
    try:
        baseline.mkdir(parents=True, exist_ok=True)
        # The records last: with the others alone, the folder is a run that lacks its cases.
        for name in ("sweep.toml", "environment.json", "records.jsonl"):
            write_atomically(baseline / name, (head / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise GateError(f"baseline '{baseline}' cannot be written: {error.strerror}.") from error
