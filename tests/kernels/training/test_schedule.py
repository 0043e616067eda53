import pytest

from rlhfkernels.training.schedule import cosine_factor


def test_the_schedule_warms_up_and_ends_at_0() -> None:
    assert [cosine_factor(step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine_factor(4, 4, 100) == 1.0
    assert cosine_factor(52, 4, 100) == pytest.approx(0.5)
    assert cosine_factor(100, 4, 100) == pytest.approx(0.0, abs=1e-12)
    assert cosine_factor(500, 4, 100) == pytest.approx(0.0, abs=1e-12)
