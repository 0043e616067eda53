from __future__ import annotations

from typing import Any

import pytest

from rlhfbench.evidence.report import _reserve
from rlhfbench.evidence.request import GIB
from rlhfbench.evidence.reserve import Reserve, fit_reserve


def record(planned: float, reserved: float, driver: float | None) -> dict[str, Any]:
    """A record with these GiB, and a workspace of 1/16 GiB."""
    driver_bytes = None if driver is None else driver * GIB
    views = {"allocator_reserved_bytes": reserved * GIB, "workspace_bytes": GIB // 16}
    return {"plan": {"total_bytes": planned * GIB}, "memory": {"views": {**views, "driver_peak_bytes": driver_bytes}}}


def test_the_fit_covers_every_record() -> None:
    # The first has the largest context, 0.5 GiB and the workspace; the second the largest share, 1 of 20.
    records = [record(40, 40.0625, 40.5625), record(20, 21.0625, 21.3125), record(30, 90, None)]
    found = fit_reserve(records)
    assert found is not None
    assert found.context_bytes == 0.5625 * GIB
    assert found.fragmentation == pytest.approx(0.05)
    assert found.bytes_of(100 * GIB) == pytest.approx(5.5625 * GIB)


def test_a_plan_above_what_was_reserved_is_no_negative_fragmentation() -> None:
    assert fit_reserve([record(40, 30, 30.5)]) == Reserve(int(0.5625 * GIB), 0.0)
    assert fit_reserve([record(40, 40, None)]) is None


@pytest.mark.parametrize(("driver", "verdict"), [(40.5, "enough"), (50, "too little")])
def test_the_report_says_whether_the_reserve_of_plans_is_enough(driver: float, verdict: str) -> None:
    environment = {"gpus": [{"name": "x", "memory_bytes": 80 * GIB}]}
    text = _reserve([record(40, 40, driver)], environment, "cuda")
    assert f"plans keep 2.35 GiB, which is {verdict}." in text
    assert _reserve([record(40, 40, driver)], {"gpus": None}, "cpu") == ""


def test_the_report_names_what_is_counted_beside_the_tensors() -> None:
    environment = {"gpus": [{"name": "x", "memory_bytes": 80 * GIB}]}
    # 0.5 GiB beyond the allocator, and the workspace of 1/16 GiB that it holds.
    text = _reserve([record(40, 42.0625, 42.5625)], environment, "cuda")
    assert text.startswith(
        "Reserve: the context and library workspaces take at most 0.56 GiB by the driver's count, and the allocator "
        "reserves at most 5.0 % beyond the plan. Of this device that is 4.56 GiB;"
    )
