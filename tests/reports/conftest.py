"""Frames as the harness makes them, from the few cells that matter to a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest

from rlhfbench.records.schema import columns

TITLES = {"full": "PPO", "lora": "LoRA-PPO", "hydra": "Hydra-PPO"}
ORDER = {"full": 0, "lora": 1, "hydra": 4}
SETTING_ORDER = {"modern": 0, "paper": 1}
GIB = 2**30
_END = "_phase_s"


def _row(given: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "method": "hydra",
        "family": "PPO",
        "model": "tiny",
        "prompt_len": 32,
        "batch_size": 1,
        "device": "cpu",
        "dtype": "float32",
        "lora_rank": 16,
        "seed": 0,
        "setting": "modern",
        "options": "",
        "outcome": "ok",
        **given,
    }
    row.setdefault("completion_len", row["prompt_len"])
    row["seq_len"] = row["prompt_len"] + row["completion_len"]
    row.setdefault("global_batch_size", row["batch_size"] * row.get("world_size", 1))
    row.setdefault("method_title", TITLES.get(row["method"], row["method"]))
    row.setdefault("method_order", ORDER.get(row["method"]))
    row.setdefault("setting_order", SETTING_ORDER.get(row["setting"]))
    if row["outcome"] == "ok":
        row.setdefault("model_bytes", GIB)
        row.setdefault("activation_bytes", GIB // 2)
        row.setdefault("rollout_bytes", 4096)
        row["total_bytes"] = row["model_bytes"] + row["activation_bytes"] + row["rollout_bytes"]
        row.setdefault("sequences_per_sample", 1)
        row.setdefault("total_s_per_sample", 1.0)
        row.setdefault("inference_s_per_sample", 0.75)
        row.setdefault("update_s_per_sample", 0.25)
    return row


# Methods of other families: what a step of theirs has no phase for is absent.
OTHER_SHAPES: tuple[dict[str, Any], ...] = (
    {"method": "sft", "family": "SFT", "inference_s_per_sample": None, "update_s_per_sample": 1.0},
    {"method": "dpo", "family": "DPO", "sequences_per_sample": 2},
    {"method": "best-of-n", "family": "best-of-n", "update_s_per_sample": None, "sequences_per_sample": 4},
)


@pytest.fixture
def other_shapes() -> tuple[dict[str, Any], ...]:
    """One row of each shape of method that is not PPO's."""
    return OTHER_SHAPES


@pytest.fixture
def make_frame() -> Callable[..., pd.DataFrame]:
    """Rows in (only what matters to the test), the whole table out."""

    def make(*rows: Mapping[str, Any]) -> pd.DataFrame:
        full = [_row(row) for row in rows]
        phases = dict.fromkeys(n.removesuffix(_END) for row in full for n in row if n.endswith(_END))
        dtypes: dict[str, Any] = {name: field.dtype for name, field in columns(phases).items()}
        values = {name: [row.get(name) for row in full] for name in dtypes}
        return pd.DataFrame(
            {
                name: pd.Series(values[name], dtype="object")
                if dtype == "list"
                else pd.array(values[name], dtype=dtype)
                for name, dtype in dtypes.items()
            }
        )

    return make


@pytest.fixture
def ranked() -> Callable[..., dict[str, Any]]:
    """The cells of a case over ranks."""

    def make(size: int, batch: int, seconds: float, **changes: Any) -> dict[str, Any]:
        strategy, stage = changes.pop("parallel", "ddp"), changes.pop("zero_stage", None)
        named = [f"parallel.strategy={strategy}", f"parallel.world_size={size}"]
        named += [] if stage is None else [f"parallel.zero_stage={stage}"]
        return {
            "batch_size": batch,
            "world_size": size,
            "global_batch_size": batch * size,
            "parallel": strategy,
            "zero_stage": stage,
            "options": ", ".join(filter(None, [*named, changes.pop("others", "")])),
            "total_s_per_sample": seconds,
            "base_part_bytes": GIB,
            "activations_part_bytes": GIB // 2,
            "waiting_share": 0.25,
            "imbalance": 0.125,
            "worst_rank": size - 1,
            "communication_bytes": 2**20,
            "communication_calls": 3,
            **changes,
        }

    return make
