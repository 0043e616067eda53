"""Compares a commit with itself many times, and counts the answers.

    python benchmarks/gate/comparisons.py OUT
    python benchmarks/gate/comparisons.py OUT --busy
    python benchmarks/gate/comparisons.py OUT --slower 0.1
    python benchmarks/gate/comparisons.py OUT --held

Each gate compares ten cases on ``tiny``. A comparison is one of them: 10 gates are 100 comparisons. With ``--slower``
the longest phase of every case is that much slower in the head; with ``--held`` a tensor of 64 kB is held there over
each step. The comparisons of a gate are appended to OUT/comparisons.jsonl as it ends. The same command goes on where an
earlier one was interrupted, also at a later commit with the same code of the gate, and prints the rates of all, and
those of two other tools' rules: of the steps of the first and the last pair of each comparison, they are asked about
every time that the gate is asked about.

Two of them may run at once, each the other's busy process, if each has a core and temporary files of its own:

    TMPDIR=$(mktemp -d) taskset -c 0 python benchmarks/gate/comparisons.py OUT-0 &
    TMPDIR=$(mktemp -d) taskset -c 1 python benchmarks/gate/comparisons.py OUT-1 --first 10
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep
from rlhfbench.cli.cases import make_sweep
from rlhfbench.errors import GateError
from rlhfbench.gate import sides
from rlhfbench.gate.compare import CHANGES, Comparison, Fault, GateOptions
from rlhfbench.gate.findings import Finding
from rlhfbench.gate.other_rules import OTHERS
from rlhfbench.gate.selftest import held_tensor, slower_phase
from rlhfbench.gate.simulation import MeasuredCase, measured_cases

METHODS = [
    "full", "lora", "dynamic-lora", "joined-hydra", "hydra", "sft", "sft-lora", "dpo", "dpo-lora", "best-of-n",
]  # fmt: skip
ALARMS = (*CHANGES, "missing", "failed")
# What decides: comparisons by the same of these count together.
_JUDGEMENT = tuple(
    f"bench/rlhfbench/{path}.py"
    for path in (
        "gate/compare", "gate/decide", "gate/pairs", "gate/findings", "measure/turns", "measure/statistic",
        "measure/cores", "measure/interference",
    )
)  # fmt: skip
_BUDGET_S = 60.0
# Of rows that do not say it.
_DEFAULTS = {"held": False, "budget_s": _BUDGET_S}
# Ends with its parent.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"


def main() -> int:
    """Runs the gates that are missing and prints the rates; returns 1 if there was a false alarm."""
    given = _arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "comparisons.jsonl"
    root = sides.repository()
    commit = sides.commit_of("HEAD", root)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    about = {
        "judgement": _judgement(root, commit),
        "slower": given.slower,
        "held": given.held,
        "busy": given.busy,
        "budget_s": given.budget_s,
    }
    done = [{**_DEFAULTS, **row} for row in done]
    if any(row[name] != value for row in done for name, value in about.items()):
        raise GateError(f"'{path}' holds comparisons by other code, fault, load or --budget-s: name a new folder.")
    counted = {row["gate"] for row in done}
    with sides.only_gate():
        slowed = _measured_cases(root, commit) if given.slower else []
        for gate in range(given.first, given.first + given.gates):
            if gate in counted:
                continue
            started_s = time.monotonic()
            with _busy_process() if given.busy else contextlib.nullcontext():
                findings, spent_s, others = _gate(root, commit, given, slowed, seed=gate)
            rows = [
                {"commit": commit, **about, "gate": gate, **row}
                for row in _rows(findings, slowed, spent_s, others, held=given.held)
            ]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            done += rows
            print(f"gate {gate}: {_rates(rows)}, {time.monotonic() - started_s:.0f} s", flush=True)
    print(f"all: {_rates(done)}")
    for name in OTHERS:
        print(f"    {name}: {_rates_of_other(done, name)}")
    return int(any(row["alarms"] for row in done))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the comparisons")
    parser.add_argument("--gates", type=_num_gates, default=10, help="gates, of ten comparisons each")
    parser.add_argument("--first", type=int, default=0, help="number of the first gate, which seeds its order")
    parser.add_argument("--budget-s", type=_budget_s, default=_BUDGET_S, help="seconds of a case")
    parser.add_argument("--busy", action="store_true", help="beside a process that keeps one core busy")
    fault = parser.add_mutually_exclusive_group()
    fault.add_argument("--slower", type=float, default=0.0, metavar="X", help="share by which a phase is slower")
    fault.add_argument("--held", action="store_true", help="hold a tensor of 64 kB over each step")
    return parser.parse_args()


def _num_gates(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number of gates above 0.")
    return int(text)


def _budget_s(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 4 <= value <= 1e6:  # as in ``rlhfbench gate``
        raise argparse.ArgumentTypeError(f"'{text}' must be from 4, for four pairs of blocks, to 1000000.")
    return value


def _judgement(root: Path, commit: str) -> str:
    """A hash of the code that decides.

    Raises:
        GateError: the working tree, whose code decides here, has other code than ``commit``.
    """
    changed = sides.git("diff", "--name-only", commit, "--", *_JUDGEMENT, folder=root).splitlines()
    if changed:
        raise GateError(f"'{changed[0]}' has uncommitted changes, and decides: commit or stash them.")
    objects = sides.git("rev-parse", *(f"{commit}:{path}" for path in _JUDGEMENT), folder=root)
    return hashlib.sha256(objects.encode()).hexdigest()[:12]


@contextlib.contextmanager
def _busy_process() -> Iterator[None]:
    """Keeps one core busy until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _gate(
    root: Path, commit: str, given: argparse.Namespace, slowed: Sequence[MeasuredCase], *, seed: int
) -> tuple[list[Finding], dict[str, float], dict[str, dict[str, list[str]]]]:
    """Runs one gate. In the head, cases of ``slowed`` are slower, or a tensor is held in all cases.

    Returns:
        Its findings; the seconds that each case took; and the times of each case that each other rule flags.
    """
    fault: Fault | None = held_tensor if given.held else None
    if slowed:
        fault = slower_phase({case.case_id: case.longest_phase for case in slowed}, given.slower)
    with _comparison(root, commit, GateOptions(budget_s=given.budget_s), seed) as (comparison, out):
        findings = comparison.run(fault)
        cases = measured_cases(out, comparison.spent_s)
    return findings, comparison.spent_s, {case.case_id: _flagged(case) for case in cases}


def _flagged(case: MeasuredCase) -> dict[str, list[str]]:
    """The times that each other rule flags, between the first and the last pair."""
    first, last = case.pairs[0].steps, case.pairs[-1].steps
    return {
        name: sorted(f"{time} s" for time in rule.flagged(case.quantities, first, last))
        for name, rule in OTHERS.items()
    }


def _measured_cases(root: Path, commit: str) -> list[MeasuredCase]:
    """The cases of a short gate, in the order of their ids."""
    with _comparison(root, commit, GateOptions(budget_s=1.0), 0) as (comparison, out):
        comparison.run()
        return sorted(measured_cases(out, comparison.spent_s), key=lambda case: case.case_id)


@contextlib.contextmanager
def _comparison(root: Path, commit: str, options: GateOptions, seed: int) -> Iterator[tuple[Comparison, Path]]:
    """Yields a comparison of two copies of ``commit``, and the folder of its runs."""
    roots = sides.module_roots(root, with_working_folder=False)
    with (
        sides.checked_out(commit, root, "base", roots) as base,
        sides.checked_out(commit, root, "head", roots) as head,
        sides.temporary_folder() as out,
    ):
        yield Comparison(base, head, _sweep(), out, options, seed=seed), out


@functools.cache
def _sweep() -> Sweep:
    return make_sweep({"methods": METHODS, "seq_lens": [32], "batch_sizes": [2]}, None, None)


def _rows(
    findings: Sequence[Finding],
    slowed: Sequence[MeasuredCase],
    spent_s: Mapping[str, float],
    others: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    held: bool,
) -> Iterator[dict[str, Any]]:
    """Yields one row per case."""
    phases = {case.case_id: case.longest_phase for case in slowed}
    # A slower phase shows in itself, in its kind and in the total. A change of another time is a false alarm.
    affected = {case.case_id: {f"{name} s" for name in case.affected(phases[case.case_id])} for case in slowed}
    for case in {found.case.id: found.case for found in findings}.values():
        own = [found for found in findings if found.case.id == case.id]
        estimates = {found.quantity: found.estimate for found in own if found.estimate is not None}
        changed = {found.quantity: found.verdict for found in own if found.verdict in ALARMS}
        expected = affected.get(case.id, set())
        # The tensor is held over a whole step, so all of its memory may be larger.
        caused = {
            name
            for name, verdict in changed.items()
            if (verdict == "slower" and name in expected)
            or (verdict == "larger" and held and name.startswith("memory "))
        }
        yield {
            "method": case.method,
            "slowed": phases.get(case.id),
            "found": bool(caused),
            "alarms": {name: verdict for name, verdict in changed.items() if name not in caused},
            "ambiguous": [found.quantity for found in own if found.verdict == "ambiguous"],
            "num_quantities": len(own),
            "num_pairs": max((ratio.num_pairs for ratio in estimates.values()), default=0),
            "spent_s": spent_s[case.id],
            "expected": sorted(expected),
            "others": others.get(case.id, {}),
            "intervals": {
                name: [round(end, 4) for end in (ratio.low, ratio.ratio, ratio.high)]
                for name, ratio in estimates.items()
            },
        }


def _rates(rows: Sequence[dict[str, Any]]) -> str:
    """One line on ``rows``."""
    faulty = [row for row in rows if row["slowed"] or row["held"]]
    what = "held tensors" if any(row["held"] for row in rows) else "slower cases"
    found = f"{sum(row['found'] for row in faulty)} of {len(faulty)} {what} found, " if faulty else ""
    alarms = sum(bool(row["alarms"]) for row in rows)
    unsure = sum(bool(row["ambiguous"]) for row in rows)
    mean_s = sum(row["spent_s"] for row in rows) / len(rows)
    return (
        f"{found}{alarms} false alarms and {unsure} without an answer in {len(rows)} comparisons, {mean_s:.0f} s a case"
    )


def _rates_of_other(rows: Sequence[dict[str, Any]], name: str) -> str:
    """One line on what another rule flags in ``rows``."""
    flagged = [(set(row["others"].get(name, ())), set(row["expected"])) for row in rows]
    slowed = [times for times, expected in flagged if expected]
    found = sum(bool(times & expected) for times, expected in flagged)
    said = f"{found} of {len(slowed)} slower cases found, " if slowed else ""
    return f"{said}{sum(bool(times - expected) for times, expected in flagged)} false alarms"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GateError as error:
        sys.exit(f"{error}")
