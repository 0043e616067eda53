from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops import causal_attention as module
from rlhfkernels.ops.causal_attention import causal_attention, causal_attention_reference
from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.sight import Reach, Sight

# (b, t, heads, start, window): one block of queries or several, heads that fill no vector, parts of a sequence.
CASES = {
    "short": (2, 5, Heads(4, 2, 8), 0, None),
    "interleaved": (3, 37, Heads(4, 4, 20, interleaved=True), 0, None),
    "grouped, in a window, from the middle": (2, 70, Heads(6, 2, 32), 30, 7),
    "last position": (1, 24, Heads(2, 1, 80), 23, 5),
    "window as wide as the sequence": (2, 50, Heads(2, 2, 33, interleaved=True), 49, 100),
    "one position, of one number": (2, 1, Heads(2, 2, 1), 0, None),
    "a window of itself, of heads of 3": (2, 26, Heads(2, 1, 3), 25, 1),
    "wide heads": (1, 25, Heads(2, 1, 256), 0, 24),
    "blocks": (1, 130, Heads(3, 1, 64), 64, None),
}


def inputs(b: int, t: int, heads: Heads, padded: bool) -> tuple[torch.Tensor, Sight]:
    generator = torch.Generator().manual_seed(t)
    qkv = torch.randn(b * t, (heads.num_queries + 2 * heads.num_keys) * heads.size, generator=generator)
    padding = None
    if padded:
        padding = (torch.arange(t) >= torch.randint((t + 1) // 2, (b, 1), generator=generator)).long()
    return qkv, Sight(torch.zeros(b, t), padding)


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("library")
    return str(request.param)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str, kernels: str, padded: bool) -> None:
    b, t, heads, start, window = CASES[case]
    qkv, sight = inputs(b, t, heads, padded)
    reach = Reach(start=start, window=window, scale=heads.size**-0.5)
    exact = qkv.double().requires_grad_()
    qkv.requires_grad_()
    expected, found = (
        causal_attention_reference(exact, heads, sight, reach),
        causal_attention(qkv, heads, sight, reach, kernels=kernels),
    )
    assert found.shape == (b * (t - start), heads.num_queries * heads.size)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    found.backward(grad)
    assert (found - expected).abs().max() < 3e-6
    assert qkv.grad is not None
    assert exact.grad is not None
    assert (qkv.grad - exact.grad).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(causal_attention(qkv, heads, sight, reach, kernels=kernels), found)


def test_in_float64_it_is_the_reference() -> None:
    qkv, sight = inputs(*CASES["grouped, in a window, from the middle"][:3], padded=True)
    reach = Reach(start=30, window=7, scale=0.3)
    heads = CASES["grouped, in a window, from the middle"][2]
    found = causal_attention(qkv.double(), heads, sight, reach, kernels="native")
    torch.testing.assert_close(found, causal_attention_reference(qkv.double(), heads, sight, reach))


@pytest.mark.usefixtures("library")
def test_in_c_it_keeps_its_input_and_one_number_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(4, 2, 8)
    qkv, sight = inputs(2, 6, heads, padded=False)
    qkv.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_attention(qkv, heads, sight, Reach(start=0, window=None, scale=1.0), kernels="native")
    assert [t.shape for t in kept] == [qkv.shape, (2, 4, 6)]
    assert kept[0].data_ptr() == qkv.data_ptr()


@pytest.mark.usefixtures("library")
def test_fewer_heads_than_threads_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(4, 1, 8)
    qkv, sight = inputs(2, 6, heads, padded=False)
    qkv.requires_grad_()
    reach = Reach(start=0, window=None, scale=1.0)
    for threads, by_c in ((2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = causal_attention(qkv, heads, sight, reach, kernels="native")
        assert (type(found.grad_fn).__name__ == "_CausalAttentionBackward") is by_c


@pytest.mark.usefixtures("library")
def test_two_threads_give_what_one_gives() -> None:
    heads = Heads(4, 2, 32)
    qkv, sight = inputs(2, 96, heads, padded=False)
    qkv.requires_grad_()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = causal_attention(qkv, heads, sight, Reach(start=0, window=None, scale=0.2), kernels="native")
            found.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_attending_from_every_position_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does where its kernels without a mask are the better ones."""
    heads = Heads(4, 2, 8)
    qkv, sight = inputs(2, 9, heads, padded=False)
    qkv.requires_grad_()
    found = []
    for masks_are_cheap in (True, False):
        monkeypatch.setattr(module, "_masks_are_cheap", lambda device, cheap=masks_are_cheap: cheap)
        y = causal_attention(qkv, heads, sight, Reach(start=4, window=None, scale=0.3), kernels="torch")
        found.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
