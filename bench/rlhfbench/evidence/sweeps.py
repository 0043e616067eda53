"""The parts that run sweeps: the methods, the lengths, the settings and the profile."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import EvidenceError
from rlhfbench.evidence.items import BATCHES_NAME, Items
from rlhfbench.evidence.request import GIB, PAPER_TOTAL_GIB, PPO_METHODS, Request
from rlhfbench.measure.nvml import device_bytes
from rlhfbench.measure.options import SNAPSHOT_NAME
from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.max_batch import plan_kinds, with_batch
from rlhfbench.planning.zero import Zero
from rlhfbench.records.derived import at
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.options import RunOptions
from rlhfbench.runs.runner import run_sweep
from rlhfkernels.config.case import Case
from rlhfkernels.config.settings import SETTINGS

LENGTH_METHODS = ("hydra", "joined-hydra", "lora")
# Outcomes that another try may change: of a process that was killed, and of a part that ran out of time.
_RETRIED = ("crashed", "timeout")


def run_methods(request: Request, folder: Path, left_s: float) -> None:
    """Part 3: the PPO methods at the paper's lengths, each at its largest batch, with a plan."""
    cases = [request.case(method) for method in PPO_METHODS]
    _run(
        request, folder, "methods", largest(request, folder, cases), left_s, with_plan=True, blocks=request.sizes.blocks
    )


def run_lengths(request: Request, folder: Path, left_s: float) -> None:
    """Part 4: Figure 2, seconds per sample by sequence length at the largest batch."""
    cases = [request.case(m, seq_len=length) for length in request.sizes.seq_lens for m in LENGTH_METHODS]
    _run(request, folder, "lengths", largest(request, folder, cases), left_s)


def run_settings(request: Request, folder: Path, left_s: float) -> None:
    """Part 6: the paper's setting and the modern one side by side, at the largest batch of the paper's."""
    paper = {name.replace(".", "__"): value for name, value in SETTINGS["paper"]["options"].items()}
    paper["lora__r"] = request.sizes.rank
    cases = []
    for method in ("hydra", "lora"):
        for fitting in largest(request, folder, [request.case(method, **paper)]):
            cases += [fitting, request.case(method, batch_size=fitting.batch_size)]
    _run(request, folder, "settings", cases, left_s)


def run_profile(request: Request, folder: Path, left_s: float) -> None:
    """Part 7: traces of the phases of a short step, and on CUDA the allocator's snapshot and the waits of a step."""
    short = request.case("hydra", seq_len=2 * request.sizes.profile_len, batch_size=request.sizes.batch_size or 4)
    _run(request, folder, "profile", [short], left_s, profile=True)
    if request.device != "cpu":  # last: this process then holds the memory of a step
        from rlhfbench.evidence.snapshot import watch_step

        Items(folder / "profile.json").add("step", functools.partial(watch_step, short, folder / SNAPSHOT_NAME))


def _run(request: Request, folder: Path, name: str, cases: Sequence[Case], left_s: float, **options: Any) -> None:
    """Runs ``cases`` in ``folder/runs/name``, or goes on with them.

    Raises:
        EvidenceError: none of them could be measured.
    """
    if not cases:
        return
    out = folder / "runs" / name
    # One block a case where nothing else is asked for: each takes a process that builds the model again.
    options = {"blocks": 1, **options}
    settings = RunOptions(time_budget_s=request.sizes.time_budget_s, case_timeout_s=max(1.0, left_s), **options)
    # A part that is not done is run again: what ended a case from outside may have gone.
    done = run_sweep(Sweep(cases=tuple(cases)), out, settings, resume=RunFolder(out).is_run, retry=_RETRIED)
    if not done.num_ok:
        told = [f"{record['outcome']}: {at(record, 'error.message')}" for record in done.records] or [
            "none was reached"
        ]
        raise EvidenceError(f"no case of '{out}' could be measured: {told[-1]}")


def largest(request: Request, folder: Path, cases: Iterable[Case]) -> list[Case]:
    """Returns ``cases`` with the largest batch that fits by plan, without those of which not even one row fits.

    What must fit is the memory of the device, and no more than the paper's total, so that figures compare with the
    paper's. Batches are kept in ``batches.json`` by the id of the case of one row: 0 is one that does not fit.
    """
    cases = list(cases)
    if request.sizes.batch_size is not None:
        return cases
    items = Items(folder / BATCHES_NAME)
    missing = [case for case in cases if with_batch(case, 1).id not in items.values]
    if missing:
        started_s = time.monotonic()
        planned = plan_kinds(missing, Zero(), usable_bytes=usable_bytes(request.device))
        for case, plan in zip(missing, planned, strict=True):
            found = {"method": case.method, "seq_len": case.seq_len, "batch_size": plan.max_batch_size}
            items.add(with_batch(case, 1).id, lambda found=found: found)  # type: ignore[misc]
        print(f"planned {len(missing)} cases in {time.monotonic() - started_s:.0f} s")
    batches = [(case, items.values[with_batch(case, 1).id]["batch_size"]) for case in cases]
    return [with_batch(case, batch_size) for case, batch_size in batches if batch_size]


def usable_bytes(device: str) -> int:
    """Returns the memory that a step may take: the device's without the reserve, and at most the paper's total."""
    limit = int(PAPER_TOTAL_GIB * GIB)
    memory_bytes = None if device == "cpu" else device_bytes(device)
    if memory_bytes is None:
        return limit
    return min(limit, Accelerator(name=device, memory_bytes=memory_bytes).usable_bytes)
