"""The product in C against float64, whatever lies how in memory; and what it is taken for."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.ops.native import product as native
from rlhfkernels.ops.native.launch import launch
from rlhfkernels.ops.native.structures import RmsNorm
from rlhfkernels.ops.product import Pair

pytestmark = pytest.mark.usefixtures("library")

# (rows, inner, columns): columns that fill no vector, no panel or several; more summed over than a panel has rows.
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


def lying(rows: int, columns: int, how: str, seed: int) -> torch.Tensor:
    """Random numbers between others that are NaN: ``wide`` has room beside its rows, ``tall`` beside its columns."""
    if how == "tall":
        return lying(columns, rows, "wide", seed).t()
    room = torch.full((rows + 2, columns + 3), math.nan)
    room[1:-1, 2:-1] = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return room[1:-1, 2:-1]


@pytest.mark.parametrize("also", [None, 1, 7])
@pytest.mark.parametrize(("left_lies", "right_lies"), [("wide", "wide"), ("wide", "tall"), ("tall", "wide")])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_is_the_product_and_touches_nothing_beside_it(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], left_lies: str, right_lies: str, also: int | None
) -> None:
    rows, inner, columns = size
    left, right = lying(rows, inner, left_lies, 1), lying(inner, columns, right_lies, 2)
    pair = None
    expected = left.double() @ right.double()
    if also is not None:
        pair = Pair(lying(rows, also, left_lies, 3), lying(also, columns, right_lies, 4), -1.5)
        expected -= 1.5 * pair.left.double() @ pair.right.double()
    for adds in (False, True):
        found = []
        for threads in (1, 2, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            monkeypatch.setattr("rlhfkernels.ops.native.launch._LEAST_NUMBERS", 1)
            out = lying(rows, columns, "wide", 5)
            whole = torch.empty(0).set_(out.untyped_storage())
            before = out.double()
            if not adds:
                out.fill_(math.nan)  # memory that is not to be read before it is written
            num_beside = len(whole) - out.numel()
            native.multiply(left, right, out, scale=0.7, adds=adds, also=pair)
            assert whole.isnan().sum() == num_beside
            exact = 0.7 * expected + (before if adds else 0)
            assert (out - exact).norm() < 1e-6 * exact.norm()
            found.append(out)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], None]:
    """Makes ``beats_library`` believe in a processor of so many lanes and of that maker."""

    def be(num_lanes: int, vendor: str) -> None:
        monkeypatch.setattr(native, "lanes", lambda: num_lanes)
        monkeypatch.setattr(Path, "exists", lambda self: bool(vendor))
        monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id : {vendor}")
        monkeypatch.setattr(native, "beats_library", native.beats_library.__wrapped__)

    return be


@pytest.mark.parametrize(
    ("num_lanes", "vendor", "beats"),
    [
        (16, "AuthenticAMD", True),
        (16, "GenuineIntel", False),
        (8, "AuthenticAMD", False),
        (4, "AuthenticAMD", False),
        (16, "", False),
    ],
)
def test_it_is_taken_where_the_library_leaves_vectors_unused(
    on_processor: Callable[[int, str], None], num_lanes: int, vendor: str, beats: bool
) -> None:
    on_processor(num_lanes, vendor)
    left, right, out = torch.empty(64, 256), torch.empty(256, 64), torch.empty(64, 64)
    assert native.beats_library() is beats
    assert native.covers(left, right, out) is beats


def test_a_vector_has_lanes(library: ctypes.CDLL) -> None:
    assert native.lanes() in (4, 8, 16)


def test_little_work_and_columns_that_lie_apart_are_the_librarys(on_processor: Callable[[int, str], None]) -> None:
    on_processor(16, "AuthenticAMD")
    right, out = torch.empty(256, 4096), torch.empty(64, 4096)
    left = torch.empty(64, 256)
    assert native.covers(left, right, out)
    assert native.covers(left.t().contiguous().t(), right.t().contiguous().t(), out)
    assert not native.covers(left[:23], right, out[:23])
    assert not native.covers(left, right[:, :32], out[:, :32])
    assert not native.covers(left, right, torch.empty(4096, 64).t())
    assert not native.covers(left, torch.empty(256, 8192)[:, ::2], out)


def test_of_fake_tensors_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfkernels.ops.native.launch.library", lambda: pytest.fail("it ran"))
    with FakeTensorMode():
        left, right, out = torch.empty(64, 256), torch.empty(256, 64), torch.empty(64, 64)
        native.multiply(left, right, out)


@pytest.mark.parametrize("wrong", [torch.ones(3, 4).t(), torch.ones(4, 3, device="meta")], ids=["strides", "device"])
def test_a_tensor_that_the_c_would_misread_is_refused(wrong: torch.Tensor) -> None:
    right = torch.ones(4, 3)
    with pytest.raises(AssertionError):
        launch(
            "rms_norm", RmsNorm, 4, x=wrong, weight=right[0], inverse=right[:, 0], out=right, rows=4, size=3, eps=0.1
        )
