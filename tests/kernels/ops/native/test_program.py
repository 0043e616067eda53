from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels.ops.native.program import Program, Segment, make_program
from rlhfkernels.ops.native.structures import STRUCTURES
from rlhfkernels.ops.qkv_layout import QkvLayout

pytestmark = pytest.mark.usefixtures("library")


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_have_the_sizes_of_the_c_structs(library: ctypes.CDLL, name: str) -> None:
    assert getattr(library, f"size_of_{name}")() == ctypes.sizeof(STRUCTURES[name])


def everything(rows: int, placed: Callable[..., torch.Tensor]) -> tuple[Program, list[torch.Tensor]]:
    """Returns a program of all ops, each reading the output of the previous one, and everything that it writes."""
    torch.manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return placed(torch.randn(shape))

    heads, size, capacity = 3, 24, 16
    width = heads * size
    x, normed, qkv, attended = draw(rows, width), draw(rows, width), draw(rows, 3 * width), draw(rows, width)
    keys, values, scores = (draw(rows, heads, capacity, n) for n in (size, size, 1))
    low, wide, inner = draw(rows, 5), draw(rows, 74), draw(rows, 37)
    program = Program()
    program.norm(x, draw(width), None, normed, eps=1e-5, centered=True)
    program.skinny_linear(normed, draw(5, width), low, segments=[Segment(start=0, stop=5, scale=0.1)])
    ups = [Segment(start=0, stop=72), Segment(start=72, stop=216, up=draw(144, 5))]
    program.skinny_linear(normed, draw(3 * width, width), qkv, low=low, segments=ups)
    scores = scores.view(rows, heads, capacity)
    program.decode_attention(
        qkv,
        attended,
        keys,
        values,
        scores,
        layout=QkvLayout(heads, heads, size),
        rotary=None,
        window=None,
        scale=size**-0.5,
    )
    program.skinny_linear(attended, draw(width, 74), wide, transposed=True)
    program.activation(wide, inner, kind="silu", gated=True)
    program.skinny_linear(inner, draw(width, 37), x, accumulate=True)
    return program, [x, normed, qkv, attended, keys, values, scores, low, wide, inner]


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_number_of_threads_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, rows: int, threads: int, placed: Callable[..., torch.Tensor]
) -> None:
    found = []
    for number in (1, threads):
        monkeypatch.setattr(Program, "_num_threads", lambda self, number=number: number)
        program, written = everything(rows, placed)
        for position in range(8, 11):
            program.run(cache_len=position)
        found.append(written)
    for one, more in zip(*found, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, more)


def test_large_weights_take_more_threads(draw: Callable[..., torch.Tensor]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small, large = Program(), Program()
        small.skinny_linear(draw(1, 8), draw(8, 8), draw(1, 8))
        large.skinny_linear(draw(1, 256), draw(256, 256), draw(1, 256))
        assert (small._num_threads(), large._num_threads()) == (1, 2)
        torch.set_num_threads(1)
        assert large._num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_ops_recorded_after_a_run_are_run_too(draw: Callable[..., torch.Tensor]) -> None:
    x, once, twice = draw(2, 16), draw(2, 16), draw(2, 16)
    program = Program()
    program.run()
    program.activation(x, once, kind="relu", gated=False)
    program.run()
    program.activation(once, twice, kind="relu", gated=False)
    program.run()
    assert torch.equal(once, x.relu())
    assert torch.equal(twice, once)


def test_fake_tensors_have_no_program() -> None:
    with FakeTensorMode():
        assert make_program(torch.empty(2, 3)) is None
    assert isinstance(make_program(torch.empty(2, 3)), Program)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3).double(), torch.ones(3, 2).t(), torch.ones(2, 3, device="meta")])
def test_an_operand_that_c_would_misread_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="x "):
        Program().activation(wrong, torch.empty(2, 3), kind="relu", gated=False)


def empty_attention(program: Program, **changes: torch.Tensor) -> None:
    """Records attention of 2 rows, 3 heads of 4 elements and a cache of 8 positions."""
    tensors = {
        "qkv": torch.zeros(2, 36),
        "out": torch.zeros(2, 12),
        "keys": torch.zeros(2, 3, 8, 4),
        "values": torch.zeros(2, 3, 8, 4),
        "scores": torch.zeros(2, 3, 8),
        **{name: tensor for name, tensor in changes.items() if name != "table"},
    }
    table = changes.get("table", torch.zeros(8, 4))
    program.decode_attention(**tensors, layout=QkvLayout(3, 3, 4), rotary=(table, table), window=None, scale=1.0)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qkv", (2, 35)),
        ("out", (2, 11)),
        ("keys", (2, 3, 8, 5)),
        ("values", (2, 3, 7, 4)),
        ("scores", (2, 3, 7)),
        ("table", (7, 4)),
        ("table", (8, 3)),
        ("table", (8, 6)),
    ],
    ids=str,
)
def test_attention_of_other_shapes_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="it must"):
        empty_attention(Program(), **{name: torch.zeros(shape)})


def test_linear_layers_of_other_shapes_are_refused() -> None:
    x, weight, out, up = torch.ones(2, 3), torch.ones(4, 3), torch.empty(2, 4), torch.ones(2, 5)
    wrong = [
        {"weight": torch.ones(4, 5)},
        {"bias": torch.ones(5)},
        {"low": torch.ones(3, 5)},
        {"segments": [Segment(start=2, stop=5)]},
        {"segments": [Segment(start=0, stop=3, up=up)], "low": torch.ones(2, 5)},
        {"segments": [Segment(start=0, stop=2, up=up)], "low": torch.ones(2, 4)},
        {"segments": [Segment(start=0, stop=2, up=up, low_offset=1)], "low": torch.ones(2, 5)},
        {"segments": [Segment(start=0, stop=4)], "weight": torch.ones(3, 4), "transposed": True},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=r"must have|there are|low has|transposed"):
            Program().skinny_linear(x, out=out, **({"weight": weight} | options))


def test_a_step_that_does_not_fit_the_program_is_refused() -> None:
    program = Program()
    empty_attention(program)
    positions, mask = torch.zeros(2, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)
    program.run(cache_len=5, positions=positions, mask=mask)
    wrong = [
        {"positions": None},
        {"positions": positions[:1]},
        {"positions": positions.float()},
        {"mask": mask[:, 1:]},
        {"mask": mask[:1]},
        {"mask": mask.bool()},
        {"mask": mask.t().contiguous().t()},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=r"must|None"):
            program.run(**({"cache_len": 5, "positions": positions, "mask": mask} | options))


@pytest.mark.parametrize("position", [-1, 8, 10**6])
def test_positions_outside_the_rotary_table_are_clamped(position: int) -> None:
    program = Program()
    empty_attention(program)
    program.run(cache_len=5, positions=torch.full((2,), position))
