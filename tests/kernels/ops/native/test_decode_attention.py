"""Decode attention in C against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from rlhfkernels.ops.native.program import Program
from rlhfkernels.ops.qkv_layout import QkvLayout

pytestmark = pytest.mark.usefixtures("library")

NEAR = {"rtol": 1e-5, "atol": 1e-5}


def attended_in_float64(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Computes [h, e] of one row, head by head, from queries [h, e] and cached keys and values [k, n, e]."""
    h, k = query.shape[0], keys.shape[0]
    heads = []
    for head in range(h):
        scores = keys[head * k // h].double() @ query[head].double() * scale
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), 0)
        heads.append(weights @ values[head * k // h].double())
    return torch.stack(heads)


def rotated_in_float64(x: torch.Tensor, angles: torch.Tensor | None) -> torch.Tensor:
    """Rotates [heads, e]: elements i and i + half are a complex number, multiplied by e^(i angle)."""
    wide = x.double().clone()
    if angles is not None:
        half = angles.shape[0]
        complex_ = torch.complex(wide[:, :half], wide[:, half : 2 * half]) * torch.polar(
            torch.ones_like(angles), angles
        )
        wide[:, :half], wide[:, half : 2 * half] = complex_.real, complex_.imag
    return wide


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotated", "interleaved"),
    [
        (4, 4, 16, 16, False),
        (6, 2, 24, 24, False),
        (3, 1, 64, 32, False),
        (4, 4, 37, 0, False),
        (3, 3, 10, 4, True),
        (2, 2, 80, 20, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 3])
def test_decode_attention(
    rows: int,
    heads: int,
    kv_heads: int,
    size: int,
    rotated: int,
    interleaved: bool,
    window: int | None,
    masked: bool,
    draw: Callable[..., torch.Tensor],
    blank: Callable[..., torch.Tensor],
    placed: Callable[..., torch.Tensor],
    assert_untouched_around: Callable[..., None],
) -> None:
    torch.manual_seed(0)
    capacity, cache_len, scale = 24, 18, 0.3
    n = cache_len + 1
    qkv = draw(rows, (heads + 2 * kv_heads) * size)
    keys, values = (draw(rows, kv_heads, capacity, size) for _ in range(2))
    # Positions beyond the cache length must not be read.
    keys[:, :, cache_len:], values[:, :, cache_len:] = math.nan, math.nan
    out, scores = blank(rows, heads * size), blank(rows, heads, capacity)
    num_padding = torch.tensor([0, 5, 17][:rows] if masked else [0] * rows)
    mask = (torch.arange(n) >= num_padding[:, None]).long() if masked else None
    positions = cache_len - num_padding
    angles = torch.rand(capacity, rotated // 2, dtype=torch.float64) * 6 if rotated else None
    rotary = None
    if angles is not None:
        cos, sin = angles.cos().float(), angles.sin().float()
        rotary = placed(torch.cat((cos, cos), 1)), placed(torch.cat((-sin, sin), 1))

    if interleaved:
        query, key, value = qkv.view(rows, heads, 3, size).unbind(2)
    else:
        query, key, value = qkv.view(rows, -1, size).split([heads, kv_heads, kv_heads], 1)
    expected, expected_keys, expected_values = [], keys.double(), values.double()
    for row in range(rows):
        angle = None if angles is None else angles[positions[row]]
        expected_keys[row, :, cache_len] = rotated_in_float64(key[row], angle)
        expected_values[row, :, cache_len] = value[row].double()
        at = torch.arange(n)
        seen = (at >= num_padding[row]) & (at > cache_len - (window or n))
        past = expected_keys[row, :, :n], expected_values[row, :, :n]
        expected.append(attended_in_float64(rotated_in_float64(query[row], angle), *past, seen, scale))

    layout = QkvLayout(heads, kv_heads, size, interleaved)
    program = Program()
    program.decode_attention(qkv, out, keys, values, scores, layout=layout, rotary=rotary, window=window, scale=scale)
    program.run(cache_len=cache_len, positions=positions, mask=mask)
    torch.testing.assert_close(out.view(rows, heads, size).double(), torch.stack(expected), **NEAR)
    for found, wanted in ((keys, expected_keys), (values, expected_values)):
        torch.testing.assert_close(found.double(), wanted, **NEAR, equal_nan=True)
    assert_untouched_around(out, keys, values, scores, qkv)


def test_a_mask_that_is_a_view_of_a_longer_one(
    draw: Callable[..., torch.Tensor], blank: Callable[..., torch.Tensor]
) -> None:
    """The mask of a step is a view of the rollout's, so its rows are not adjacent."""
    keys, values = draw(2, 1, 8, 4), draw(2, 1, 8, 4)
    qkv, out, scores = draw(2, 12), blank(2, 4), blank(2, 1, 8)
    whole = torch.ones(2, 8, dtype=torch.int64)
    whole[1, :3] = 0
    program = Program()
    program.decode_attention(
        qkv, out, keys, values, scores, layout=QkvLayout(1, 1, 4), rotary=None, window=None, scale=1.0
    )
    program.run(cache_len=5, positions=torch.tensor([5, 2]), mask=whole[:, :6])
    for row, start in ((0, 0), (1, 3)):
        seen = torch.arange(6) >= start
        expected = attended_in_float64(qkv[row, None, :4], keys[row, :, :6], values[row, :, :6], seen, 1.0)
        torch.testing.assert_close(out[row, None].double(), expected, **NEAR)


def test_a_full_cache_is_refused(
    draw: Callable[..., torch.Tensor], assert_untouched_around: Callable[..., None]
) -> None:
    keys, values = draw(1, 1, 3, 4), draw(1, 1, 3, 4)
    program = Program()
    operands = draw(1, 12), draw(1, 4), keys, values, draw(1, 1, 3)
    program.decode_attention(*operands, layout=QkvLayout(1, 1, 4), rotary=None, window=None, scale=1.0)
    program.run(cache_len=2)
    with pytest.raises(ValueError, match="the KV cache holds 3 positions"):
        program.run(cache_len=3)
    assert_untouched_around(keys)
