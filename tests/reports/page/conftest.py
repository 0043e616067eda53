"""Runs for the page, from the few cells that matter to a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest

from rlhfreports.page.data import Run

GIB = 2**30


def timeline() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    points = pd.DataFrame({"event": [1, 2, 3, 4], "base_part_bytes": [GIB] * 4, "kv_cache_part_bytes": [0] * 4})
    points["activations_part_bytes"] = [0, GIB, 2 * GIB, 0]
    phases = pd.DataFrame({"phase": ["score", "update_actor"], "first_event": [1, 3], "last_event": [3, 4]})
    tensors = pd.DataFrame(
        {
            "part": ["base", "activations", "activations"],
            "bytes": [GIB, GIB, GIB],
            "born_event": [1, 2, 4],
            "first_event": [1, 2, 4],
            "end_event": [5, 4, 5],
            "shape": ["16 × 4", "8 × 4", "2"],
            "dtype": "float32",
            "op": [None, "aten.mm.default", "aten.add.Tensor"],
        }
    )
    return points, phases, tensors


def blocks(case_ids: list[str]) -> pd.DataFrame:
    rows = [
        {
            "case_id": case_id,
            "block": block,
            "started_at": f"2026-01-01T00:0{block}:00Z",
            "total_s_per_sample": 1.0 + 0.1 * block,
            "other_cpu_share": 0.2 * block,
            "steal_share": None,
            "cpu_mhz": 2000.0,
            "disturbed_by": "other processes took 20 % of the CPUs" if block else None,
        }
        for case_id in case_ids
        for block in range(2)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def make_run(make_frame: Callable[..., pd.DataFrame]) -> Callable[..., Run]:
    """A run of the given rows; with all that a folder can have beside records, unless ``bare``."""

    def make(*rows: Mapping[str, Any], name: str = "a run", bare: bool = False, **environment: Any) -> Run:
        numbered = [{"case_id": f"case{i}", **row} for i, row in enumerate(rows)]
        frame = make_frame(*numbered)
        if bare:
            return Run(name=name, frame=frame)
        ids = [str(case_id) for case_id in frame["case_id"]]
        return Run(
            name=name,
            frame=frame,
            blocks=blocks(ids),
            environments=[{"argv": ["rlhfbench", "run"], "host": "here", **environment}],
            sweep='device = "cpu"\n',
            timelines={case_id: timeline() for case_id in ids[:1]},
        )

    return make


MEASURED: dict[str, Any] = {
    "base_part_bytes": GIB,
    "activations_part_bytes": GIB // 2,
    "total_block_s_per_sample": [0.9, 1.1],
    "total_half_width_s_per_sample": 0.3,
    "num_timed_blocks": 2,
    "num_disturbed_blocks": 1,
    "num_counted_blocks": 1,
    "disturbed_by": "other processes took 20 % of the CPUs",
    "predicted_model_bytes": GIB,
    "predicted_activation_bytes": GIB // 2,
    "predicted_total_bytes": 2 * GIB,
    "stopped_because": "precise",
}
ROWS: tuple[dict[str, Any], ...] = tuple(
    {**MEASURED, "method": method, "prompt_len": prompt_len, "batch_size": batch_size, "lora_rank": lora_rank}
    for method in ("lora", "hydra")
    for prompt_len in (32, 64)
    for batch_size, lora_rank in ((1, 8), (2, 8), (2, 16))
)


@pytest.fixture
def rows() -> tuple[dict[str, Any], ...]:
    """Rows of a run that has something for every section."""
    failed = {"method": "full", "prompt_len": 64, "outcome": "oom", "error": "out of memory.", "lora_rank": 8}
    return (*ROWS, failed)
