from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from rlhfkernels.ops import lora_linear as module
from rlhfkernels.ops.lora_linear import LinearGroup, LoraPart, lora_linear, lora_linear_reference
from rlhfkernels.ops.skinny_linear import SkinnyLoraLinear

K, R = 12, 3


def make_group(
    sizes: list[int],
    adapted: list[int],
    *,
    dtype: torch.dtype = torch.float64,
    wide: torch.dtype | None = None,
    bias: bool = False,
    transposed: bool = False,
    trained: tuple[str, ...] = ("adapter",),
) -> LinearGroup:
    """Makes layers of the given sizes, some with adapters, in one storage as in ``Projection``."""
    torch.manual_seed(len(sizes) + 7)
    wide = wide or dtype
    n = sum(sizes)
    weight = torch.randn(K, n).to(dtype) if transposed else torch.randn(n, K).to(dtype)
    biases = torch.randn(n).to(dtype) if bias else None
    down = torch.randn(R * len(adapted), K).to(wide)
    up = torch.randn(sum(sizes[i] for i in adapted), R).to(wide)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def parameter(tensor: torch.Tensor, kind: str) -> nn.Parameter:
        return nn.Parameter(tensor, requires_grad=kind in trained)

    weights = weight.split(sizes, dim=1 if transposed else 0)
    parts = zip(adapted, down.split(R), up.split([sizes[i] for i in adapted]), strict=True) if adapted else ()
    return LinearGroup(
        weight=weight.t() if transposed else weight,
        bias=biases,
        weights=tuple(parameter(w, "base") for w in weights),
        biases=() if biases is None else tuple(parameter(b, "base") for b in biases.split(sizes)),
        transposed=transposed,
        down=down if adapted else None,
        up=up if adapted else None,
        parts=tuple(
            LoraPart(down=parameter(a, "adapter"), up=parameter(b, "adapter"), start=starts[i], scaling=0.5 + i)
            for i, a, b in parts
        ),
    )


GROUPS = {
    "alike": ([8, 8, 8], [0, 1, 2]),
    "unlike": ([8, 4, 4], [0, 1, 2]),
    "some": ([8, 4, 4], [0, 2]),
    "one": ([10], [0]),
    "bare": ([8, 4], []),
}
KINDS = {
    "frozen base": {},
    "trained base": {"trained": ("base", "adapter")},
    "bias": {"bias": True, "trained": ("base",)},
    "conv1d": {"bias": True, "transposed": True, "trained": ("base", "adapter")},
    "nothing trained": {"trained": ()},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", GROUPS)
def test_values_and_gradients_equal_the_reference(layers: str, kind: str) -> None:
    group = make_group(*GROUPS[layers], **KINDS[kind])
    found: list[list[torch.Tensor | None]] = []
    for function in (lora_linear, lora_linear_reference):
        torch.manual_seed(0)
        x = torch.randn(9, K, dtype=torch.float64, requires_grad=True)
        for parameter in group.parameters():
            parameter.grad = None
        y = function(x, group)
        (y * torch.randn_like(y)).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in group.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", GROUPS)
def test_native_values_and_gradients_equal_float64(layers: str, kind: str, native_calls: list[str]) -> None:
    narrow, exact = (make_group(*GROUPS[layers], **KINDS[kind], dtype=d) for d in (torch.float32, torch.float64))
    for a, b in zip(exact.parameters(), narrow.parameters(), strict=True):
        a.data.copy_(b.data.double())
    torch.manual_seed(0)
    x = torch.randn(30, K, requires_grad=True)
    wide_x = x.detach().double().requires_grad_()
    y, expected = lora_linear(x, narrow, backend="native"), lora_linear_reference(wide_x, exact)
    grad = torch.randn(y.shape)
    num_forward = len(native_calls)
    y.backward(grad)
    assert 0 < num_forward < len(native_calls)
    expected.backward(grad.double())
    pairs = [(y, expected), (x.grad, wide_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(narrow.parameters(), exact.parameters(), strict=True)]
    for found, reference in pairs:
        assert (found is None) == (reference is None)
        if found is not None:
            assert (found.double() - reference).norm() < 1e-6 * reference.norm()


def test_native_adds_adapters_in_the_matmul_of_the_base(native_calls: list[str]) -> None:
    with torch.no_grad():
        lora_linear(torch.randn(30, K), make_group([8, 4, 4], [0, 2], dtype=torch.float32), backend="native")
    assert len(native_calls) == 1 + 3  # every A; two layers with an adapter, and the one between them


def test_adapters_get_gradients_if_the_input_needs_none() -> None:
    group = make_group([8, 8], [0, 1])
    x = torch.randn(5, K, dtype=torch.float64)
    lora_linear(x, group).sum().backward()
    ours = [p.grad for p in group.parameters()]
    for parameter in group.parameters():
        parameter.grad = None
    lora_linear_reference(x, group).sum().backward()
    assert x.grad is None
    for mine, parameter in zip(ours, group.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_it_saves_only_its_input() -> None:
    group = make_group([8, 8], [0, 1])
    saved: list[torch.Tensor] = []
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, group)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_narrow_dtypes_are_near_float64(dtype: torch.dtype, wide: torch.dtype) -> None:
    narrow = make_group([8, 4], [0, 1], dtype=dtype, wide=wide)
    exact = make_group([8, 4], [0, 1])
    for a, b in zip(exact.parameters(), narrow.parameters(), strict=True):
        a.data.copy_(b.data.double())
    torch.manual_seed(0)
    x = torch.randn(9, K).to(dtype).requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    y, expected = lora_linear(x, narrow), lora_linear_reference(wide_x, exact)
    assert y.dtype == dtype
    y.sum().backward()
    expected.sum().backward()
    pairs = [(y, expected), (x.grad, wide_x.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(narrow.parameters(), exact.parameters(), strict=True) if a.requires_grad]
    for found, reference in pairs:
        assert found is not None
        assert reference is not None
        assert (found.double() - reference).norm() < 2e-2 * reference.norm()


NARROWER = [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)]


@pytest.mark.parametrize(("dtype", "narrow"), NARROWER)
@pytest.mark.parametrize("layers", ["alike", "some"])
def test_an_adapter_narrower_than_the_base_does_not_round_the_base(
    layers: str, dtype: torch.dtype, narrow: torch.dtype
) -> None:
    group, exact = make_group(*GROUPS[layers], dtype=dtype, wide=narrow), make_group(*GROUPS[layers])
    for a, b in zip(exact.parameters(), group.parameters(), strict=True):
        a.data.copy_(b.data.double())
    # Small enough beside W x that rounding the sum to the adapter's dtype is the larger error.
    for part in (*group.parts, *exact.parts):
        part.up.data.mul_(2.0**-10)
    torch.manual_seed(0)
    x = torch.randn(9, K, dtype=dtype, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    y, expected = lora_linear(x, group), lora_linear_reference(exact_x, exact)
    grad = torch.randn(y.shape, dtype=dtype)
    y.backward(grad)
    expected.backward(grad.double())
    assert y.dtype == dtype
    accuracy = torch.finfo(narrow).eps
    pairs = [(y, expected, accuracy / 50), (x.grad, exact_x.grad, accuracy / 50)]
    pairs += [
        (a.grad, b.grad, 4 * accuracy)
        for a, b in zip(group.parameters(), exact.parameters(), strict=True)
        if a.requires_grad
    ]
    for found, reference, bound in pairs:
        assert (found.double() - reference).norm() < bound * reference.norm()


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", ["frozen base", "bias", "conv1d"])
@pytest.mark.parametrize("layers", GROUPS)
def test_skinny_lora_linear_equals_the_reference(layers: str, kind: str, rows: int) -> None:
    group = make_group(*GROUPS[layers], **KINDS[kind])
    buffers: dict[int, torch.Tensor] = {}
    linear = SkinnyLoraLinear(group, rows, buffers)
    with torch.no_grad():
        for seed in range(2):  # the second call reuses the buffer of the first
            torch.manual_seed(seed)
            x = torch.randn(rows, K, dtype=torch.float64)
            torch.testing.assert_close(linear(x), lora_linear_reference(x, group).t())
    assert list(buffers) == [group.weight.shape[0]]


def test_skinny_lora_linear_with_adapters_in_a_wider_dtype() -> None:
    group = make_group([8, 4], [0, 1], dtype=torch.bfloat16, wide=torch.float32)
    x = torch.randn(4, K).bfloat16()
    with torch.no_grad():
        found = SkinnyLoraLinear(group, 4, {})(x)
        expected = lora_linear_reference(x, group).t()
    assert (found - expected).float().norm() < 2e-2 * expected.float().norm()


ALIKE = {
    "three": ([8, 8, 8], [0, 1, 2]),
    "after one without": ([4, 8, 8], [1, 2]),
    "before one without": ([8, 8, 6], [0, 1]),
}


@pytest.mark.parametrize("trained", [("adapter",), ("base", "adapter"), ()])
@pytest.mark.parametrize("layers", ALIKE)
def test_one_batched_matmul_of_all_adapters_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, layers: str, trained: tuple[str, ...]
) -> None:
    monkeypatch.setattr(module, "_batches_pay", lambda y: True)
    group = make_group(*ALIKE[layers], trained=trained)
    group = dataclasses.replace(group, parts=tuple(dataclasses.replace(part, scaling=0.7) for part in group.parts))
    assert module._is_one_batch(group, group.weight)
    x = torch.randn(9, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = [x, *(p for p in group.parameters() if p.requires_grad)]
    found = []
    for function in (lora_linear, lora_linear_reference):
        y = function(x, group)
        found.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", [*(GROUPS[name] for name in ("unlike", "some", "one")), ([8, 8, 8], [0, 2])])
def test_adapters_of_other_shapes_or_places_take_a_matmul_each(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[list[int], list[int]]
) -> None:
    monkeypatch.setattr(module, "_batches_pay", lambda y: True)
    group = make_group(*layers)
    same = tuple(dataclasses.replace(part, scaling=0.7) for part in group.parts)
    assert not module._is_one_batch(dataclasses.replace(group, parts=same), group.weight)
    assert not module._is_one_batch(make_group(*GROUPS["alike"]), group.weight)  # of other scales
    narrow = make_group(*ALIKE["three"], dtype=torch.bfloat16, wide=torch.float32)
    same = tuple(dataclasses.replace(part, scaling=0.7) for part in narrow.parts)
    assert not module._is_one_batch(dataclasses.replace(narrow, parts=same), narrow.weight)
