from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.native.structures import STRUCTURES
from rlhfkernels.ops.native.tape import Segment, Tape, tape_for

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_are_as_large_as_the_c_files_are(library: ctypes.CDLL, name: str) -> None:
    assert getattr(library, f"size_of_{name}")() == ctypes.sizeof(STRUCTURES[name])


def everything(rows: int, placed: Callable[..., torch.Tensor]) -> tuple[Tape, list[torch.Tensor]]:
    """A tape with every op, each reading what the one before wrote, and all that it writes."""
    torch.manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return placed(torch.randn(shape))

    heads, size, capacity = 3, 24, 16
    width = heads * size
    x, normed, qkv, attended = draw(rows, width), draw(rows, width), draw(rows, 3 * width), draw(rows, width)
    keys, values, scores = (draw(rows, heads, capacity, n) for n in (size, size, 1))
    low, wide, inner = draw(rows, 5), draw(rows, 74), draw(rows, 37)
    tape = Tape()
    tape.norm(x, draw(width), None, normed, eps=1e-5, centred=True)
    tape.skinny_linear(normed, draw(5, width), low, segments=[Segment(start=0, stop=5, scale=0.1)])
    ups = [Segment(start=0, stop=72), Segment(start=72, stop=216, up=draw(144, 5))]
    tape.skinny_linear(normed, draw(3 * width, width), qkv, low=low, segments=ups)
    scores = scores.view(rows, heads, capacity)
    tape.decode_attention(
        qkv, attended, keys, values, scores, heads=Heads(heads, heads, size), turns=None, window=None, scale=size**-0.5
    )
    tape.skinny_linear(attended, draw(width, 74), wide, transposed=True)
    tape.activation(wide, inner, kind="silu", gated=True)
    tape.skinny_linear(inner, draw(width, 37), x, adds=True)
    return tape, [x, normed, qkv, attended, keys, values, scores, low, wide, inner]


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_threads_change_no_number(
    monkeypatch: pytest.MonkeyPatch, rows: int, threads: int, placed: Callable[..., torch.Tensor]
) -> None:
    found = []
    for number in (1, threads):
        monkeypatch.setattr(Tape, "_num_threads", lambda self, number=number: number)
        tape, written = everything(rows, placed)
        for position in range(8, 11):
            tape.run(written=position)
        found.append(written)
    for one, more in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, more)


def test_more_threads_are_taken_where_there_is_enough_to_read(draw: Callable[..., torch.Tensor]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        few, many = Tape(), Tape()
        few.skinny_linear(draw(1, 8), draw(8, 8), draw(1, 8))
        many.skinny_linear(draw(1, 256), draw(256, 256), draw(1, 256))
        assert (few._num_threads(), many._num_threads()) == (1, 2)
        torch.set_num_threads(1)
        assert many._num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_what_is_written_down_later_is_run_too(draw: Callable[..., torch.Tensor]) -> None:
    x, once, twice = draw(2, 16), draw(2, 16), draw(2, 16)
    tape = Tape()
    tape.run()
    tape.activation(x, once, kind="relu", gated=False)
    tape.run()
    tape.activation(once, twice, kind="relu", gated=False)
    tape.run()
    assert torch.equal(once, x.relu())
    assert torch.equal(twice, once)


def test_fake_tensors_have_no_tape() -> None:
    with FakeTensorMode():
        assert tape_for(torch.empty(2, 3)) is None
    assert isinstance(tape_for(torch.empty(2, 3)), Tape)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3).double(), torch.ones(3, 2).t(), torch.ones(2, 3, device="meta")])
def test_an_operand_that_the_c_would_misread_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        Tape().activation(wrong, torch.empty(2, 3), kind="relu", gated=False)
    with pytest.raises(AssertionError):
        Tape().skinny_linear(torch.ones(2, 3), torch.ones(4, 5), torch.empty(2, 4))
