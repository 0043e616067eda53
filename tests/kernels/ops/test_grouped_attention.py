"""Attention of grouped heads under a mask, with stand-ins by formula for torch's kernel, which exists on CUDA alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.ops import grouped_attention as module
from rlhfkernels.ops.attention_mask import CausalMask
from rlhfkernels.ops.grouped_attention import grouped_attention

B, H, K, T, E = 2, 6, 2, 9, 8
SCALE = 0.3


def scores_of(query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    if bias is None:
        bias = torch.full((T, T), float("-inf"), dtype=query.dtype).triu(1)
    else:
        assert bias.shape == (*query.shape[:3], key.shape[2])
    return query @ key.mT * scale + bias


def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Torch's ``_scaled_dot_product_efficient_attention`` by its formula."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert (compute_log_sumexp, dropout_p, is_causal) == (True, 0.0, bias is None)
    scores = scores_of(query, key, bias, scale)
    nothing = torch.zeros((), dtype=torch.long)
    return scores.softmax(-1) @ value, scores.logsumexp(-1), nothing, nothing


def efficient_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor | None, ...]:
    """Torch's ``_scaled_dot_product_efficient_attention_backward`` by its formula."""
    assert (dropout_p, grad_input_mask, is_causal) == (0.0, [True, True, True, False], bias is None)
    weights = (scores_of(query, key, bias, scale) - logsumexp[..., None]).exp()
    grad_scores = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return grad_scores @ key, grad_scores.mT @ query, weights.mT @ grad, None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EFFICIENT", efficient)
    monkeypatch.setattr(module, "_EFFICIENT_BACKWARD", efficient_backward)
    monkeypatch.setattr(module, "_is_efficient", lambda query: True)


def make_inputs(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key and value as views of one tensor, as the engine has them, and the bias of a padded batch."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, T, H + 2 * K, E, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    padding = torch.ones(B, T, dtype=torch.long)
    padding[0, :4] = 0
    bias = CausalMask(torch.zeros(B, T), padding).bias(None, dtype)
    assert bias is not None
    return [qkv, *(part.transpose(1, 2) for part in qkv.split([H, K, K], 2)), bias]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("first", "padded"), [(0, True), (5, True), (0, False)])
def test_values_and_gradients_are_those_of_torch(first: int, padded: bool) -> None:
    found = []
    for function in (
        lambda q, k, v, bias: grouped_attention(q, k, v, bias, SCALE),
        lambda q, k, v, bias: nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, scale=SCALE, enable_gqa=True
        ),
    ):
        qkv, query, key, value, bias = make_inputs()
        out = function(query[:, :, first:], key, value, bias[:, :, first:] if padded else None)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        found.append((out, *torch.autograd.grad((out * weights).sum(), qkv)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("kernel")
def test_keys_and_values_are_kept_once_a_group() -> None:
    qkv, *inputs = make_inputs()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_attention(*inputs, SCALE)
    own = {qkv.untyped_storage().data_ptr(), inputs[3].untyped_storage().data_ptr()}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    assert [t.shape for t in others] == [(B, H, T, E), (B, H, T), (), ()]


# Flash attention knows groups, in narrow dtypes and without a mask.
@pytest.mark.parametrize(
    ("dtype", "padded", "is_own"),
    [(torch.bfloat16, True, True), (torch.bfloat16, False, False), (torch.float32, False, True)],
)
def test_the_kernel_is_called_as_torch_declares_it(dtype: torch.dtype, padded: bool, is_own: bool) -> None:
    with FakeTensorMode():
        qkv, query, key, value, bias = make_inputs(dtype)
        out = grouped_attention(query, key, value, bias if padded else None, SCALE)
        assert (type(out.grad_fn).__name__ == "_GroupedAttentionBackward") is is_own
        (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert (out.shape, out.dtype) == ((B, H, T, E), dtype)
    assert (grad.shape, grad.dtype) == (qkv.shape, qkv.dtype)


@pytest.mark.parametrize("change", ["no gradient", "heads of 7", "float64", "a CPU"])
def test_what_the_kernel_does_not_take_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the memory-efficient kernel was called")

    monkeypatch.setattr(module, "_EFFICIENT", refuse)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = make_inputs(torch.float64 if change == "float64" else torch.bfloat16)[1:]
        if change == "heads of 7":
            inputs[:3] = [part[..., :7] for part in inputs[:3]]
        if change != "a CPU":
            with torch.set_grad_enabled(change != "no gradient"):
                grouped_attention(*inputs, SCALE)
    if change == "a CPU":
        grouped_attention(*make_inputs(torch.bfloat16)[1:], SCALE)
