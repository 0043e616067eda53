import pytest

from rlhfbench.cases.sizes import parse_size
from rlhfbench.errors import SweepError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * 2**30),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("2k", 2000),
        ("123", 123),
        ("7B", 7),
        ("1tib", 2**40),
    ],
)
def test_sizes(text, expected):
    assert parse_size("--memory-limit", text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "4 Gib ibs", "4XB", "nan"])
def test_invalid_sizes(text):
    with pytest.raises(SweepError, match="must be a size like 4GiB"):
        parse_size("--memory-limit", text)
