"""Sequence kernels in C against their references in float64: values and gradients at odd sizes."""

from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.qkv_layout import RotaryPart
from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference
from rlhfkernels.ops.rotary import make_signed_sin, rotary_, rotary_reference
from rlhfkernels.ops.sample import sample
from rlhfkernels.ops.swiglu import swiglu, swiglu_reference
from rlhfkernels.ops.token_logprobs import token_logprobs, token_logprobs_reference

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
    y = rms_norm(x, weight, 1e-5, backend="native")
    assert "native" in y.grad_fn.kernels.forward.__module__
    y.backward(random(*shape, seed=2))
    wide_x, wide_weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight))
    expected = rms_norm_reference(wide_x, wide_weight, 1e-5)
    expected.backward(random(*shape, seed=2).double())
    assert_near(y, expected)
    assert_near(x.grad, wide_x.grad)
    assert_near(weight.grad, wide_weight.grad)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5, backend="native"), y)


@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (2, 3, 74), (3, 2 * 700)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    x = (9 * random(*shape)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = swiglu(x, backend="native"), swiglu_reference(exact)
    assert "native" in y.grad_fn.kernels.forward.__module__
    grad = random(*y.shape, seed=1)
    y.backward(grad)
    expected.backward(grad.double())
    assert_near(y, expected)
    assert_near(x.grad, exact.grad)


def test_strided_inputs() -> None:
    x, weight = random(4, 3, 40)[:, 1:, :24], random(24, seed=1)
    assert_near(rms_norm(x, weight, 1e-5, backend="native"), rms_norm_reference(x.double(), weight.double(), 1e-5))
    leaf = random(6, 5).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    swiglu(leaf.t(), backend="native").sum().backward()
    swiglu_reference(exact.t()).sum().backward()
    assert_near(leaf.grad, exact.grad)


def test_other_dtypes_are_left_to_torch() -> None:
    x, weight = random(4, 24), random(24, seed=1).double()
    found = rms_norm(x, weight.requires_grad_(), 1e-5, backend="native")
    assert "native" not in found.grad_fn.kernels.forward.__module__
    angles = random(1, 4, 4, seed=2).repeat(1, 1, 2).double()
    rotated = rotary_(
        (x * 1.0).requires_grad_() * 1.0, angles.cos(), angles.sin(), RotaryPart(1, 3, 1), backend="native"
    )
    assert "native" not in rotated.grad_fn.kernel.__module__


T, E = 5, 44


@pytest.mark.parametrize(("part", "rows"), [(RotaryPart(1, 7, 4), 1), (RotaryPart(3, 3, 2), 2)], ids=str)
@pytest.mark.parametrize("size", [E, 6])
def test_rotary(part: RotaryPart, size: int, rows: int) -> None:
    angles = random(rows, T, size // 2, seed=3).repeat(1, 1, 2)
    cos, signed_sin = angles.cos(), make_signed_sin(angles.sin())
    leaf = random(2 * T, part.blocks * part.groups * E).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    x = leaf * 1.0
    y = rotary_(x, cos, signed_sin, part, backend="native")
    expected = rotary_reference(exact, cos.double(), signed_sin.double(), part)
    assert "native" in y.grad_fn.kernel.__module__
    assert y.data_ptr() == x.data_ptr()
    grad = random(*y.shape, seed=1)
    before = grad.clone()
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(grad, before)
    assert_near(y, expected)
    assert_near(leaf.grad, exact.grad)


def test_rotary_leaves_strided_rows_to_torch() -> None:
    part = RotaryPart(1, 3, 2)
    angles = random(1, T, E // 2).repeat(1, 1, 2)
    whole = random(T, 5 * E)
    x, rest = whole[:, E : 4 * E], whole.clone()
    cos, signed_sin = angles.cos(), make_signed_sin(angles.sin())
    expected = rotary_reference(x.contiguous().double(), cos.double(), signed_sin.double(), part)
    with torch.no_grad():
        rotary_(x, cos, signed_sin, part, backend="native")
    assert_near(x, expected)
    rest[:, E : 4 * E] = whole[:, E : 4 * E]
    assert torch.equal(whole, rest)


N, D = 5, 8


@pytest.mark.parametrize("vocabulary", [1, 11, 900])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (1.5, 0.7)])
@pytest.mark.parametrize("trained", [False, True])
def test_token_logprobs(vocabulary: int, scale: float, temperature: float, trained: bool) -> None:
    leaves = [random(N, D), 3 * random(vocabulary, D, seed=1), random(vocabulary, seed=2)]
    targets, weights = torch.arange(N) * 5003 % vocabulary, random(N, seed=3)
    found = []
    for wide in (True, False):
        hidden, weight, bias = (t.double() if wide else t.clone() for t in leaves)
        for tensor in (hidden, weight, bias)[: 3 if trained else 1]:
            tensor.requires_grad_()
        arguments = hidden, weight, bias, targets, LogitTransform(scale, None, temperature)
        if wide:
            logprobs, _ = token_logprobs_reference(*arguments)
        else:
            logprobs, _ = token_logprobs(*arguments, chunk=2, backend="native")
            assert "native" in logprobs.grad_fn.kernels.forward.__module__
        inputs = [hidden, *((weight, bias) if trained else ())]
        found.append([logprobs, *torch.autograd.grad((weights * logprobs).sum(), inputs)])
    for expected, ours in zip(*found, strict=True):
        assert_near(ours, expected)


@pytest.mark.parametrize(("entropy", "softcap", "scale"), [(True, None, 1.0), (False, 2.0, 1.0), (False, None, -1.0)])
def test_entropies_and_other_transforms_are_left_to_torch(entropy: bool, softcap: float | None, scale: float) -> None:
    hidden, weight, targets = random(N, D).requires_grad_(), random(11, D, seed=1), torch.arange(N)
    arguments = hidden, weight, None, targets, LogitTransform(scale, softcap)
    logprobs, entropies = token_logprobs(*arguments, entropy=entropy, backend="native")
    expected = token_logprobs_reference(*arguments)
    assert "native" not in logprobs.grad_fn.kernels.forward.__module__
    torch.testing.assert_close(logprobs, expected[0])
    assert entropies is None or torch.allclose(entropies, expected[1])


@pytest.mark.parametrize("target", [-1, 11, 10**9])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_a_target_outside_the_vocabulary_gives_nan_and_touches_no_other_memory(
    target: int, with_gradient: bool
) -> None:
    hidden, weight, targets = random(N, D).requires_grad_(with_gradient), random(11, D, seed=1), torch.arange(N)
    expected, _ = token_logprobs(hidden, weight, None, targets, LogitTransform(), backend="native")
    targets = targets.clone()
    targets[2] = target
    found, _ = token_logprobs(hidden, weight, None, targets, LogitTransform(), backend="native")
    assert found[2].isnan()
    assert torch.equal(found[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@pytest.mark.parametrize("size", [1, 5, 256, 300, 4111])
def test_the_same_seed_samples_the_same_tokens_as_torch(size: int) -> None:
    logits = 2 * random(64, size)
    found, expected = (
        sample(logits.clone(), torch.Generator().manual_seed(1), backend=backend) for backend in ("native", "torch")
    )
    assert torch.equal(found[0], expected[0])
    exact = torch.log_softmax(logits.double(), -1).gather(1, found[0][:, None]).squeeze(1)
    torch.testing.assert_close(found[1].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [6, 1000])
def test_a_token_of_probability_0_is_never_sampled(size: int) -> None:
    logits = torch.full((2000, size), float("-inf"))
    logits[:, 2] = 0.0
    logits[:, size - 2] = 1.0
    tokens, logprobs = sample(logits, torch.Generator().manual_seed(0), backend="native")
    assert set(tokens.tolist()) == {2, size - 2}
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniform_numbers_sample_a_possible_token(uniform: float) -> None:
    from rlhfkernels.ops.native import sample as native

    logits = random(3, 2000)
    logits[:, :700] = logits[:, 1500:] = float("-inf")
    tokens, _ = native.draw(logits, torch.full((3,), uniform))
    assert ((tokens >= 700) & (tokens < 1500)).all()


def test_nan_logits_sample_a_token_of_the_vocabulary() -> None:
    tokens, logprobs = sample(torch.full((2, 700), float("nan")), None, backend="native")
    assert ((tokens >= 0) & (tokens < 700)).all()
    assert logprobs.isnan().all()


def test_the_number_of_threads_changes_no_result() -> None:
    x, weight = random(64, 700), random(700, seed=1)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append((rms_norm(x, weight, 1e-5, backend="native"), swiglu(x, backend="native")))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
