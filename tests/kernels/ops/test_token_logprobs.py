from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.token_logprobs import token_logprobs, token_logprobs_reference

N, D, V = 7, 5, 11


class Head(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None
    transform: LogitTransform


def make_head(
    *,
    trained: bool = False,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Head:
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=trained)
    offset = torch.randn(V, dtype=dtype, requires_grad=trained) if bias else None
    return Head(weight, offset, LogitTransform(scale, softcap, temperature=0.7))


def outputs_and_gradients(function: Any, head: Head, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(N, D, dtype=head.weight.dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    logprobs, entropies = function(hidden, head.weight, head.bias, targets, head.transform, **options)
    weights = torch.randn(2, N, dtype=logprobs.dtype)
    loss = (weights[0] * logprobs).sum() + (0 if entropies is None else (weights[1] * entropies).sum())
    trained = [p for p in head[:2] if p is not None and p.requires_grad]
    gradients = torch.autograd.grad(loss, [hidden, *trained])
    return [logprobs, *([] if entropies is None else [entropies]), *gradients]


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (3.0, 1.5)])
def test_chunks_equal_the_reference_in_values_and_gradients(
    chunk: int, trained: bool, bias: bool, softcap: float | None, scale: float
) -> None:
    head = make_head(trained=trained, bias=bias, softcap=softcap, scale=scale)
    expected = outputs_and_gradients(token_logprobs_reference, head)
    found = outputs_and_gradients(token_logprobs, head, chunk=chunk, entropy=True)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_reference_is_torchs_cross_entropy() -> None:
    head = make_head(bias=True)
    hidden, targets = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    logits = (hidden @ head.weight.T + head.bias) / 0.7
    logprobs, entropies = token_logprobs_reference(hidden, head.weight, head.bias, targets, head.transform)
    torch.testing.assert_close(logprobs, -nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("trained", [False, True])
def test_without_entropies_only_log_probabilities_have_a_gradient(trained: bool) -> None:
    head = make_head(trained=trained)
    expected = outputs_and_gradients(lambda *arguments: (token_logprobs_reference(*arguments)[0], None), head)
    found = outputs_and_gradients(token_logprobs, head, chunk=2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_chunk_0_is_the_reference() -> None:
    head = make_head(trained=True, bias=True)
    expected = outputs_and_gradients(token_logprobs_reference, head)
    for a, b in zip(outputs_and_gradients(token_logprobs, head, chunk=0, entropy=True), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_gives_float32_results_near_float64() -> None:
    head = make_head(dtype=torch.bfloat16)
    hidden, targets = torch.randn(N, D, dtype=torch.bfloat16), torch.randint(V, (N,))
    found, _ = token_logprobs(hidden, head.weight, None, targets, head.transform, chunk=3)
    expected, _ = token_logprobs_reference(hidden.double(), head.weight.double(), None, targets, head.transform)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def head_gradient_errors(num_chunks: int, grad_dtype: torch.dtype) -> list[tuple[float, float]]:
    """Relative errors of the gradients of weight and bias in bfloat16, each beside that of one rounding."""
    torch.manual_seed(0)
    chunk, d, v = 16, 32, 64
    weight, bias = (0.2 * torch.randn(v, d)).bfloat16(), (0.1 * torch.randn(v)).bfloat16()
    hidden = torch.randn(num_chunks * chunk, d).bfloat16()
    targets = torch.randint(v, (num_chunks * chunk,))

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        head = [each.to(dtype).clone().requires_grad_() for each in (weight, bias)]
        transform = LogitTransform(1.0, None, 1.0)
        logprobs, _ = token_logprobs(hidden.to(dtype), *head, targets, transform, chunk=chunk, grad_dtype=grad_dtype)
        logprobs.sum().backward()
        assert all(each.grad.dtype == dtype for each in head)
        return [each.grad.double() for each in head]

    pairs = zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True)
    return [
        (float((found - right).norm() / right.norm()), float((right.bfloat16() - right).norm() / right.norm()))
        for found, right in pairs
    ]


@pytest.mark.parametrize("num_chunks", [1, 8, 128])
def test_a_heads_gradient_over_chunks_is_off_by_about_one_rounding(num_chunks: int) -> None:
    for error, rounding in head_gradient_errors(num_chunks, torch.float32):
        assert error < 2.2 * rounding


def test_a_heads_gradient_in_a_narrow_dtype_gets_worse_with_every_chunk() -> None:
    for error, rounding in head_gradient_errors(128, torch.bfloat16):
        assert error > 5 * rounding
