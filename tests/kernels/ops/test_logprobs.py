from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops.logprobs import token_logprobs, token_logprobs_reference

N, D, V = 7, 5, 11


def make_head(*, trained: bool, bias: bool, softcap: float | None, scale: float, dtype: torch.dtype) -> LmHead:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(V, D, dtype=dtype), requires_grad=trained)
    offset = nn.Parameter(torch.randn(V, dtype=dtype), requires_grad=trained) if bias else None
    return LmHead(weight, offset, scale=scale, softcap=softcap)


def outputs_and_gradients(form: object, head: LmHead, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(N, D, dtype=head.weight.dtype, requires_grad=True)
    targets = torch.randint(V, (N,))
    logprobs, entropies = form(hidden, head, targets, temperature=0.7, **options)  # type: ignore[operator]
    weights = torch.randn(2, N, dtype=logprobs.dtype)
    loss = (weights[0] * logprobs).sum() + (0 if entropies is None else (weights[1] * entropies).sum())
    trained = [p for p in head.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [hidden, *trained])
    return [logprobs, *([] if entropies is None else [entropies]), *gradients]


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 1.0), (None, 0.25), (3.0, 1.5)])
def test_chunks_give_the_values_and_gradients_of_a_full_log_softmax(
    chunk: int, trained: bool, bias: bool, softcap: float | None, scale: float
) -> None:
    head = make_head(trained=trained, bias=bias, softcap=softcap, scale=scale, dtype=torch.float64)
    expected = outputs_and_gradients(token_logprobs_reference, head)
    found = outputs_and_gradients(token_logprobs, head, chunk=chunk, entropy=True)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_reference_is_torchs_cross_entropy() -> None:
    head = make_head(trained=False, bias=True, softcap=None, scale=1.0, dtype=torch.float64)
    hidden, targets = torch.randn(N, D, dtype=torch.float64), torch.randint(V, (N,))
    logits = hidden @ head.weight.T + head.bias
    logprobs, entropies = token_logprobs_reference(hidden, head, targets)
    torch.testing.assert_close(logprobs, -nn.functional.cross_entropy(logits, targets, reduction="none"))
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("trained", [False, True])
def test_without_entropies_the_gradient_is_that_of_the_log_probabilities(trained: bool) -> None:
    head = make_head(trained=trained, bias=False, softcap=None, scale=1.0, dtype=torch.float64)
    expected = outputs_and_gradients(
        lambda *args, **options: (token_logprobs_reference(*args, **options)[0], None), head
    )
    found = outputs_and_gradients(token_logprobs, head, chunk=2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_chunk_0_is_the_plain_form() -> None:
    head = make_head(trained=True, bias=True, softcap=None, scale=1.0, dtype=torch.float64)
    expected = outputs_and_gradients(token_logprobs_reference, head)
    for a, b in zip(outputs_and_gradients(token_logprobs, head, chunk=0, entropy=True), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_states_give_float32_results_near_those_of_float64() -> None:
    head = make_head(trained=False, bias=False, softcap=None, scale=1.0, dtype=torch.bfloat16)
    wide = LmHead(nn.Parameter(head.weight.double(), requires_grad=False))
    hidden, targets = torch.randn(N, D, dtype=torch.bfloat16), torch.randint(V, (N,))
    found, _ = token_logprobs(hidden, head, targets, chunk=3)
    expected, _ = token_logprobs_reference(hidden.double(), wide, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
