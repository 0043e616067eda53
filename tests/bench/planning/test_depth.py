from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.planning.depth import deepen

_EDGE = st.text("abc", max_size=4)
_LAYER = st.text("abcd", min_size=1, max_size=6)


def step_of(depth: int, parts: list[tuple[str, str]]) -> str:
    """A step through ``depth`` layers: forward passes, each between edges of its own."""
    return "".join(edge + layer * depth for edge, layer in parts)


@given(parts=st.lists(st.tuples(_EDGE, _LAYER), min_size=1, max_size=3), times=st.integers(0, 5))
def test_a_deeper_step_is_found_or_refused(parts: list[tuple[str, str]], times: int) -> None:
    found = deepen(step_of(2, parts), step_of(4, parts), times)
    # Edges may look like layers; then a stretch is cut elsewhere, and what is repeated adds up to the same.
    assert found is None or sorted(found) == sorted(step_of(4 + times, parts))


@pytest.mark.parametrize(
    ("shallow", "deeper", "deepest"),
    [
        ("<f1>", "<fmm1>", "<fmmmmm1>"),
        ("<ab|ba>", "<axyxyb|byxyxa>", "<axyxyxyxyxyb|byxyxyxyxyxa>"),
        ("<aa>", "<aaaa>", "<aaaaaaa>"),
        ("", "xx", "xxxxx"),
        ("ab", "ab", "ab"),
    ],
)
def test_what_stands_twice_is_repeated(shallow: str, deeper: str, deepest: str) -> None:
    found = deepen(shallow, deeper, 3)
    assert found is not None
    assert "".join(found) == deepest


@pytest.mark.parametrize(
    ("shallow", "deeper"),
    [
        ("ab", "axyb"),  # the second new layer is not the first
        ("ab", "axb"),  # one new layer
        ("abc", "axx"),  # something is missing
        ("a2b", "a4b"),  # a size that depends on the depth
    ],
)
def test_anything_else_is_refused(shallow: str, deeper: str) -> None:
    assert deepen(shallow, deeper, 3) is None
