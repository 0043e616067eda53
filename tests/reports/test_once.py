from __future__ import annotations

import gc

import pandas as pd

from rlhfreports.once import once_per_frame


def test_a_result_is_computed_once_for_each_frame_and_argument() -> None:
    asked: list[tuple[int, str]] = []

    @once_per_frame
    def described(frame: pd.DataFrame, word: str = "lora") -> str:
        asked.append((len(frame), word))
        return f"{len(frame)} {word}"

    short, long = pd.DataFrame({"x": [1]}), pd.DataFrame({"x": [1, 2]})
    assert [described(short), described(short), described(long), described(short, word="full")] == [
        "1 lora",
        "1 lora",
        "2 lora",
        "1 full",
    ]
    assert asked == [(1, "lora"), (2, "lora"), (1, "full")]


def test_a_frame_that_is_gone_leaves_nothing_for_the_next_one_at_its_address() -> None:
    @once_per_frame
    def size_of(frame: pd.DataFrame) -> int:
        return len(frame)

    for length in range(1, 50):  # CPython gives freed addresses out again
        assert size_of(pd.DataFrame({"x": [0] * length})) == length
        gc.collect()
