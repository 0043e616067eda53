"""The matmul in C against float64, for all memory layouts, and when it is selected."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.ops.matmul import LowRankTerm
from rlhfkernels.ops.native import matmul as native
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import Norm

pytestmark = pytest.mark.usefixtures("library")

# (rows, inner, columns): columns of partial vectors and panels; inner sizes below and above the depth of a panel.
SIZES = [
    (1, 1, 1),
    (5, 7, 15),
    (24, 384, 16),
    (25, 390, 48),
    (130, 7, 64),
    (24, 800, 65),
    (130, 390, 200),
    (3, 385, 33),
]


def guarded(rows: int, columns: int, layout: str, seed: int) -> torch.Tensor:
    """Returns random elements surrounded by NaN; the elements of its ``rows`` or of its ``columns`` are adjacent."""
    if layout == "columns":
        return guarded(columns, rows, "rows", seed).t()
    room = torch.full((rows + 2, columns + 3), math.nan)
    room[1:-1, 2:-1] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return room[1:-1, 2:-1]


@pytest.mark.parametrize("rank", [None, 1, 7])
@pytest.mark.parametrize(("left_layout", "right_layout"), [("rows", "rows"), ("rows", "columns"), ("columns", "rows")])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_equals_float64_and_writes_nothing_else(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], left_layout: str, right_layout: str, rank: int | None
) -> None:
    rows, inner, columns = size
    left, right = guarded(rows, inner, left_layout, 1), guarded(inner, columns, right_layout, 2)
    low_rank = None
    expected = left.double() @ right.double()
    if rank is not None:
        low_rank = LowRankTerm(guarded(rows, rank, left_layout, 3), guarded(rank, columns, right_layout, 4), -1.5)
        expected -= 1.5 * low_rank.left.double() @ low_rank.right.double()
    for accumulate in (False, True):
        found = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            monkeypatch.setattr("rlhfkernels.ops.native.launch._MIN_ELEMENTS_PER_THREAD", 1)
            out = guarded(rows, columns, "rows", 5)
            whole = torch.empty(0).set_(out.untyped_storage())
            before = out.double()
            if not accumulate:
                out.fill_(math.nan)  # must not be read
            num_beside = len(whole) - out.numel()
            native.matmul(left, right, out, scale=0.7, accumulate=accumulate, low_rank=low_rank)
            assert whole.isnan().sum() == num_beside
            exact = 0.7 * expected + (before if accumulate else 0)
            assert (out - exact).norm() < 1e-6 * exact.norm()
            found.append(out)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("beats", [True, False])
def test_it_is_selected_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, beats: bool) -> None:
    monkeypatch.setattr(native, "_fastest", lambda num_threads: "native" if beats else "torch")
    left, right, out = torch.empty(64, 256), torch.empty(256, 64), torch.empty(64, 64)
    assert native.beats_torch() is beats
    assert native.supports(left, right, out) is beats


def test_small_matmuls_and_strided_columns_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "beats_torch", lambda: True)
    right, out = torch.empty(256, 4096), torch.empty(64, 4096)
    left = torch.empty(64, 256)
    assert native.supports(left, right, out)
    assert native.supports(left.t().contiguous().t(), right.t().contiguous().t(), out)
    assert not native.supports(left[:23], right, out[:23])
    assert not native.supports(left, right[:, :32], out[:, :32])
    assert not native.supports(left, right, torch.empty(4096, 64).t())
    assert not native.supports(left, torch.empty(256, 8192)[:, ::2], out)


def test_fake_tensors_run_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfkernels.ops.native.launch.op_address", lambda name: pytest.fail("it ran"))
    with FakeTensorMode():
        left, right, out = torch.empty(64, 256), torch.empty(256, 64), torch.empty(64, 64)
        native.matmul(left, right, out)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (torch.ones(3, 4).t(), "must be contiguous"),
        (torch.ones(4, 3, device="meta"), "on the CPU"),
        (torch.ones(4, 3).double(), "must be torch.float32"),
    ],
)
def test_a_tensor_that_c_would_misread_is_refused(wrong: torch.Tensor, rule: str) -> None:
    out = torch.ones(4, 3)
    with pytest.raises(ValueError, match=rule):
        launch("norm", Norm, 4, x=wrong, out=out, rows=4, size=3, eps=0.1)


@pytest.mark.parametrize(
    "shapes", [((5, 3), (4, 6), (5, 6)), ((5, 4), (4, 6), (4, 6)), ((5, 4), (4, 6), (5, 7))], ids=str
)
def test_shapes_that_do_not_match_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="it must have"):
        native.matmul(*(torch.ones(shape) for shape in shapes))
    with pytest.raises(ValueError, match="column stride"):
        native.matmul(torch.ones(5, 4), torch.ones(4, 6), torch.ones(6, 5).t())
