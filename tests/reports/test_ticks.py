from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfreports.ticks import log_ticks, plain_number, spaced


@given(st.floats(1e-9, 1e9), st.floats(1.2, 1e6))
def test_ticks_are_round_numbers_within_the_axis(low, ratio):
    high = low * ratio
    ticks = log_ticks(low, high)
    assert len(ticks) >= 1
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(plain_number(tick).replace(",", "").replace(".", "").strip("0")) <= 2 for tick in ticks)


@given(st.floats(1e-9, 1e9))
def test_half_a_decade_has_at_least_three_ticks(low):
    assert len(log_ticks(low, low * 10**0.5)) >= 3


@given(st.lists(st.integers(1, 100_000), min_size=1, unique=True).map(sorted))
def test_labels_that_are_kept_have_room_and_include_the_last(lengths):
    span = max(lengths[-1] / lengths[0], 2.0)
    kept = spaced(lengths, span)
    assert kept[-1] == lengths[-1]
    assert set(kept) <= set(lengths)
    gaps = [math.log(b / a) / math.log(span) for a, b in itertools.pairwise(kept)]
    assert all(gap >= 0.109 for gap in gaps)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0005, "0.0005"), (0.3, "0.3"), (1.0, "1"), (1024.0, "1024"), (20000.0, "20,000"), (0.05, "0.05")],
)
def test_numbers_are_plain(value, text):
    assert plain_number(value) == text
