"""Linear layers of few rows in C against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from rlhfkernels.ops import skinny_linear as op
from rlhfkernels.ops.native.program import Program, Segment

pytestmark = pytest.mark.usefixtures("library")

NEAR = {"rtol": 1e-5, "atol": 1e-5}
ROWS = [1, 2, 3, 4, 5, 8, 9]


def linear_in_float64(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, low: torch.Tensor, segments: list[Segment]
) -> torch.Tensor:
    """Computes segment by segment; NaN between segments."""
    num_outputs = max(segment.stop for segment in segments)
    y = torch.full((x.shape[0], num_outputs), math.nan, dtype=torch.float64)
    for segment in segments:
        part = slice(segment.start, segment.stop)
        products = torch.zeros(x.shape[0], segment.stop - segment.start, dtype=torch.float64)
        if weight is not None:
            products += x.double() @ weight[part].double().t()
        if segment.up is not None:
            columns = slice(segment.low_offset, segment.low_offset + segment.up.shape[1])
            products += low[:, columns].double() @ segment.up.double().t()
        y[:, part] = segment.scale * products
        if bias is not None:
            y[:, part] += bias[part].double()
    return y


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(24, 37), (37, 5), (64, 16), (7, 1), (160, 131)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_skinny_linear(
    rows: int,
    transposed: bool,
    inputs: int,
    outputs: int,
    with_bias: bool,
    accumulate: bool,
    draw: Callable[..., torch.Tensor],
    blank: Callable[..., torch.Tensor],
    placed: Callable[..., torch.Tensor],
    assert_untouched_around: Callable[..., None],
) -> None:
    x, weight = draw(rows, inputs), draw(outputs, inputs)
    out = (draw if accumulate else blank)(rows, outputs)
    bias = draw(outputs) if with_bias else None
    whole = [Segment(start=0, stop=outputs)]
    expected = linear_in_float64(x, weight, bias, x, whole) + (out.double() if accumulate else 0)
    program = Program()
    stored = placed(weight.t()) if transposed else weight
    program.skinny_linear(x, stored, out, bias=bias, transposed=transposed, accumulate=accumulate)
    program.run()
    torch.testing.assert_close(out.double(), expected, **NEAR)
    assert_untouched_around(out)


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_segments_of_different_ranks_and_scales(
    rows: int,
    with_weight: bool,
    draw: Callable[..., torch.Tensor],
    blank: Callable[..., torch.Tensor],
    assert_untouched_around: Callable[..., None],
) -> None:
    inputs, outputs = 24, 41
    segments = [
        Segment(start=0, stop=3),
        Segment(start=3, stop=12, up=draw(9, 5), low_offset=16, scale=0.5),
        Segment(start=12, stop=13, scale=-2.0),
        Segment(start=13, stop=41, up=draw(28, 16), low_offset=0, scale=3.0),
    ]
    x, low, bias, out = draw(rows, inputs), draw(rows, 21), draw(outputs), blank(rows, outputs)
    weight = draw(outputs, inputs) if with_weight else None
    program = Program()
    program.skinny_linear(x, weight, out, bias=bias, low=low, segments=segments)
    program.run()
    torch.testing.assert_close(out.double(), linear_in_float64(x, weight, bias, low, segments), **NEAR)
    assert_untouched_around(out)


def test_outputs_between_segments_are_not_written(draw: Callable[..., torch.Tensor]) -> None:
    segments = [Segment(start=2, stop=7, up=draw(5, 3)), Segment(start=9, stop=10, up=draw(1, 2), low_offset=3)]
    x, low, out = draw(3, 4), draw(3, 5), draw(3, 12)
    expected = out.double()
    added = linear_in_float64(x, None, None, low, segments)
    expected[:, :10] += added.nan_to_num(0.0)
    program = Program()
    program.skinny_linear(x, None, out, low=low, segments=segments, accumulate=True)
    program.run()
    torch.testing.assert_close(out.double(), expected, **NEAR)


@pytest.mark.parametrize("as_columns", ["nothing", "x", "weight"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_op_runs_in_c_for_a_contiguous_weight(
    draw: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch, rows: int, as_columns: str
) -> None:
    programs: list[Program] = []
    monkeypatch.setattr(op, "make_program", lambda x: programs.append(Program()) or programs[-1])
    x, weight = draw(rows, 24), draw(37, 24)
    if as_columns == "x":
        x = draw(24, rows).t()
    elif as_columns == "weight":
        weight = draw(24, 37).t()
    found = op.skinny_linear(x, weight, backend="native")
    torch.testing.assert_close(found.double(), op.skinny_linear_reference(x.double(), weight.double()), **NEAR)
    assert len(programs) == (as_columns != "weight")
