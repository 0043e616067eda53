"""The largest batches that ran, beside the planned ones.

The frame has one row per kind of case: ``title`` (of the method), ``setting``, ``lora_rank``, ``options`` (in which
rows differ, without those of ranks) and ``seed`` (each shown where there are several), ``strategy`` (how ranks share a
step) and ``world_size`` (shown where a case has ranks), ``model``, ``seq_len``, ``planned``, ``largest_ok`` and
``smallest_failing`` (may be absent; batches of one rank), ``num_tries``, and ``stopped_because`` (a sentence).
"""

from __future__ import annotations

import pandas as pd

from rlhfreports.layouts import Column
from rlhfreports.tables import text
from rlhfreports.terminal import TerminalTable, terminal

_COLUMNS = {
    "title": "method",
    "setting": "setting",
    "lora_rank": "LoRA rank",
    "options": "options",
    "seed": "seed",
    "strategy": "ranks share by",
    "world_size": "ranks",
    "model": "model",
    "seq_len": "length",
    "planned": "planned\nbatch",
    "largest_ok": "largest\nthat ran",
    "smallest_failing": "smallest\nwithout memory",
    "num_tries": "tries",
    "stopped_because": "stopped because",
}
_WORDS = ("title", "setting", "lora_rank", "options", "seed", "strategy", "model", "stopped_because")
_WHERE_SEVERAL = ("setting", "lora_rank", "options", "seed")


def max_batch_table(frame: pd.DataFrame) -> TerminalTable:
    """Returns ``frame`` as a table for the terminal."""
    hidden = {name for name in _WHERE_SEVERAL if frame[name].nunique() < 2}
    hidden |= set() if frame["strategy"].any() else {"strategy", "world_size"}
    shown = [column for column in _COLUMNS if column not in hidden]
    return terminal(
        "The largest batch",
        [
            Column(
                heading=_COLUMNS[column],
                cells=[text(value) for value in frame[column]],
                is_word=column in _WORDS,
                may_head=column == "model",
            )
            for column in shown
        ],
    )
