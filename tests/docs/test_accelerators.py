"""The accelerators in ``docs/planning.md`` are those of the planner."""

from __future__ import annotations

from pathlib import Path

from rlhfbench.planning.devices import ACCELERATORS

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"


def test_the_page_lists_every_accelerator_with_its_figures() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Accelerators\n")[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")][1:]
    assert table == [
        [f"`{row.name}`", *(f"{value:.4g}" for value in (row.memory_bytes / 2**30, row.bytes_per_s / 1e12, bf16))]
        for row in ACCELERATORS.values()
        if row.bytes_per_s is not None and (bf16 := row.flops_per_s["bfloat16"] / 1e12)
    ]
