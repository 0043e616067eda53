from __future__ import annotations

import math

import pytest

from rlhfbench.evidence.items import worst


@pytest.mark.parametrize("errors", [[1e-3, math.nan], [math.nan, 1e-3], [1e-3, math.nan, math.inf]])
def test_the_worst_error_is_nan_wherever_it_stands(errors: list[float]) -> None:
    assert math.isnan(worst(errors) or 0.0)


def test_the_worst_error_is_the_largest_number_and_may_be_absent() -> None:
    assert worst([1e-3, math.inf, 2.0]) == math.inf
    assert worst([1e-3, 2.0]) == 2.0
    assert worst([]) is None
