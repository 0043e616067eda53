"""Named settings: case fields and options, by dotted name, that belong together. What a user states beside one wins."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    # The defaults.
    "modern": {},
    # What Hydra-RLHF ran: attention matrices and float32 logits kept, general generation, rank 128, LoRA alpha 1.
    "paper": {
        "dtype": "bfloat16",
        "options": {
            "engine.trunk": "plain",
            "engine.backend": "torch",
            "engine.attn_implementation": "eager",
            "engine.cache_implementation": "dynamic",
            "engine.logprob_chunk_size": 0,
            "lora.r": 128,
            "lora.alpha": 1.0,
            "optimizer.warmup_steps": 100,
        },
    },
}
