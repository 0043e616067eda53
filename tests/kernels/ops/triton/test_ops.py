"""Triton kernels against their references in float64: values and gradients at odd sizes, in all dtypes."""

from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops import rms_norm as rms_norm_module
from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.qkv_layout import RotaryPart
from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference
from rlhfkernels.ops.rotary import make_signed_sin, rotary_, rotary_reference
from rlhfkernels.ops.swiglu import swiglu, swiglu_reference
from rlhfkernels.ops.token_logprobs import token_logprobs, token_logprobs_reference

# Relative error of the norm, by dtype: a few of its roundings.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCES)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def assert_near(found: torch.Tensor | None, expected: torch.Tensor | None, tolerance: float) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_the_test_kernel_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkernels.ops.triton import launch

    launch.run_test_kernel(device)
    monkeypatch.setattr(launch, "_test_kernel", {(1,): lambda x, **options: None})
    with pytest.raises(RuntimeError, match="wrote 0"):
        launch.run_test_kernel(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 16), (2, 3, 37), (2, 8192)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_rms_norm(
    device: str,
    shape: tuple[int, ...],
    trained: tuple[bool, bool],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = draw(*shape, dtype=dtype, device=device).requires_grad_(trained[0])
    weight = draw(shape[-1], dtype=dtype, device=device, seed=1).requires_grad_(trained[1])
    grad = draw(*shape, dtype=dtype, device=device, seed=2)
    y = rms_norm(x, weight, 1e-5, backend="triton")
    assert "triton" in y.grad_fn.kernels.forward.__module__
    y.backward(grad)
    wide_x, wide_weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight))
    expected = rms_norm_reference(wide_x, wide_weight, 1e-5)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(x.grad, wide_x.grad, TOLERANCES[dtype])
    assert_near(weight.grad, wide_weight.grad, TOLERANCES[dtype])
    with torch.no_grad():
        monkeypatch.setattr(rms_norm_module, "_is_bound_by_launch", lambda x: False)
        assert torch.equal(rms_norm(x, weight, 1e-5, backend="triton"), y)


def test_rms_norm_sums_the_gradient_of_the_weight_over_groups_of_rows(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhfkernels.ops.triton import rms_norm as kernels

    monkeypatch.setattr(kernels, "_MAX_ROW_GROUPS", 3)
    x, weight = draw(8, 20, device=device), draw(20, device=device, seed=1).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    rms_norm(x, weight, 1e-5, backend="triton").sum().backward()
    rms_norm_reference(x.double(), wide, 1e-5).sum().backward()
    assert_near(weight.grad, wide.grad, TOLERANCES[torch.float32])


def test_rms_norm_of_strided_rows(device: str) -> None:
    x, weight = draw(4, 3, 40, device=device)[:, 1:, :24], draw(24, device=device, seed=1)
    found = rms_norm(x, weight, 1e-5, backend="triton")
    assert_near(found, rms_norm_reference(x.double(), weight.double(), 1e-5), TOLERANCES[torch.float32])


def test_rms_norm_leaves_rows_larger_than_a_block_to_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkernels.ops.triton import rms_norm as kernels

    monkeypatch.setattr(kernels, "MAX_ROW_SIZE", 16)
    x, weight = draw(4, 17, device=device), draw(17, device=device, seed=1)
    assert rms_norm_module._kernels(x, x[0], "triton") is rms_norm_module._TORCH
    assert rms_norm_module._kernels(x[:, :16], x[0, :16], "triton") is not rms_norm_module._TORCH
    found = rms_norm(x, weight, 1e-5, backend="triton")
    assert_near(found, rms_norm_reference(x.double(), weight.double(), 1e-5), TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (2, 3, 74), (3, 2 * 1500)])
def test_swiglu(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (4 * draw(*shape, dtype=dtype, device=device)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = swiglu(x, backend="triton"), swiglu_reference(exact)
    assert "triton" in y.grad_fn.kernels.forward.__module__
    grad = draw(*y.shape, dtype=dtype, device=device, seed=1)
    y.backward(grad)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(x.grad, exact.grad, TOLERANCES[dtype])
    with torch.no_grad():
        assert torch.equal(swiglu(x, backend="triton"), y)


def test_swiglu_of_an_expanded_gradient_and_a_transposed_input(device: str) -> None:
    x = draw(6, 5, device=device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    swiglu(x.t(), backend="triton").sum().backward()
    swiglu_reference(exact.t()).sum().backward()
    assert_near(x.grad, exact.grad, TOLERANCES[torch.float32])


T, E = 5, 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("part", "rows"), [(RotaryPart(1, 7, 4), 1), (RotaryPart(3, 3, 2), 2), (RotaryPart(1, 300, 200), 1)], ids=str
)
@pytest.mark.parametrize("size", [E, 4])
def test_rotary(device: str, part: RotaryPart, size: int, rows: int, dtype: torch.dtype) -> None:
    angles = draw(rows, T, size // 2, device=device, seed=3).repeat(1, 1, 2)
    cos, signed_sin = angles.cos().to(dtype), make_signed_sin(angles.sin()).to(dtype)
    leaf = draw(2 * T, part.blocks * part.groups * E, dtype=dtype, device=device).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    x = leaf * 1.0
    y = rotary_(x, cos, signed_sin, part, backend="triton")
    expected = rotary_reference(exact, cos.double(), signed_sin.double(), part)
    assert "triton" in y.grad_fn.kernel.__module__
    assert y.data_ptr() == x.data_ptr()
    grad = draw(*y.shape, dtype=dtype, device=device, seed=1)
    before = grad.clone()
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(grad, before)
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(leaf.grad, exact.grad, TOLERANCES[dtype])


def test_rotary_of_strided_rows(device: str) -> None:
    part = RotaryPart(1, 3, 2)
    angles = draw(1, T, E // 2, device=device).repeat(1, 1, 2)
    whole = draw(T, 5 * E, device=device)
    x, rest = whole[:, E : 4 * E], whole.clone()
    cos, signed_sin = angles.cos(), make_signed_sin(angles.sin())
    expected = rotary_reference(x.contiguous().double(), cos.double(), signed_sin.double(), part)
    with torch.no_grad():
        rotary_(x, cos, signed_sin, part, backend="triton")
    assert_near(x, expected, TOLERANCES[torch.float32])
    rest[:, E : 4 * E] = whole[:, E : 4 * E]
    assert torch.equal(whole, rest)


N, D = 5, 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocabulary", "softcap", "scale", "temperature"),
    [(1, None, 1.0, 1.0), (11, 3.0, 1.5, 0.7), (9001, None, 1.0, 1.0), (9001, 3.0, 1.5, 0.7)],
)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_token_logprobs(
    device: str,
    vocabulary: int,
    softcap: float | None,
    scale: float,
    temperature: float,
    entropy: bool,
    trained: bool,
    dtype: torch.dtype,
) -> None:
    leaves = [draw(N, D, dtype=dtype, device=device).requires_grad_()]
    leaves += [draw(*shape, dtype=dtype, device=device, seed=1) for shape in ((vocabulary, D), (vocabulary,))]
    for leaf in leaves[1:]:
        leaf.requires_grad_(trained)
    targets = torch.arange(N, device=device) * 5003 % vocabulary
    weights = draw(2, N, device=device, seed=2)
    found = []
    for wide in (True, False):
        hidden, weight, bias = (
            t.detach().to(torch.float64 if wide else dtype).requires_grad_(t.requires_grad) for t in leaves
        )
        arguments = hidden, weight, bias, targets, LogitTransform(scale, softcap, temperature)
        if wide:
            outputs = token_logprobs_reference(*arguments)
        else:
            outputs = token_logprobs(*arguments, chunk=2, entropy=entropy, backend="triton")
            assert "triton" in outputs[0].grad_fn.kernels.forward.__module__
        loss = sum((w * output).sum() for w, output in zip(weights, outputs[: 1 + entropy], strict=False))
        inputs = [hidden, *((weight, bias) if trained else ())]
        found.append([*outputs[: 1 + entropy], *torch.autograd.grad(loss, inputs)])
    for expected, ours in zip(*found, strict=True):
        # Raw outputs are rounded to the narrow dtype before the exponential, which multiplies the error.
        assert_near(ours, expected, 3 * TOLERANCES[dtype])
