"""Tables as the harness makes them, without the harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import pytest

from rlhfreports.columns import COLUMNS

TITLES = {"full": "PPO", "lora": "LoRA-PPO", "hydra": "Hydra-PPO"}
ORDER = {"full": 0, "lora": 1, "hydra": 4}
SETTING_ORDER = {"modern": 0, "paper": 1}
GIB = 2**30


def _row(given: Mapping[str, Any]) -> dict[str, Any]:
    row = {
        "method": "hydra",
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
    row.setdefault("method_title", TITLES.get(row["method"], row["method"]))
    row.setdefault("method_order", ORDER.get(row["method"]))
    row.setdefault("setting_order", SETTING_ORDER.get(row["setting"]))
    if row["outcome"] == "ok":
        row.setdefault("model_bytes", GIB)
        row.setdefault("activation_bytes", GIB // 2)
        row.setdefault("rollout_bytes", 4096)
        row["total_bytes"] = row["model_bytes"] + row["activation_bytes"] + row["rollout_bytes"]
        row.setdefault("total_s_per_sample", 1.0)
        row.setdefault("inference_s_per_sample", 0.75)
        row.setdefault("update_s_per_sample", 0.25)
    return row


@pytest.fixture
def make_frame() -> Callable[..., pd.DataFrame]:
    """Rows in (only what matters to the test), the whole table out."""

    def make(*rows: Mapping[str, Any]) -> pd.DataFrame:
        full = [_row(row) for row in rows]
        dtypes: dict[str, Any] = {column.name: column.dtype for column in COLUMNS}
        dtypes |= {name: "Float64" for row in full for name in row if name.endswith("_phase_median_s")}
        return pd.DataFrame(
            {name: pd.array([row.get(name) for row in full], dtype=dtype) for name, dtype in dtypes.items()}
        )

    return make
