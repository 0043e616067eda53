"""The form in C of ``rlhfkernels.ops.causal_attention``."""

from __future__ import annotations

import ctypes
import functools

import torch

from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import CausalAttention
from rlhfkernels.ops.sight import Reach, Sight


def forward(
    qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach, *, with_sums: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is attended, [b (t − start), h e]; and the logarithms of the scores' sums, [b, h, t], where asked for."""
    out = qkv.new_empty(sight.b * (sight.t - reach.start), heads.num_queries * heads.size)
    sums = qkv.new_empty(sight.b, heads.num_queries, sight.t) if with_sums else None
    _run("causal_attention", qkv, heads, sight, reach, out=out, sums=sums)
    return out, sums


def backward(
    grad: torch.Tensor, qkv: torch.Tensor, sums: torch.Tensor, heads: Heads, sight: Sight, reach: Reach
) -> torch.Tensor:
    """The gradient of ``qkv``, [m, n]."""
    grad_qkv = torch.empty_like(qkv)
    given = {"sums": sums, "grad_out": grad.contiguous(), "grad_qkv": grad_qkv}
    _run("causal_attention_backward", qkv, heads, sight, reach, **given)
    return grad_qkv


def _run(
    function: str, qkv: torch.Tensor, heads: Heads, sight: Sight, reach: Reach, **given: torch.Tensor | None
) -> None:
    num_groups = sight.b * heads.num_keys
    scratch_size = _scratch_size(sight.t, heads.size, "grad_qkv" in given)
    launch(
        function,
        CausalAttention,
        num_groups,
        qkv=qkv,
        mask=None if sight.padding is None else sight.padding.contiguous(),
        scratch=qkv.new_empty(min(num_groups, torch.get_num_threads()) * scratch_size),
        **given,
        batch=sight.b,
        length=sight.t,
        stride=qkv.shape[1],
        heads=heads.num_queries,
        kv_heads=heads.num_keys,
        size=heads.size,
        start=reach.start,
        window=reach.window or 0,
        head_stride=heads.head_stride,
        key_start=heads.key_start,
        value_start=heads.value_start,
        scratch_size=scratch_size,
        scale=reach.scale,
    )


@functools.cache
def _scratch_size(length: int, size: int, backward: bool) -> int:
    """Numbers that one thread needs."""
    function = library().causal_attention_scratch
    function.restype = ctypes.c_int64
    return int(function(ctypes.c_int64(length), ctypes.c_int64(size), ctypes.c_int64(backward)))
