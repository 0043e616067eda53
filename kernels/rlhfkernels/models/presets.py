"""The model presets: the shapes of public models, to be built with random weights and no download.

A row gives the arguments of the model's own ``transformers`` configuration, nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One model's shape.

    Attributes:
        name: the name users give it.
        model_type: the architecture, as ``transformers.AutoConfig.for_model`` takes it.
        config: arguments of that configuration.
        max_positions: the longest sequence that the model takes.
        source: where the shape stands.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    max_positions: int
    source: str


def _preset(name: str, model_type: str, max_positions: int, source: str, **config: Any) -> Preset:
    return Preset(name=name, model_type=model_type, config=config, max_positions=max_positions, source=source)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        **more,
    }


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(
            "tiny",
            "llama",
            4096,
            "made for this project; for a laptop",
            **_llama(256, 688, 8, 8, 8192, max_position_embeddings=4096),
        ),
        _preset(
            "smollm2-135m",
            "llama",
            8192,
            "HuggingFaceTB/SmolLM2-135M",
            **_llama(
                576,
                1536,
                30,
                9,
                49152,
                num_key_value_heads=3,
                tie_word_embeddings=True,
                max_position_embeddings=8192,
                rope_theta=100000.0,
            ),
        ),
        _preset("gpt2", "gpt2", 1024, "openai-community/gpt2"),
        _preset(
            "opt-1.3b",
            "opt",
            2048,
            "facebook/opt-1.3b",
            hidden_size=2048,
            ffn_dim=8192,
            num_hidden_layers=24,
            num_attention_heads=32,
            word_embed_proj_dim=2048,
            vocab_size=50272,
            max_position_embeddings=2048,
        ),
        _preset(
            "pythia-160m",
            "gpt_neox",
            2048,
            "EleutherAI/pythia-160m",
            **_llama(768, 3072, 12, 12, 50304, max_position_embeddings=2048),
        ),
        _preset(
            "pythia-1.4b",
            "gpt_neox",
            2048,
            "EleutherAI/pythia-1.4b",
            **_llama(2048, 8192, 24, 16, 50304, max_position_embeddings=2048),
        ),
        _preset(
            "pythia-6.9b",
            "gpt_neox",
            2048,
            "EleutherAI/pythia-6.9b",
            **_llama(4096, 16384, 32, 32, 50432, max_position_embeddings=2048),
        ),
        _preset(
            "llama-7b",
            "llama",
            2048,
            "LLaMA (arXiv:2302.13971), table 2",
            **_llama(4096, 11008, 32, 32, 32000, max_position_embeddings=2048),
        ),
        _preset(
            "llama-2-70b",
            "llama",
            4096,
            "Llama 2 (arXiv:2307.09288), as meta-llama/Llama-2-70b-hf",
            **_llama(8192, 28672, 80, 64, 32000, num_key_value_heads=8, max_position_embeddings=4096),
        ),
        _preset(
            "mistral-7b",
            "mistral",
            32768,
            "mistralai/Mistral-7B-v0.1",
            **_llama(
                4096, 14336, 32, 32, 32000, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=4096
            ),
        ),
        _preset(
            "qwen2.5-0.5b",
            "qwen2",
            32768,
            "Qwen/Qwen2.5-0.5B",
            **_llama(
                896,
                4864,
                24,
                14,
                151936,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                max_position_embeddings=32768,
                rope_theta=1000000.0,
            ),
        ),
    )
}
"""Every preset by name."""
