from __future__ import annotations

import pytest

from rlhfbench.records.checks import fits


@pytest.mark.parametrize("dtype", ["Int64", "Float64"])
def test_a_truth_value_is_no_number(dtype: str) -> None:
    assert fits(1, dtype)
    assert not fits(True, dtype)
    assert not fits([True], "list")
