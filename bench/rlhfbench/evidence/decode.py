"""Part 5: decoding against the time that reading the weights and the KV cache takes at the measured bandwidth."""

from __future__ import annotations

import functools
import gc
import statistics
from pathlib import Path
from typing import Any

import torch

from rlhfbench.errors import EvidenceError
from rlhfbench.evidence.items import Items
from rlhfbench.evidence.request import Request
from rlhfbench.measure.ceilings import RATES, measure_ceilings
from rlhfbench.measure.clock import StepClock
from rlhfkernels.data.sources import Prompts
from rlhfkernels.errors import RlhfKernelsError
from rlhfkernels.training.step import TrainingStep, build_step
from rlhfkernels.training.work import phase_work

_NUM_TIMED = 3
# ``engine.cuda_graphs`` by what an item says of it. ``on``, as ``auto`` would measure steps without graphs under its
# name where a capture fails.
GRAPHS = {"with graphs": "on", "without graphs": "off"}


def run_decode(request: Request, folder: Path, left_s: float) -> None:
    """Measures the generate phase of ``hydra`` at each batch and keeps it in ``decode.json``.

    On CUDA with CUDA graphs and without.

    Raises:
        EvidenceError: none of them could be measured.
    """
    items = Items(folder / "decode.json")
    items.values = {key: item for key, item in items.values.items() if "failed" not in item}  # they are tried again
    ceilings = items.add("ceilings", lambda: measure_ceilings(request.device, getattr(torch, request.sizes.dtype)))
    for batch_size in request.sizes.decode_batches:
        for by in GRAPHS if request.device != "cpu" else ("without graphs",):
            items.add(f"batch {batch_size}, {by}", functools.partial(_tried, request, batch_size, by, ceilings))
    batches = [item for key, item in items.values.items() if key.startswith("batch ")]
    if all("failed" in item for item in batches):
        raise EvidenceError(f"no batch could be decoded: {batches[-1]['failed']}")


def _tried(request: Request, batch_size: int, by: str, ceilings: dict[str, float]) -> dict[str, Any]:
    """Returns ``batch_size``, ``by``, and what ``_measure`` found or ``failed``: one must not hide the others."""
    gc.collect()  # the models of the last batch are in reference cycles
    found: dict[str, Any] = {"batch_size": batch_size, "by": by}
    try:
        return found | _measure(request, batch_size, GRAPHS[by], ceilings)
    except (RuntimeError, RlhfKernelsError) as error:  # of CUDA, out of memory too; of a model without graphs
        return found | {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _measure(request: Request, batch_size: int, cuda_graphs: str, ceilings: dict[str, float]) -> dict[str, Any]:
    case = request.case("hydra", batch_size=batch_size, engine__cuda_graphs=cuda_graphs)
    step = build_step(case)
    samples_s = [_generation_s(step) for _ in range(1 + _NUM_TIMED)][1:]
    work = phase_work(step)["generate"]
    floor_s = work.floor_s(*(ceilings[rate] for rate in RATES))
    median_s = statistics.median(samples_s)
    return {
        "prompt_len": case.prompt_len,
        "completion_len": case.completion_len,
        "samples_s": samples_s,
        "ms_per_token": 1000 * median_s / case.completion_len,
        "floor_s": floor_s,
        "floor_fraction": floor_s / median_s,
        "backend": step.backend_used,
    }


def _generation_s(step: TrainingStep) -> float:
    """Seconds of one generation from random prompts."""
    case, stage = step.case, step.method.generate
    assert stage is not None
    shape = (case.batch_size, case.prompt_len)
    prompts = Prompts(torch.randint(step.engine.vocab_size, shape, device=case.device), None)
    clock = StepClock(case.device)
    with clock.phase("generate"):
        step.engine.generate(stage.role, prompts, None, clock)
    return clock.take()["generate"]
