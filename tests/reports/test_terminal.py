"""Every table at every width: nothing is cut, no line is too wide, every number is there or named as left out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pandas as pd
import pytest
from rich.console import Console, RenderableType

from rlhfkernels.observer import PARTS
from rlhfreports import gain_table, slope_table
from rlhfreports.layouts import Column
from rlhfreports.max_batch import max_batch_table
from rlhfreports.memory import table as memory_table
from rlhfreports.plans import plan_table
from rlhfreports.terminal import TerminalTable, terminal

GIB = 2**30
WIDTHS = (40, 80, 120, 200)
LONG_MODEL = "/data/checkpoints/2026-11/experiments/meta-llama-Llama-2-70b-hf-sft-merged/final"
TITLES = ("PPO", "LoRA-PPO", "Dynamic-LoRA-PPO", "J-Hydra-PPO", "Hydra-PPO")
METHODS = ("full", "lora", "dynamic-lora", "joined-hydra", "hydra")


def realistic_rows() -> list[dict[str, object]]:
    """Five methods at two settings, two lengths and two batch sizes; one is out of memory."""
    rows = []
    for place, (method, title) in enumerate(zip(METHODS, TITLES, strict=True)):
        for setting in ("modern", "paper"):
            for length in (128, 1024):
                for batch in (1, 16):
                    seconds = 0.1234 * (place + 1) * length / 128 / batch**0.5
                    blocks = [seconds * (1 + 0.001 * i) for i in range(5)]
                    rows.append(
                        {
                            "method": method,
                            "method_title": title,
                            "method_order": place,
                            "setting": setting,
                            "prompt_len": length // 2,
                            "batch_size": batch,
                            "model_bytes": (20 - 3 * place) * GIB + 12_345_678,
                            "activation_bytes": length * batch * 2**20,
                            "process_peak_bytes": 42 * GIB,
                            "rollout_bytes": 4096,
                            "total_s_per_sample": seconds,
                            "inference_s_per_sample": seconds * 0.6,
                            "update_s_per_sample": seconds * 0.4,
                            "generate_phase_s": seconds * batch,
                            "total_half_width_s_per_sample": seconds * 0.01,
                            "total_block_s_per_sample": blocks,
                            "update_block_s_per_sample": [0.4 * value for value in blocks],
                            "generate_phase_block_s": [batch * value for value in blocks],
                            "num_blocks": 5,
                            "num_timed_blocks": 5,
                            "num_disturbed_blocks": 4 if method == "lora" else 0,
                            "num_counted_blocks": 5,
                            "disturbed_by": "process 4242 (make) took 97 % of a core" if method == "lora" else None,
                        }
                    )
    rows[3] |= {
        "outcome": "oom",
        "total_half_width_s_per_sample": None,
        "error": "tried to allocate 12.50 GiB.",
        "error_phase": "generate",
    }
    return rows


def plan_frame() -> pd.DataFrame:
    parts = {f"{part}_part_bytes": int((i + 1) * 1.37 * GIB) for i, part in enumerate(PARTS)}
    return pd.DataFrame(
        [
            {
                "title": title,
                "model": "llama-7b",
                "setting": setting,
                "lora_rank": 16,
                "options": "",
                "strategy": "",
                "world_size": 1,
                "seq_len": length,
                "batch_size": 16,
                **parts,
                **dict.fromkeys(("kv_cache_part_bytes", "gathered_part_bytes", "buckets_part_bytes"), 0),
                "total_bytes": 123 * GIB,
                "peak_phase": "update_actor_critic",
                "fits": setting == "modern",
                "max_batch_size": 7.0,
                "floor_s_per_sample": 0.01234,
            }
            for title in TITLES
            for setting in ("modern", "paper")
            for length in (128, 4096)
        ]
    )


def max_batch_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "title": TITLES[:3],
            "setting": ["modern", "paper", "modern"],
            "lora_rank": [16, 128, 16],
            "options": ["", "engine.gradient_checkpointing=True", ""],
            "seed": 0,
            "strategy": ["", "ZeRO-3", "fsdp"],
            "world_size": [1, 16, 2],
            "model": LONG_MODEL,
            "seq_len": [128, 1024, 4096],
            "planned": pd.array([512, 31, None], dtype="Int64"),
            "largest_ok": pd.array([500, 30, 0], dtype="Int64"),
            "smallest_failing": pd.array([None, 31, 1], dtype="Int64"),
            "num_tries": [5, 11, 1],
            "stopped_because": ["batch 512 is the limit.", "batch 31 was out of memory.", "batch 1 took over 600 s."],
        }
    )


def verify_table() -> RenderableType:
    from rlhfbench.cli.verify import table
    from rlhfkernels.engine.verify import Check

    return table(
        [
            Check(name="fast trunk: left-padded rows: adapter gradient", outcome="ok", error=1.2e-6, tolerance=3e-4),
            Check(name="plain: cached decoding", outcome="refused", note="no"),
        ]
    )


TABLES: dict[str, Callable[[Callable[..., pd.DataFrame]], RenderableType]] = {
    "memory": lambda make: memory_table(make(*realistic_rows())).rich(),
    "memory of two models": lambda make: memory_table(
        make(*({**row, "model": model} for model in (LONG_MODEL, "tiny") for row in realistic_rows()))
    ).rich(),
    "memory with a long caption": lambda make: memory_table(
        make(*({**row, "options": "ppo.kl_coef=0.5"} for row in realistic_rows()))
    ).rich(),
    "slopes": lambda make: slope_table(make(*realistic_rows())).rich(),
    "gain": lambda make: gain_table(make(*realistic_rows())).rich(),
    "plan": lambda make: plan_table(plan_frame(), caption="llama-7b · float32 · H100, 80 GiB · ZeRO-3, one rank of 2"),
    "max batch": lambda make: max_batch_table(max_batch_frame()),
    "verify": lambda make: verify_table(),
}


def printed(table: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    console.print(table)
    return console.export_text()


def joined(text: str) -> str:
    """The text without blanks and line ends, as wrapped words are found in it."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_whole_at_any_width(make_frame, name, width):
    table = TABLES[name](make_frame)
    assert isinstance(table, TerminalTable)
    text = printed(table, width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    found = re.search(r"Left out for width:(.*?)\.\s", text + " ", re.DOTALL)
    left_out = joined(found[1]) if found else ""
    words = text.split()
    for column in table.columns:
        if not column.is_word and joined(column.name) in left_out:
            assert column.is_empty
            continue
        missing = [cell for cell in column.cells if not column.is_word and not set(cell.split()) <= set(words)]
        assert not missing, column.name


@pytest.mark.parametrize("name", TABLES)
def test_a_narrow_terminal_shows_each_row_as_often_as_a_wide_one(make_frame, name):
    """Each value of a column of numbers that is shown stands in the text at least as often as in the table."""
    table = TABLES[name](make_frame)
    columns = [c for c in table.columns if not c.is_word and not c.is_empty]
    for width in WIDTHS:
        words = printed(table, width).split()
        for column in columns:
            for cell in set(column.cells) - {""}:
                assert words.count(cell.split()[0]) >= list(column.cells).count(cell), (width, column.name, cell)


def test_the_memory_table_has_every_informative_number_on_one_line_at_80_columns(make_frame):
    text = printed(memory_table(make_frame(*realistic_rows())).rich(), 80)
    assert "batch 1, length 128" in text
    first = next(line.split() for line in text.splitlines() if line.startswith("Hydra-PPO        modern"))
    assert first == [
        "Hydra-PPO",
        "modern",
        "8.01",
        "0.12",
        "8.14",
        "42.0",
        "0.3702",
        "0.2468",
        "0.617",
        "0.006",
    ]
    assert "Left out for width: rollout GiB (<0.01 or –). memory_table.md has them." in text.replace("\n", " ")


def test_a_disturbed_case_keeps_its_mark_and_an_unmeasured_one_its_outcome(make_frame):
    for width in WIDTHS:
        text = printed(memory_table(make_frame(*realistic_rows())).rich(), width)
        assert "OOM" in text
        assert "0.002!" in text


def test_a_plan_is_divided_at_80_columns(make_frame):
    lines = printed(plan_table(plan_frame(), caption="tiny"), 80).splitlines()
    heads = [line for line in lines if line.startswith("method")]
    assert len(heads) in (2, 3)
    assert heads[0].split()[:2] == ["method", "setting"]
    assert "fits" in heads[0]


def test_forty_columns_give_blocks_of_names_and_values():
    columns = [
        Column(heading="method", cells=["Hydra-PPO"], is_word=True),
        Column(heading="length", cells=["128"], is_word=True),
        *(Column(heading=f"a long\nheading {i}", short=f"h{i}", cells=[f"{i}.123456789"]) for i in range(1, 12)),
    ]
    lines = printed(terminal("caption", columns), 40).splitlines()
    assert lines[:3] == ["caption", "Hydra-PPO, length 128", "  a long heading 1: 1.123456789"]
    assert len(lines) == 2 + 11


def test_a_wide_terminal_has_full_headings_on_one_line(make_frame):
    text = printed(memory_table(make_frame(*realistic_rows())).rich(), 200)
    (head,) = (line for line in text.splitlines() if line.startswith("method"))
    assert "activation GiB" in head
    assert "total s/sample" in head


def test_a_table_without_rows_has_its_headings():
    text = printed(terminal("", [Column(heading="method", cells=[], is_word=True), Column(heading="s", cells=[])]), 40)
    assert text.split()[:2] == ["method", "s"]
    words = [Column(heading=f"a heading {i}", cells=[], is_word=True, may_head=i > 0) for i in range(9)]
    assert "…" not in printed(terminal("", words), 40)


def test_markup_in_cells_is_printed_as_it_is():
    columns = [Column(heading="[b]x", cells=["[red]1"], is_word=True), Column(heading="y", cells=["[/]"])]
    for width in (6, 40):
        text = joined(printed(terminal("[i]", columns, ["[dim]"]), width))
        assert all(word in text for word in ("[i]", "[red]1", "[/]", "[dim]"))
