"""Every Triton form against its op's reference in float64: values and gradients, odd sizes, all dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlhfkernels.models.heads import LmHead
from rlhfkernels.ops import rms_norm as rms_norm_module
from rlhfkernels.ops.heads import RotaryPart
from rlhfkernels.ops.logprobs import token_logprobs, token_logprobs_reference
from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference
from rlhfkernels.ops.rotary import rotary_, rotary_reference, signed
from rlhfkernels.ops.swiglu import swiglu, swiglu_reference

# Relative error of the whole, by dtype: some of its own roundings.
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


def test_a_kernel_is_tried_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkernels.ops.triton import launch

    launch.try_out(device)
    monkeypatch.setattr(launch, "_one_kernel", {(1,): lambda x, **options: None})
    with pytest.raises(RuntimeError, match="wrote 0"):
        launch.try_out(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 16), (2, 3, 37), (2, 8192)])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_rms_norm(device: str, shape: tuple[int, ...], trained: tuple[bool, bool], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype, device=device).requires_grad_(trained[0])
    weight = draw(shape[-1], dtype=dtype, device=device, seed=1).requires_grad_(trained[1])
    grad = draw(*shape, dtype=dtype, device=device, seed=2)
    y = rms_norm(x, weight, 1e-5, kernels="triton")
    assert "triton" in y.grad_fn.form.forward.__module__
    y.backward(grad)
    wide_x, wide_weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight))
    expected = rms_norm_reference(wide_x, wide_weight, 1e-5)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(x.grad, wide_x.grad, TOLERANCES[dtype])
    assert_near(weight.grad, wide_weight.grad, TOLERANCES[dtype])
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-5, kernels="triton"), y)


def test_rms_norm_sums_a_weights_gradient_over_runs_of_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkernels.ops.triton import rms_norm as form

    monkeypatch.setattr(form, "_MOST_RUNS", 3)
    x, weight = draw(8, 20, device=device), draw(20, device=device, seed=1).requires_grad_()
    wide = weight.detach().double().requires_grad_()
    rms_norm(x, weight, 1e-5, kernels="triton").sum().backward()
    rms_norm_reference(x.double(), wide, 1e-5).sum().backward()
    assert_near(weight.grad, wide.grad, TOLERANCES[torch.float32])


def test_rms_norm_takes_rows_that_are_not_side_by_side(device: str) -> None:
    x, weight = draw(4, 3, 40, device=device)[:, 1:, :24], draw(24, device=device, seed=1)
    found = rms_norm(x, weight, 1e-5, kernels="triton")
    assert_near(found, rms_norm_reference(x.double(), weight.double(), 1e-5), TOLERANCES[torch.float32])


def test_rms_norm_leaves_rows_wider_than_a_block_to_torch(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhfkernels.ops.triton import rms_norm as form

    monkeypatch.setattr(form, "WIDEST_ROW", 16)
    x, weight = draw(4, 17, device=device), draw(17, device=device, seed=1)
    assert rms_norm_module._form(x, x[0], "triton") is rms_norm_module._TORCH
    assert rms_norm_module._form(x[:, :16], x[0, :16], "triton") is not rms_norm_module._TORCH
    found = rms_norm(x, weight, 1e-5, kernels="triton")
    assert_near(found, rms_norm_reference(x.double(), weight.double(), 1e-5), TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 6), (2, 3, 74), (3, 2 * 1500)])
def test_swiglu(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (4 * draw(*shape, dtype=dtype, device=device)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = swiglu(x, kernels="triton"), swiglu_reference(exact)
    assert "triton" in y.grad_fn.form.forward.__module__
    grad = draw(*y.shape, dtype=dtype, device=device, seed=1)
    y.backward(grad)
    expected.backward(grad.double())
    assert y.dtype == dtype
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(x.grad, exact.grad, TOLERANCES[dtype])
    with torch.no_grad():
        assert torch.equal(swiglu(x, kernels="triton"), y)


def test_swiglu_takes_a_gradient_that_is_one_number_and_rows_that_are_columns(device: str) -> None:
    x = draw(6, 5, device=device).requires_grad_()
    exact = x.detach().double().requires_grad_()
    swiglu(x.t(), kernels="triton").sum().backward()
    swiglu_reference(exact.t()).sum().backward()
    assert_near(x.grad, exact.grad, TOLERANCES[torch.float32])


T, E = 5, 12


def rotated_by_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, part: RotaryPart) -> torch.Tensor:
    """Every group by itself, in float64."""
    size = cos.shape[-1]
    groups = list(x.double().view(-1, T, part.blocks * part.groups, E).unbind(2))
    for i, group in enumerate(groups):
        if i % part.groups < part.rotated:
            turned = rotary_reference(group[..., :size], cos.double(), sin.double())
            groups[i] = torch.cat([turned, group[..., size:]], -1)
    return torch.stack(groups, 2).view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("part", "rows"), [(RotaryPart(1, 7, 4), 1), (RotaryPart(3, 3, 2), 2), (RotaryPart(1, 300, 200), 1)], ids=str
)
@pytest.mark.parametrize("size", [E, 4])
def test_rotary(device: str, part: RotaryPart, size: int, rows: int, dtype: torch.dtype) -> None:
    angles = draw(rows, T, size // 2, device=device, seed=3).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    leaf = draw(2 * T, part.blocks * part.groups * E, dtype=dtype, device=device).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    x = leaf * 1.0
    y, expected = rotary_(x, cos, signed(sin), part, kernels="triton"), rotated_by_reference(exact, cos, sin, part)
    assert "triton" in y.grad_fn.turn.__module__
    assert y.data_ptr() == x.data_ptr()
    grad = draw(*y.shape, dtype=dtype, device=device, seed=1)
    before = grad.clone()
    y.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(grad, before)
    assert_near(y, expected, TOLERANCES[dtype])
    assert_near(leaf.grad, exact.grad, TOLERANCES[dtype])


def test_rotary_turns_the_rows_of_a_wider_tensor(device: str) -> None:
    part = RotaryPart(1, 3, 2)
    angles = draw(1, T, E // 2, device=device).repeat(1, 1, 2)
    whole = draw(T, 5 * E, device=device)
    x, rest = whole[:, E : 4 * E], whole.clone()
    expected = rotated_by_reference(x.contiguous(), angles.cos(), angles.sin(), part)
    with torch.no_grad():
        rotary_(x, angles.cos(), signed(angles.sin()), part, kernels="triton")
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
def test_logprobs(
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
        head = LmHead(
            nn.Parameter(weight, weight.requires_grad), nn.Parameter(bias, trained), scale=scale, softcap=softcap
        )
        if wide:
            outputs = token_logprobs_reference(hidden, head, targets, temperature=temperature)
        else:
            outputs = token_logprobs(
                hidden, head, targets, temperature=temperature, chunk=2, entropy=entropy, kernels="triton"
            )
            assert "triton" in outputs[0].grad_fn.form.read.__module__
        loss = sum((w * output).sum() for w, output in zip(weights, outputs[: 1 + entropy], strict=False))
        inputs = [hidden, *((head.weight, head.bias) if trained else ())]
        found.append([*outputs[: 1 + entropy], *torch.autograd.grad(loss, inputs)])
    for expected, ours in zip(*found, strict=True):
        # Products that are rounded to a narrow dtype before they become logits move an exponential by as much.
        assert_near(ours, expected, 3 * TOLERANCES[dtype])
