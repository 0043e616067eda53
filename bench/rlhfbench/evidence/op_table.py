"""The ops of the second part: their inputs, and who computes them. Shapes are those of a model's layer.

Shapes: m = positions of all rows, b = rows of a decode step, d = hidden size, v = vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.dispatch import is_installed
from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart
from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rotary import make_signed_sin
from rlhfkernels.ops.table import OPS

Tensors = tuple[torch.Tensor, ...]
Draw = Callable[..., torch.Tensor]
_EPS, _SCALE = 1e-5, 0.125


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpSize:
    """Sizes of a model and of the inputs.

    Attributes:
        hidden: d.
        inner: width of the MLP.
        heads: query heads.
        kv_heads: key-value heads.
        head_size: elements of a head.
        vocab: v.
        rows: m, two sequences.
        decode_rows: b.
        rank: of the adapters.
    """

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    rows: int
    decode_rows: int
    rank: int

    @property
    def layout(self) -> QkvLayout:
        """Layout of the heads in the QKV projection."""
        return QkvLayout(self.heads, self.kv_heads, self.head_size)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OpCase:
    """An op on given inputs.

    Attributes:
        inputs: makes the tensors; ``draw`` makes random ones in the dtype.
        call: calls the op's function or reference on tensors, with ``backend`` where it is the function.
        num_differentiated: leading tensors that get gradients; 0 if the op has none.
        others: calls by other libraries, by name.
    """

    inputs: Callable[[Draw, OpSize], Tensors]
    call: Callable[..., Any]
    num_differentiated: int = 0
    others: dict[str, Callable[[Tensors, OpSize], Any]] = dataclasses.field(default_factory=dict)


def _tables(draw: Draw, s: OpSize) -> Tensors:
    angles = draw(1, s.rows // 2, s.layout.head_size // 2).repeat(1, 1, 2)
    return angles.cos(), make_signed_sin(angles.sin())


def _targets(draw: Draw, s: OpSize) -> torch.Tensor:
    return draw(s.rows).float().mul(1000).long().abs() % s.vocab


def _rotary(f: Callable[..., Any], t: Tensors, s: OpSize, **options: Any) -> Any:
    return f(t[0] * 1.0, t[1], t[2], s.layout.rotary_part, **options)


def _attention(f: Callable[..., Any], t: Tensors, s: OpSize, **options: Any) -> Any:
    mask = CausalMask(t[0].new_zeros(2, s.rows // 2), None)
    out = f(t[0], s.layout, mask, AttentionSpan(start=0, window=None, scale=_SCALE), **options)
    return out.reshape(s.rows, -1)


def _lora(f: Callable[..., Any], t: Tensors, s: OpSize, **options: Any) -> Any:
    weight, down, up = (nn.Parameter(tensor, requires_grad=False) for tensor in t[1:])
    part = LoraPart(down=down, up=up, start=0, scaling=2.0)
    group = LinearGroup(
        weight=t[1], bias=None, weights=(weight,), biases=(), transposed=False, down=t[2], up=t[3], parts=(part,)
    )
    return f(t[0], group, **options)


def _logprobs(f: Callable[..., Any], t: Tensors, s: OpSize, **options: Any) -> Any:
    return f(t[0], t[1], None, t[2], LogitTransform(), **options)[0]


def _decode(f: Callable[..., Any], t: Tensors, s: OpSize, backend: str | None = None) -> Any:
    return f(t[0], t[1], t[2], scale=_SCALE)


def _sampled(f: Callable[..., Any], t: Tensors, s: OpSize, **options: Any) -> Any:
    """The log-probability of the token that the op drew, less its own: 0 whatever it draws."""
    tokens, logprobs = f(t[0].clone(), None, **options)
    return logprobs.double() - torch.log_softmax(t[0].double(), -1).gather(-1, tokens[:, None]).squeeze(-1) + 1


def _liger_norm(t: Tensors, s: OpSize) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(t[0], t[1], _EPS, 0.0, "llama", False)


def _liger_swiglu(t: Tensors, s: OpSize) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = t[0].chunk(2, dim=-1)
    return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())


def _flash_attention(t: Tensors, s: OpSize) -> Any:
    from flash_attn import flash_attn_func

    query, key, value = (part.view(2, s.rows // 2, *part.shape[1:]) for part in s.layout.split(t[0]))
    return flash_attn_func(query, key, value, softmax_scale=_SCALE, causal=True).reshape(s.rows, -1)


def _installed(package: str, call: Callable[[Tensors, OpSize], Any]) -> dict[str, Callable[[Tensors, OpSize], Any]]:
    return {package: call} if is_installed(package) else {}


OP_CASES: dict[str, OpCase] = {
    "rms_norm": OpCase(
        inputs=lambda d, s: (d(s.rows, s.hidden), d(s.hidden)),
        call=lambda f, t, s, **o: f(t[0], t[1], _EPS, **o),
        num_differentiated=2,
        others=_installed("liger_kernel", _liger_norm),
    ),
    "swiglu": OpCase(
        inputs=lambda d, s: (d(s.rows, 2 * s.inner),),
        call=lambda f, t, s, **o: f(t[0], **o),
        num_differentiated=1,
        others=_installed("liger_kernel", _liger_swiglu),
    ),
    "rotary": OpCase(
        inputs=lambda d, s: (d(s.rows, s.layout.width), *_tables(d, s)), call=_rotary, num_differentiated=1
    ),
    "causal_attention": OpCase(
        inputs=lambda d, s: (d(s.rows, s.layout.width),),
        call=_attention,
        num_differentiated=1,
        others=_installed("flash_attn", _flash_attention),
    ),
    "token_logprobs": OpCase(
        inputs=lambda d, s: (d(s.rows, s.hidden), d(s.vocab, s.hidden) * s.hidden**-0.5, _targets(d, s)),
        call=_logprobs,
        num_differentiated=1,
    ),
    "lora_linear": OpCase(
        inputs=lambda d, s: (
            d(s.rows, s.hidden),
            d(s.hidden, s.hidden) * s.hidden**-0.5,
            d(s.rank, s.hidden) * s.hidden**-0.5,
            d(s.hidden, s.rank),
        ),
        call=_lora,
        num_differentiated=1,
    ),
    "matmul": OpCase(
        inputs=lambda d, s: (d(s.rows, s.hidden), d(s.hidden, s.hidden) * s.hidden**-0.5),
        call=lambda f, t, s, **o: f(t[0], t[1], **o),
    ),
    "skinny_linear": OpCase(
        inputs=lambda d, s: (d(s.decode_rows, s.hidden), d(s.hidden, s.hidden) * s.hidden**-0.5),
        call=lambda f, t, s, **o: f(t[0], t[1], **o),
    ),
    "decode_attention": OpCase(
        inputs=lambda d, s: (
            d(s.decode_rows, s.heads, s.layout.head_size),
            d(s.decode_rows, s.kv_heads, s.rows // 2, s.layout.head_size),
            d(s.decode_rows, s.kv_heads, s.rows // 2, s.layout.head_size),
        ),
        call=_decode,
    ),
    "sample": OpCase(inputs=lambda d, s: (d(s.decode_rows, s.vocab).float(),), call=_sampled),
}
assert OP_CASES.keys() == OPS.keys()
