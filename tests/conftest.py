"""What tests share: small checkpoints, made once a session, and one thread, so that small work is fast anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhfbench.cases.preflight import num_cuda_devices

# Triton decides as it is imported, which torch does, whether its own functions are compiled or interpreted. Without a
# GPU they are interpreted; the variable itself lives no longer than this, so nothing that a test starts inherits it.
with pytest.MonkeyPatch.context() as _patch, contextlib.suppress(ImportError):
    if num_cuda_devices() == 0:
        _patch.setenv("TRITON_INTERPRET", "1")
    import triton  # noqa: F401

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


def _shape(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 48,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _configs(width: int) -> dict[str, Callable[[], object]]:
    """Configurations of 2 layers and 4 heads by architecture; with initial weights wide enough for logits to differ."""
    shape = _shape(width)
    gated = {**shape, "intermediate_size": 2 * width, "initializer_range": 0.2}
    opt = {**shape, "ffn_dim": 2 * width, "word_embed_proj_dim": width, "init_std": 0.2}
    gpt2 = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 48, "initializer_range": 0.2}
    return {
        "llama": lambda: LlamaConfig(**gated, num_key_value_heads=2),
        "opt": lambda: OPTConfig(**opt),
        "gpt_neox": lambda: GPTNeoXConfig(**gated),
        "gpt2": lambda: GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2),
        "mistral": lambda: MistralConfig(**gated, num_key_value_heads=2, sliding_window=6),
        "granite": lambda: GraniteConfig(**gated, num_key_value_heads=2),
        "qwen2": lambda: Qwen2Config(**gated, num_key_value_heads=2, tie_word_embeddings=True),
    }


# ``wide-`` ones have heads of 32, as large models nearly have: what stands beside a head's own size is small there.
# ``small-reward`` has another width and depth, and the same vocabulary; the others are no reward models for the rest.
_SMALL = {"num_hidden_layers": 1, "intermediate_size": 24}
_REWARDS: dict[str, Callable[[], object]] = {
    "small-reward": lambda: LlamaConfig(**_shape(16) | _SMALL),
    "other-words": lambda: LlamaConfig(**_shape(16) | _SMALL | {"vocab_size": 50}),
    "short-reward": lambda: LlamaConfig(**_shape(16) | _SMALL | {"max_position_embeddings": 8}),
}
CONFIGS = _REWARDS | _configs(32) | {f"wide-{name}": make for name, make in _configs(128).items()}


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
    """A small float64 case; a keyword argument ``group__field`` is the option ``group.field``."""

    def make(method: str = "hydra", architecture: str = "llama", **changes: object) -> Case:
        fields = {"prompt_len": 5, "completion_len": 6, "batch_size": 4, "dtype": "float64"}
        options = {key.replace("__", "."): changes.pop(key) for key in list(changes) if "__" in key}
        fields |= changes
        return Case(
            method=method, model=checkpoint(architecture), **fields, options=Options.of({"lora.r": 3, **options})
        )

    return make


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
