from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhfkernels.config.case import Case
from rlhfkernels.engine.logprob_chunk import logprob_chunk_size


@pytest.mark.parametrize(
    ("device", "asked", "vocab_size", "expected"),
    [
        ("cpu", None, 32000, 128),
        ("cpu", 7, 32000, 7),
        ("cuda", None, 32000, 1024),
        ("cuda:1", None, 151936, 441),
        ("cuda", None, 2**30, 128),
        ("cuda", 0, 32000, 0),
        ("cuda", 128, 32000, 128),
    ],
)
def test_the_chunk_of_the_head_follows_the_device(
    make_case: Callable[..., Case], device: str, asked: int | None, vocab_size: int, expected: int
) -> None:
    case = make_case(device=device, engine__logprob_chunk_size=asked)
    assert logprob_chunk_size(case, vocab_size) == expected
