from __future__ import annotations

import pytest
import torch

from rlhfkernels.ops import causal_attention as module
from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask, Segment
from rlhfkernels.ops.causal_attention import causal_attention, causal_attention_reference, packed_attention
from rlhfkernels.ops.qkv_layout import QkvLayout

# (b, t, layout, start, window): one block of queries or several, heads of partial vectors, parts of a sequence.
CASES = {
    "short": (2, 5, QkvLayout(4, 2, 8), 0, None),
    "interleaved": (3, 37, QkvLayout(4, 4, 20, interleaved=True), 0, None),
    "grouped, in a window, from the middle": (2, 70, QkvLayout(6, 2, 32), 30, 7),
    "last position": (1, 24, QkvLayout(2, 1, 80), 23, 5),
    "window as wide as the sequence": (2, 50, QkvLayout(2, 2, 33, interleaved=True), 49, 100),
    "one position of one element": (2, 1, QkvLayout(2, 2, 1), 0, None),
    "a window of itself, of heads of 3": (2, 26, QkvLayout(2, 1, 3), 25, 1),
    "wide heads": (1, 25, QkvLayout(2, 1, 256), 0, 24),
    "blocks": (1, 130, QkvLayout(3, 1, 64), 64, None),
}


def inputs(b: int, t: int, layout: QkvLayout, padded: bool) -> tuple[torch.Tensor, CausalMask]:
    generator = torch.Generator().manual_seed(t)
    qkv = torch.randn(b * t, (layout.num_heads + 2 * layout.num_kv_heads) * layout.head_size, generator=generator)
    padding = None
    if padded:
        padding = (torch.arange(t) >= torch.randint((t + 1) // 2, (b, 1), generator=generator)).long()
    return qkv, CausalMask(torch.zeros(b, t), padding)


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        request.getfixturevalue("library")
    return str(request.param)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_reference(case: str, backend: str, padded: bool) -> None:
    b, t, layout, start, window = CASES[case]
    qkv, mask = inputs(b, t, layout, padded)
    span = AttentionSpan(start=start, window=window, scale=layout.head_size**-0.5)
    exact = qkv.double().requires_grad_()
    qkv.requires_grad_()
    expected, found = (
        causal_attention_reference(exact, layout, mask, span),
        causal_attention(qkv, layout, mask, span, backend=backend),
    )
    assert found.shape == (b * (t - start), layout.num_heads * layout.head_size)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    found.backward(grad)
    assert (found - expected).abs().max() < 3e-6
    assert qkv.grad is not None
    assert exact.grad is not None
    assert (qkv.grad - exact.grad).abs().max() < 1e-5
    with torch.no_grad():
        assert torch.equal(causal_attention(qkv, layout, mask, span, backend=backend), found)


def test_float64_equals_the_reference() -> None:
    qkv, mask = inputs(*CASES["grouped, in a window, from the middle"][:3], padded=True)
    span = AttentionSpan(start=30, window=7, scale=0.3)
    layout = CASES["grouped, in a window, from the middle"][2]
    found = causal_attention(qkv.double(), layout, mask, span, backend="native")
    torch.testing.assert_close(found, causal_attention_reference(qkv.double(), layout, mask, span))


@pytest.mark.usefixtures("library")
def test_native_saves_its_input_and_one_float_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = QkvLayout(4, 2, 8)
    qkv, mask = inputs(2, 6, layout, padded=False)
    qkv.requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        causal_attention(qkv, layout, mask, AttentionSpan(start=0, window=None, scale=1.0), backend="native")
    assert [t.shape for t in saved] == [qkv.shape, (2, 4, 6)]
    assert saved[0].data_ptr() == qkv.data_ptr()


@pytest.mark.usefixtures("library")
def test_fewer_heads_than_threads_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = QkvLayout(4, 1, 8)
    qkv, mask = inputs(2, 6, layout, padded=False)
    qkv.requires_grad_()
    span = AttentionSpan(start=0, window=None, scale=1.0)
    for threads, is_native in ((2, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = causal_attention(qkv, layout, mask, span, backend="native")
        assert (type(found.grad_fn).__name__ == "_CausalAttentionBackward") is is_native


@pytest.mark.usefixtures("library")
def test_the_number_of_threads_changes_no_result() -> None:
    layout = QkvLayout(4, 2, 32)
    qkv, mask = inputs(2, 96, layout, padded=False)
    qkv.requires_grad_()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = causal_attention(qkv, layout, mask, AttentionSpan(start=0, window=None, scale=0.2), backend="native")
            found.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    finally:
        torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_from_every_position_gives_the_same(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    """CUDA attends from every position where kernels without a mask are faster; with one, heads are repeated."""
    layout = QkvLayout(4, 2, 8)
    qkv, mask = inputs(2, 9, layout, padded=padded)
    qkv.requires_grad_()
    found = []
    for masks_are_cheap in (True, False):
        monkeypatch.setattr(module, "_masks_are_cheap", lambda query, cheap=masks_are_cheap: cheap)
        y = causal_attention(qkv, layout, mask, AttentionSpan(start=4, window=None, scale=0.3), backend="torch")
        found.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def block_diagonal(
    qkv: torch.Tensor, layout: QkvLayout, segments: list[Segment], window: int | None, scale: float
) -> torch.Tensor:
    """Attention of a packed row by its formula, with a mask of the whole row."""
    query, key, value = layout.split(qkv)
    group = layout.num_heads // layout.num_kv_heads
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    owner = torch.tensor([i for i, segment in enumerate(segments) for _ in range(segment.length)])
    at = torch.tensor([i for segment in segments for i in range(segment.length)])
    seen = (owner[:, None] == owner) & (at[:, None] >= at)
    if window is not None:
        seen &= at[:, None] - at < window
    scores = torch.einsum("qhe,phe->hqp", query, key) * scale
    out = torch.einsum("hqp,phe->qhe", torch.softmax(scores.masked_fill(~seen, float("-inf")), -1), value)
    starts = torch.tensor([segment.start for segment in segments])
    return out.flatten(1)[at >= starts[owner]]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    "segments",
    [
        [Segment(9)],
        [Segment(5), Segment(1), Segment(30)],
        [Segment(6, 2), Segment(6, 2), Segment(6, 3), Segment(11, 10), Segment(40, 0)],
    ],
)
@pytest.mark.parametrize("layout", [QkvLayout(4, 2, 8), QkvLayout(3, 3, 20, interleaved=True)])
def test_a_packed_row_is_block_diagonal_attention(
    layout: QkvLayout, segments: list[Segment], window: int | None, backend: str
) -> None:
    length = sum(segment.length for segment in segments)
    qkv = inputs(1, length, layout, padded=False)[0]
    exact = qkv.double().requires_grad_()
    qkv.requires_grad_()
    expected = block_diagonal(exact, layout, segments, window, 0.3)
    found = packed_attention(qkv, layout, segments, window=window, scale=0.3, backend=backend)
    assert found.shape == expected.shape
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    found.backward(grad)
    assert (found - expected).abs().max() < 3e-6
    assert qkv.grad is not None
    assert exact.grad is not None
    assert (qkv.grad - exact.grad).abs().max() < 1e-5
    wide = exact.detach()
    again = packed_attention(wide, layout, segments, window=window, scale=0.3, backend="torch")
    torch.testing.assert_close(again, expected.detach(), rtol=1e-12, atol=1e-12)


def test_neighbours_of_one_size_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = QkvLayout(2, 2, 4)
    shapes: list[tuple[int, int]] = []
    attend = module.causal_attention

    def noted(qkv: torch.Tensor, layout: QkvLayout, mask: CausalMask, *rest: AttentionSpan, **options: str) -> object:
        shapes.append((mask.b, mask.t))
        return attend(qkv, layout, mask, *rest, **options)

    monkeypatch.setattr(module, "causal_attention", noted)
    segments = [Segment(4), Segment(4), Segment(4, 1), Segment(2), Segment(2)]
    packed_attention(inputs(1, 16, layout, padded=False)[0], layout, segments, window=None, scale=1.0)
    assert shapes == [(2, 4), (1, 4), (2, 2)]
