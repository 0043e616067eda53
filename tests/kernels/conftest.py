"""Small checkpoints of five architectures, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.utils import logging

from rlhfkernels import Case, Options

logging.disable_progress_bar()

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    # Wider than the default, so that small models have logits that differ.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "initializer_range": 0.2}
_OPT_SHAPE = {
    **{key: value for key, value in _SHAPE.items() if key not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "opt": lambda: OPTConfig(**_OPT_SHAPE),
    "gpt_neox": lambda: GPTNeoXConfig(**_SHAPE),
    "gpt2": lambda: GPT2Config(**_GPT2_SHAPE, bos_token_id=1, eos_token_id=2),
    "mistral": lambda: MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=6),
    "granite": lambda: GraniteConfig(**_SHAPE, num_key_value_heads=2),
    "qwen2": lambda: Qwen2Config(**_SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a small float64 checkpoint of the named architecture, with biases that are not 0."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> str:
        if architecture not in folders:
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float64)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            folders[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folders[architecture])
        return str(folders[architecture])

    return make


@pytest.fixture
def make_case(checkpoint: Callable[[str], str]) -> Callable[..., Case]:
    """A small float64 case; keyword arguments that are options go into its options."""

    def make(method: str = "hydra", architecture: str = "llama", **changes: object) -> Case:
        fields = {"prompt_len": 5, "completion_len": 6, "batch_size": 4, "dtype": "float64", "lora_rank": 3}
        options = {key: changes.pop(key) for key in list(changes) if key in Options.__dataclass_fields__}
        fields |= changes
        return Case(method=method, model=checkpoint(architecture), **fields, options=Options(**options))

    return make
