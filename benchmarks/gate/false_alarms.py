"""Compares a commit with itself many times, on a quiet machine and beside a busy process, and counts false alarms.

    python benchmarks/gate/false_alarms.py OUT

Each gate compares ten cases on ``tiny``. A comparison is one of them: 10 gates of each kind are 200 comparisons. Those
of a gate are appended to OUT/comparisons.jsonl as it ends. The same command goes on where an earlier one was
interrupted, and prints the rates of all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cli.common import make_sweep
from rlhfbench.errors import GateError
from rlhfbench.gate import sides
from rlhfbench.gate.compare import Comparison, GateOptions
from rlhfbench.gate.findings import Finding

METHODS = [
    "full", "lora", "dynamic-lora", "joined-hydra", "hydra", "sft", "sft-lora", "dpo", "dpo-lora", "best-of-n",
]  # fmt: skip
CHANGES = ("slower", "faster", "larger", "smaller", "missing", "failed")
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
    if any(row["commit"] != commit for row in done):
        raise GateError(f"'{path}' holds comparisons of another commit: name a new folder.")
    counted = {(row["gate"], row["busy"]) for row in done}
    # Quiet and busy gates take turns, so that an interrupted command has about as many of each.
    wanted = [(gate, busy) for gate in range(given.gates) for busy in (False, True)]
    with sides.only_gate():
        for gate, busy in wanted:
            if (gate, busy) in counted:
                continue
            started_s = time.monotonic()
            with _busy_process() if busy else contextlib.nullcontext():
                findings = _gate(root, commit, given.budget_s, seed=gate)
            rows = [{"commit": commit, "gate": gate, "busy": busy, **row} for row in _rows(findings)]
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            done += rows
            alarms = sum(bool(row["alarms"]) for row in rows)
            kind = "busy" if busy else "quiet"
            print(f"gate {gate} {kind}: {alarms} false alarms, {time.monotonic() - started_s:.0f} s", flush=True)
    return _print_rates(done)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the comparisons")
    parser.add_argument("--gates", type=int, default=10, help="gates of each kind, of ten comparisons each")
    parser.add_argument("--budget-s", type=float, default=60.0, help="seconds of a case")
    return parser.parse_args()


@contextlib.contextmanager
def _busy_process() -> Iterator[None]:
    """Keeps one core busy until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _gate(root: Path, commit: str, budget_s: float, *, seed: int) -> list[Finding]:
    """The findings of one gate whose sides are two copies of ``commit``."""
    cases = make_sweep({"methods": METHODS, "seq_lens": [32], "batch_sizes": [2]}, None, None)
    roots = sides.module_roots(root, with_working_folder=False)
    with (
        sides.checked_out(commit, root, "base", roots) as base,
        sides.checked_out(commit, root, "head", roots) as head,
        tempfile.TemporaryDirectory() as out,
    ):
        return Comparison(base, head, cases, Path(out), GateOptions(budget_s=budget_s), seed=seed).run()


def _rows(findings: Sequence[Finding]) -> Iterator[dict[str, Any]]:
    """Yields one row per case."""
    for case in {found.case.id: found.case for found in findings}.values():
        own = [found for found in findings if found.case.id == case.id]
        estimates = {found.quantity: found.estimate for found in own if found.estimate is not None}
        yield {
            "method": case.method,
            "alarms": {found.quantity: found.verdict for found in own if found.verdict in CHANGES},
            "ambiguous": [found.quantity for found in own if found.verdict == "ambiguous"],
            "num_quantities": len(own),
            "num_pairs": max((ratio.num_pairs for ratio in estimates.values()), default=0),
            "intervals": {name: [ratio.low, ratio.ratio, ratio.high] for name, ratio in estimates.items()},
        }


def _print_rates(rows: Sequence[dict[str, Any]]) -> int:
    """Prints the rates of quiet and busy comparisons; returns 1 if there was a false alarm."""
    for busy in (False, True):
        own = [row for row in rows if row["busy"] is busy]
        alarms = sum(bool(row["alarms"]) for row in own)
        unsure = sum(bool(row["ambiguous"]) for row in own)
        kind = "beside a busy process" if busy else "on the machine as it is"
        print(f"{kind}: {alarms} false alarms and {unsure} without an answer in {len(own)} comparisons")
    return int(any(row["alarms"] for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GateError as error:
        sys.exit(f"{error}")
