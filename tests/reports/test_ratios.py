"""Ratios, their intervals, and what a run can tell apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rlhfreports.gain import gain_table
from rlhfreports.memory import table as memory_table
from rlhfreports.ratios import Ratio, control_ratios, interval_decimals, ratio, resolution, rounded


def row(blocks, **other):
    counted = [value for value in blocks if value is not None]
    half_width = stats.t.ppf(0.975, len(counted) - 1) * stats.sem(counted) if len(counted) > 1 else None
    return {
        "total_block_s_per_sample": blocks,
        "total_s_per_sample": float(np.mean(counted)),
        "total_half_width_s_per_sample": half_width,
        "num_blocks": len(blocks),
        "num_timed_blocks": len(blocks),
        "num_counted_blocks": len(counted),
        "num_disturbed_blocks": 0,
        **other,
    }


def test_the_interval_of_a_ratio_pairs_blocks_of_one_round():
    """Drift that hits both alike leaves no width, whatever it does to each."""
    found = ratio(row([2.0, 4.0, 8.0]), row([1.0, 2.0, 4.0]))
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_the_interval_of_a_ratio_is_students_on_logarithms():
    above, below = [2.0, 2.2, None, 1.9], [1.0, 1.0, 5.0, 1.1]
    logs = np.log([2.0 / 1.0, 2.2 / 1.0, 1.9 / 1.1])
    width = stats.t.ppf(0.975, 2) * stats.sem(logs)
    found = ratio(row(above), row(below))
    assert found.value == pytest.approx(math.exp(np.mean(logs)))
    assert (found.low, found.high) == pytest.approx((found.value / math.exp(width), found.value * math.exp(width)))


def test_one_block_gives_no_interval():
    found = ratio(row([3.0]), row([2.0]))
    assert (found, found.half_width, str(found)) == (Ratio(1.5), None, "1.50x")
    assert not found.is_above_one


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Ratio(1.2619, 1.21, 1.31), "1.26x (1.21 to 1.31)"),
        (Ratio(1.2619, 1.11, 1.42), "1.26x (1.11 to 1.42)"),
        (Ratio(1.67, 1.15, 2.42), "1.7x (1.1 to 2.4)"),
        (Ratio(27.46, 20.0, 36.0), "27x (20 to 36)"),
        (Ratio(1.5, 1.03, 2.1), "1.5x (1.03 to 2.1)"),
        (Ratio(1.0, 0.99999, 1.00001), "1.000x (1.000 to 1.000)"),
    ],
)
def test_a_ratio_is_rounded_to_its_interval(found, text):
    assert str(found) == text


@pytest.mark.parametrize(
    ("value", "half_width", "decimals"),
    [
        (1.0, 0.05, 2), (1.0, 0.019, 3), (1.0, 0.02, 2), (9.0, 3.0, 0), (99.0, 15.0, 0), (1.0, 0.0, 3),
        (1.0, math.nan, 3), (0.3, 3.0, 1), (0.0, 3.0, 0),
    ],
)  # fmt: skip
def test_decimals_follow_the_first_digit_of_the_half_width(value, half_width, decimals):
    assert interval_decimals(value, half_width) == decimals


@pytest.mark.parametrize(("half_width", "text"), [(None, "0.123"), (0.04, "0.12"), (0.0003, "0.1235"), (0.0, "0.123")])
def test_a_number_has_the_digits_that_its_interval_carries(half_width, text):
    assert rounded(0.12345, half_width) == text


def pair(blocks, others, **case):
    return [row(blocks, method="lora", **case), row(others, method="dynamic-lora", same_work_as="lora", **case)]


def test_methods_of_the_same_work_are_the_control(make_frame):
    rows = [*pair([1.0, 1.1], [1.0, 1.0]), *pair([1.0, 1.0], [2.0, 2.0], batch_size=2)]
    frame = make_frame(*rows, row([9.0, 9.0], method="hydra"))
    assert [found.value for found in control_ratios(frame)] == pytest.approx([math.sqrt(1.1), 0.5])
    assert resolution(frame).startswith("This run tells apart differences above 100 %: 2 pairs of cases")
    one = make_frame(*pair([1.0, 1.1], [1.0, 1.0]))
    # 1.1^(12.706 / 2) - 1, with Student's 97.5 % quantile of one degree: the interval's width, above the difference.
    assert resolution(one) == (
        "This run tells apart differences above 83 %: a pair of cases that do the same work differs by 4.9 %."
    )


def test_without_a_control_the_intervals_tell(make_frame):
    rows = [row([1.0, 1.0], total_half_width_s_per_sample=width) for width in (0.01, 0.02, 0.5)]
    assert resolution(make_frame(*rows)) == "This run tells apart differences above 2.8 %, by its intervals."


def test_one_block_is_said_to_tell_nothing(make_frame):
    frame = make_frame(row([1.0]))
    assert "not known" in resolution(frame)
    table = memory_table(frame)
    assert "± s" not in table.headings
    assert "not known" in table.notes[0]


def test_the_memory_table_rounds_to_the_interval_and_marks_disturbed_cases(make_frame):
    quiet = row([0.1234, 0.1254, 0.1244], num_disturbed_blocks=2, num_timed_blocks=5, disturbed_by="x used 40 %")
    loud = row([0.1, 0.5], method="lora", num_disturbed_blocks=1, disturbed_by="y took 20 %")
    table = memory_table(make_frame(loud, quiet))
    cells = table.cells.set_index("method")
    assert cells.loc["Hydra-PPO", ["total s/sample", "± s"]].tolist() == ["0.124", "0.002"]
    assert cells.loc["LoRA-PPO", ["total s/sample", "± s"]].tolist() == ["0.3", "2.5!"]
    assert "2 disturbed blocks do not count: x used 40 %." in table.notes
    assert "!: 1 of 2 cases is shown with disturbed blocks, as too few others are left: y took 20 %." in table.notes


def test_a_disturbed_case_of_one_block_is_marked_at_its_seconds(make_frame):
    rows = [row([0.5]), row([0.25], method="lora", num_disturbed_blocks=1, disturbed_by="y took 20 %")]
    table = memory_table(make_frame(*rows))
    cells = table.cells.set_index("method")["total s/sample"]
    assert (cells["Hydra-PPO"].endswith("!"), cells["LoRA-PPO"].endswith("!")) == (False, True)
    assert any(note.startswith("!: 1 of 2 cases is shown with disturbed blocks") for note in table.notes)


def test_missing_blocks_are_counted(make_frame):
    table = memory_table(make_frame(row([1.0, None, 1.1], num_timed_blocks=2)))
    assert "A block is missing: it failed, or the run was ended before it." in table.notes


def test_a_gain_within_its_interval_is_not_shared_out(make_frame):
    """Twice as fast in the mean, and in no block pair for sure: no share may be claimed."""
    sizes = {"model_bytes": 100, "activation_bytes": 0, "rollout_bytes": 0}
    lora = row([1.0, 3.0, 0.5], method="lora", **sizes)
    hydra = [row(blocks, batch_size=size, **sizes) for size, blocks in ((1, [1.0, 1.0, 1.0]), (2, [0.5, 0.6, 1.2]))]
    (found,) = gain_table(make_frame(lora, *hydra)).frame.to_dict("records")
    assert found["whole_gain_low"] < 1 < found["whole_gain"]
    assert found["shared_pass_share"] is None or math.isnan(found["shared_pass_share"])
