"""Activations that a Llama layer of 2023 kept for the backward, at Table 1's size: the arithmetic of docs/planning.md.

Hydra-RLHF's Table 1 has 12.5 to 13.2 GiB of activations a sequence. The layer here is that of transformers 4.28 in
plain torch ops, with LoRA on every linear layer, so that autograd keeps what it kept then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from rlhfkernels.models.presets import PRESETS

PAGE = Path(__file__).parents[3] / "docs" / "planning.md"
LLAMA_7B = LlamaConfig(**PRESETS["llama-7b"].config)
SEQ_LEN, RANK, MIB = 800, 128, 2**20
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Keep = Callable[[str, torch.Tensor], torch.Tensor]


def sizes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer."""
    d, f = config.hidden_size, config.intermediate_size
    return {**dict.fromkeys(LINEAR, (d, d)), "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}


def make_weights(config: LlamaConfig, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Frozen weights, and the trained ``.A`` and ``.B`` of each linear layer."""
    weights = {name: torch.randn(*shape, dtype=dtype) * shape[1] ** -0.5 for name, shape in sizes(config).items()}
    for name, (out, into) in sizes(config).items():
        weights[f"{name}.A"] = (torch.randn(rank, into, dtype=dtype) * into**-0.5).requires_grad_()
        weights[f"{name}.B"] = (torch.randn(out, rank, dtype=dtype) * rank**-0.5).requires_grad_()
    return weights | {name: torch.rand(config.hidden_size, dtype=dtype) for name in ("input_norm", "post_norm")}


def layer_of_2023(
    x: torch.Tensor, weights: Mapping[str, torch.Tensor], config: LlamaConfig, keep: Keep = lambda name, tensor: tensor
) -> torch.Tensor:
    """One layer [b, t, d] as transformers 4.28 computed it; ``keep`` sees each tensor that has a name."""
    wide = torch.promote_types(x.dtype, torch.float32)
    b, t, _ = x.shape
    head_size = config.hidden_size // config.num_attention_heads

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        upcast = keep("norm input, float32", x.to(wide))
        scaled = keep("residual", x) * torch.rsqrt(upcast.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return keep("norm output", weight * scaled.to(weight.dtype))

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        low = keep("LoRA, low-rank", nn_linear(x, weights[f"{name}.A"]))
        return nn_linear(x, weights[name]) + nn_linear(low, weights[f"{name}.B"])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(b, t, -1, head_size).transpose(1, 2)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        half = head_size // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * cos + turned * sin

    positions = torch.arange(t)[:, None] / config.rope_parameters["rope_theta"] ** (
        torch.arange(0, head_size, 2) / head_size
    )
    angles = torch.cat((positions, positions), -1).to(wide)
    cos, sin = (keep("cosines and sines", part.to(x.dtype)) for part in (angles.cos(), angles.sin()))

    normed = norm(x, weights["input_norm"])
    query, key = (keep("query and key", rotated(heads(linear(name, normed)))) for name in ("q_proj", "k_proj"))
    value = keep("value", heads(linear("v_proj", normed)))
    lowest = torch.finfo(x.dtype).min
    mask = torch.full((t, t), lowest, dtype=x.dtype).triu(1)
    scores = query @ key.transpose(2, 3) / math.sqrt(head_size)
    masked = keep("masked scores", scores + mask)
    clamped = torch.max(masked, torch.tensor(lowest, dtype=x.dtype))
    softmax = keep("softmax, float32", torch.softmax(clamped, -1, dtype=wide))
    attended = keep("softmax, bfloat16", softmax.to(x.dtype)) @ value
    merged = keep("attention output", attended.transpose(1, 2).reshape(b, t, -1))
    x = x + linear("o_proj", merged)
    normed = norm(x, weights["post_norm"])
    gate = keep("gate", linear("gate_proj", normed))
    up = keep("up", linear("up_proj", normed))
    product = keep("gated product", keep("gate, activated", torch.nn.functional.silu(gate)) * up)
    return x + linear("down_proj", product)


nn_linear = torch.nn.functional.linear


def kept_bytes(batch_size: int) -> dict[str, int]:
    """Bytes that autograd keeps of one layer of Llama-7B by tensor, weights left out."""
    names: dict[int, str] = {}
    found: dict[int, int] = {}

    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        names.setdefault(tensor.untyped_storage()._cdata, name)
        alive.append(tensor)
        return tensor

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with FakeTensorMode():
        weights = make_weights(LLAMA_7B, RANK, torch.bfloat16)
        x = torch.randn(batch_size, SEQ_LEN, LLAMA_7B.hidden_size, dtype=torch.bfloat16).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer_of_2023(x, weights, LLAMA_7B, keep)
        own = {weight.untyped_storage()._cdata for weight in weights.values()}
    sums: dict[str, int] = {}
    for key, num_bytes in found.items():
        if key not in own:
            name = names.get(key, "rest")
            sums[name] = sums.get(name, 0) + num_bytes
    return sums


def test_the_layer_computes_what_transformers_eager_layer_computes() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, vocab_size=8, attn_implementation="eager")
    torch.manual_seed(3)
    weights = make_weights(config, rank=3, dtype=torch.float64)
    layer = LlamaDecoderLayer(config, 0).to(torch.float64).requires_grad_(False)
    for name in LINEAR:
        part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
        getattr(part, name).weight.copy_(weights[name] + weights[f"{name}.B"] @ weights[f"{name}.A"])
    layer.input_layernorm.weight.copy_(weights["input_norm"])
    layer.post_attention_layernorm.weight.copy_(weights["post_norm"])
    x, upstream = (torch.randn(2, 7, 32, dtype=torch.float64) for _ in range(2))
    mask = torch.full((1, 1, 7, 7), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(7)[None])
    results = []
    for run in (
        lambda x: layer_of_2023(x, weights, config),
        lambda x: layer(x, attention_mask=mask, position_embeddings=rotary),
    ):
        given = x.clone().requires_grad_()
        out = run(given)
        (gradient,) = torch.autograd.grad(out, given, upstream)
        results.append((out.detach(), gradient))
    # transformers takes norms, angles and softmax in float32, whatever the dtype.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_the_page_has_what_the_layer_keeps() -> None:
    kept = kept_bytes(1)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    named = {name: num_bytes for name, num_bytes in kept.items() if num_bytes > MIB / 10}
    for name, num_bytes in named.items():
        assert [name, f"{num_bytes / MIB:.1f}"] in rows
    assert ["one layer", f"{sum(kept.values()) / MIB:.1f}"] in rows
    gib = LLAMA_7B.num_hidden_layers * sum(kept.values()) / 2**30
    assert f"{LLAMA_7B.num_hidden_layers} layers keep {gib:.1f} GiB" in PAGE.read_text()
    assert gib < 0.95 * 12.5, "Table 1's smallest figure is not reached"
