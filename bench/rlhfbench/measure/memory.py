"""The memory measurement: one step under a ledger, the views from outside it, and the record's object of both."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rlhfbench.measure import host
from rlhfbench.measure.announcer import Announcer, Notify
from rlhfbench.measure.ledger import ACTIVATION_PARTS, Ledger, block_bytes
from rlhfbench.measure.step import Stats, Step
from rlhfbench.measure.tally import MODEL_PARTS, Tally
from rlhfbench.measure.timeline import Timeline
from rlhfbench.measure.workspaces import workspace_bytes
from rlhfkernels.errors import ModelError
from rlhfkernels.observer import Observer

# Views of memory from outside the ledger; ``None`` when unavailable.
OUTER_VIEWS = (
    "allocator_peak_bytes",
    "allocator_reserved_bytes",
    "workspace_bytes",
    "driver_peak_bytes",
    "host_peak_bytes",
)


def measure_memory(step: Step, device: str, notify: Notify, timeline: Timeline | None = None) -> Ledger:
    """Runs one step under a new ledger and returns the ledger; ``timeline`` follows it."""
    gc.collect()
    ledger = Ledger(
        device,
        on_change=None if timeline is None else timeline.note,
        on_lifetime=None if timeline is None else timeline.note_lifetime,
        block_bytes=block_bytes(device),
    )
    run_under_ledger(step, ledger, Announcer(notify, ledger, *((timeline,) if timeline else ()))).check_finite()
    return ledger


def run_under_ledger(step: Step, ledger: Ledger, observer: Observer) -> Stats:
    """Runs one step inside ``ledger``, after declaring everything that lives between steps."""
    with ledger_of(step, ledger):
        return step.run(observer)


@contextmanager
def ledger_of(step: Step, ledger: Ledger) -> Iterator[None]:
    """Enters ``ledger`` and declares everything that lives between steps."""
    with ledger:
        for part, tensor in step.persistent_tensors():
            ledger.tag(part, (tensor,))
        ledger.track_gradients(step.trained_parameters())
        yield


def persistent_model_bytes(phases: Iterable[Mapping[str, int]]) -> int:
    """Weights, whole gradients and optimizer states: the "model" column of Hydra-RLHF's Table 1.

    It is the highest sum of the model parts at the peak of some phase. The phase with the highest total often has no
    gradients. A user's step whose only phase peaks before its backward lacks them here too.

    Args:
        phases: Bytes by part at the peak of each phase.
    """
    return max(sum(parts[part] for part in MODEL_PARTS) for parts in phases)


def memory_object(ledger: Ledger | Tally, views: dict[str, int | None]) -> dict[str, Any]:
    """Returns the record's ``memory`` object.

    Args:
        ledger: Has seen one step.
        views: Memory views from outside the ledger, by the names in ``OUTER_VIEWS``.

    Raises:
        ModelError: The step entered no phase.
    """
    if ledger.peak_phase is None:
        raise ModelError("no phase was entered while the memory was measured: run(observer) must enter its phases.")
    peaks, largest = ledger.peaks, ledger.largest
    peak = peaks[ledger.peak_phase]
    return {
        "model_bytes": sum(peak.parts[part] for part in MODEL_PARTS),
        "activation_bytes": sum(peak.parts[part] for part in ACTIVATION_PARTS),
        "rollout_bytes": peak.parts["rollout"],
        "total_bytes": peak.total_bytes,
        "persistent_model_bytes": persistent_model_bytes(snapshot.parts for snapshot in peaks.values()),
        "peak_phase": ledger.peak_phase,
        "parts": peak.parts,
        "phases": {
            name: {"total_bytes": snapshot.total_bytes, "parts": snapshot.parts} for name, snapshot in peaks.items()
        },
        "largest_tensor": None
        if largest is None
        else {"bytes": largest.num_bytes, "shape": list(largest.shape), "op": largest.op},
        "views": {
            "ledger_peak_bytes": peak.total_bytes,
            **views,
            "allocator_rest_bytes": _allocator_rest_bytes(peak.total_bytes, views),
        },
    }


def _allocator_rest_bytes(ledger_peak_bytes: int, views: dict[str, int | None]) -> int | None:
    """The CUDA allocator's peak beyond the ledger's peak and the library workspaces; ``None`` when unavailable."""
    allocated, workspaces = views.get("allocator_peak_bytes"), views.get("workspace_bytes")
    return None if allocated is None or workspaces is None else allocated - ledger_peak_bytes - workspaces


@contextmanager
def outer_peaks(device: str) -> Iterator[dict[str, int | None]]:
    """Yields a dictionary that has, after the block, the peaks as allocator and operating system saw them.

    The allocator's are of the block. The resident set's is since the process began, as it is for a case that fails. The
    driver's view stays ``None``: it is sampled from outside this process.
    """
    views: dict[str, int | None] = dict.fromkeys(OUTER_VIEWS)
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    yield views
    views["host_peak_bytes"] = host.peak_resident_bytes()
    if on_cuda:
        views["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device)
        views["allocator_reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        views["workspace_bytes"] = workspace_bytes(device)


def highest_views(*found: Mapping[str, int | None]) -> dict[str, int | None]:
    """The highest number of every view, ``None`` where none has one."""
    given = {name: [views.get(name) for views in found] for name in OUTER_VIEWS}
    return {name: max((n for n in numbers if n is not None), default=None) for name, numbers in given.items()}
