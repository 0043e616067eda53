"""Named settings: sets of case fields and options that belong together. What a user states beside one wins."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    # What this project does by default.
    "modern": {},
    # What Hydra-RLHF ran: attention matrices and float32 logits kept, general generation, rank 128, scaling 1/r.
    "paper": {
        "dtype": "bfloat16",
        "lora_rank": 128,
        "options": {
            "engine": "plain",
            "kernels": "torch",
            "attention": "eager",
            "kv_cache": "growing",
            "logprob_chunk": 0,
            "lora_scaling": 1 / 128,
            "warmup_steps": 100,
        },
    },
}
