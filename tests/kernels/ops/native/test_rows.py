"""Every op over rows in C against its op's reference in float64: values and gradients, odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.logprobs import token_logprobs, token_logprobs_reference
from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference
from rlhfkernels.ops.rotary import rotary_, rotary_reference, signed
from rlhfkernels.ops.sample import sample
from rlhfkernels.ops.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.usefixtures("library")
TOLERANCE = 2e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("shape", [(1, 3), (5, 16), (2, 3, 37), (9, 576)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_rms_norm(shape: tuple[int, ...], trained: tuple[bool, bool]) -> None:
    x, weight = random(*shape).requires_grad_(trained[0]), random(shape[-1], seed=1).requires_grad_(trained[1])
    y = rms_norm(x, weight, 1e-5, kernels="native")
    assert "native" in y.grad_fn.form.forward.__module__
    y.backward(random(*shape, seed=2))
    wide_x, wide_weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight))
    expected = rms_norm_reference(wide_x, wide_weight, 1e-5)
    expected.backward(random(*shape, seed=2).double())
    assert_near(y, expected)
    assert_near(x.grad, wide_x.grad)
    assert_near(weight.grad, wide_weight.grad)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5, kernels="native"), y)


@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (2, 3, 74), (3, 2 * 700)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    x = (9 * random(*shape)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = swiglu(x, kernels="native"), swiglu_reference(exact)
    assert "native" in y.grad_fn.form.forward.__module__
    grad = random(*y.shape, seed=1)
    y.backward(grad)
    expected.backward(grad.double())
    assert_near(y, expected)
    assert_near(x.grad, exact.grad)


def test_rows_that_do_not_lie_side_by_side() -> None:
    x, weight = random(4, 3, 40)[:, 1:, :24], random(24, seed=1)
    assert_near(rms_norm(x, weight, 1e-5, kernels="native"), rms_norm_reference(x.double(), weight.double(), 1e-5))
    leaf = random(6, 5).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    swiglu(leaf.t(), kernels="native").sum().backward()
    swiglu_reference(exact.t()).sum().backward()
    assert_near(leaf.grad, exact.grad)


def test_operands_of_another_dtype_are_torchs() -> None:
    x, weight = random(4, 24), random(24, seed=1).double()
    found = rms_norm(x, weight.requires_grad_(), 1e-5, kernels="native")
    assert "native" not in found.grad_fn.form.forward.__module__
    angles = random(1, 4, 4, seed=2).repeat(1, 1, 2).double()
    turned = rotary_(
        (x * 1.0).requires_grad_() * 1.0, angles.cos(), angles.sin(), RotaryPart(1, 3, 1), kernels="native"
    )
    assert "native" not in turned.grad_fn.turn.__module__


T, E = 5, 44


def rotated_by_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, part: RotaryPart) -> torch.Tensor:
    """In float64, with the ends of heads and the other groups as they were."""
    y = x.double().view(-1, T, part.blocks, part.groups, E)
    first, size = y[..., : part.rotated, :], cos.shape[-1]
    cos, sin = (table.double()[:, :, None, None] for table in (cos, sin))
    turned = torch.cat([rotary_reference(first[..., :size], cos, sin), first[..., size:]], -1)
    return torch.cat([turned, y[..., part.rotated :, :]], -2).view(x.shape)


@pytest.mark.parametrize(("part", "rows"), [(RotaryPart(1, 7, 4), 1), (RotaryPart(3, 3, 2), 2)], ids=str)
@pytest.mark.parametrize("size", [E, 6])
def test_rotary(part: RotaryPart, size: int, rows: int) -> None:
    angles = random(rows, T, size // 2, seed=3).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    leaf = random(2 * T, part.blocks * part.groups * E).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    x = leaf * 1.0
    y, expected = rotary_(x, cos, signed(sin), part, kernels="native"), rotated_by_reference(exact, cos, sin, part)
    assert "native" in y.grad_fn.turn.__module__
    assert y.data_ptr() == x.data_ptr()
    grad = random(*y.shape, seed=1)
    before = grad.clone()
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(grad, before)
    assert_near(y, expected)
    assert_near(leaf.grad, exact.grad)


def test_rotary_leaves_the_rows_of_a_wider_tensor_to_torch() -> None:
    part = RotaryPart(1, 3, 2)
    angles = random(1, T, E // 2).repeat(1, 1, 2)
    whole = random(T, 5 * E)
    x, rest = whole[:, E : 4 * E], whole.clone()
    expected = rotated_by_reference(x.contiguous(), angles.cos(), angles.sin(), part)
    with torch.no_grad():
        rotary_(x, angles.cos(), signed(angles.sin()), part, kernels="native")
    assert_near(x, expected)
    rest[:, E : 4 * E] = whole[:, E : 4 * E]
    assert torch.equal(whole, rest)


N, D = 5, 8


@pytest.mark.parametrize("vocabulary", [1, 11, 900])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("trained", [False, True])
def test_logprobs(vocabulary: int, scale: float, temperature: float, trained: bool) -> None:
    leaves = [random(N, D), 3 * random(vocabulary, D, seed=1), random(vocabulary, seed=2)]
    targets, weights = torch.arange(N) * 5003 % vocabulary, random(N, seed=3)
    found = []
    for wide in (True, False):
        hidden, weight, bias = (t.double() if wide else t.clone() for t in leaves)
        head = LmHead(nn.Parameter(weight, trained), nn.Parameter(bias, trained), scale=scale)
        hidden.requires_grad_()
        if wide:
            logprobs, _ = token_logprobs_reference(hidden, head, targets, temperature=temperature)
        else:
            logprobs, _ = token_logprobs(hidden, head, targets, temperature=temperature, chunk=2, kernels="native")
            assert "native" in logprobs.grad_fn.form.read.__module__
        inputs = [hidden, *(head.parameters() if trained else ())]
        found.append([logprobs, *torch.autograd.grad((weights * logprobs).sum(), inputs)])
    for expected, ours in zip(*found, strict=True):
        assert_near(ours, expected)


@pytest.mark.parametrize(("entropy", "softcap", "scale"), [(True, None, 1.0), (False, 2.0, 1.0), (False, None, -1.0)])
def test_logprobs_of_other_kinds_are_torchs(entropy: bool, softcap: float | None, scale: float) -> None:
    head = LmHead(nn.Parameter(random(11, D, seed=1), requires_grad=False), scale=scale, softcap=softcap)
    hidden, targets = random(N, D).requires_grad_(), torch.arange(N)
    logprobs, entropies = token_logprobs(hidden, head, targets, entropy=entropy, kernels="native")
    expected = token_logprobs_reference(hidden, head, targets)
    assert "native" not in logprobs.grad_fn.form.read.__module__
    torch.testing.assert_close(logprobs, expected[0])
    assert entropies is None or torch.allclose(entropies, expected[1])


@pytest.mark.parametrize("size", [1, 5, 256, 300, 4111])
def test_the_same_seed_samples_the_same_tokens_as_by_torch(size: int) -> None:
    logits = 2 * random(64, size)
    found, expected = (
        sample(logits.clone(), torch.Generator().manual_seed(1), kernels=kernels) for kernels in ("native", "torch")
    )
    assert torch.equal(found[0], expected[0])
    exact = torch.log_softmax(logits.double(), -1).gather(1, found[0][:, None]).squeeze(1)
    torch.testing.assert_close(found[1].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [6, 1000])
def test_a_token_of_probability_0_is_never_sampled(size: int) -> None:
    logits = torch.full((2000, size), float("-inf"))
    logits[:, 2] = 0.0
    logits[:, size - 2] = 1.0
    tokens, logprobs = sample(logits, torch.Generator().manual_seed(0), kernels="native")
    assert set(tokens.tolist()) == {2, size - 2}
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_numbers_sample_a_token_that_can_be(uniform: float) -> None:
    from rlhfkernels.ops.native import sample as native

    logits = random(3, 2000)
    logits[:, :700] = logits[:, 1500:] = float("-inf")
    tokens, _ = native.draw(logits, torch.full((3,), uniform))
    assert ((tokens >= 700) & (tokens < 1500)).all()


def test_logits_that_are_no_numbers_sample_some_token() -> None:
    tokens, logprobs = sample(torch.full((2, 700), float("nan")), None, kernels="native")
    assert ((tokens >= 0) & (tokens < 700)).all()
    assert logprobs.isnan().all()


def test_two_threads_give_what_one_gives() -> None:
    x, weight = random(64, 700), random(700, seed=1)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((rms_norm(x, weight, 1e-5, kernels="native"), swiglu(x, kernels="native")))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
