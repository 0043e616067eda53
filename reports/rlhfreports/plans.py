"""Plans as a table and as stacked bars.

Their frame has one row per case: ``title`` (of the method), ``model``, ``setting``, ``lora_rank``, ``options`` (in
which rows differ, without those of ranks), ``strategy`` (how ranks share a step, empty for one process),
``world_size``, ``seq_len``, ``batch_size``, ``{part}_part_bytes`` for every part, ``total_bytes`` (their sum),
``peak_phase``, ``fits``, ``max_batch_size`` and ``floor_s_per_sample`` (the last three may be absent). What stands
between title and length is shown where there are several.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhfreports.columns import parts_of
from rlhfreports.layouts import Column
from rlhfreports.styles import COLORS, STYLE, write_figure
from rlhfreports.tables import ABSENT, GIB
from rlhfreports.terminal import TerminalTable, terminal

_CAPTION_CHARS = 90  # per line of a picture's caption
_MAX_BARS = 100  # of a picture: 44 inches; matplotlib refuses 2^16 pixels
# Of the parts in the order of their columns; frozen weights are grey.
PART_COLORS = {
    "base": "#7A7A7A",
    "adapters": COLORS[4],
    "heads": "#B0B0B0",
    "gradients": COLORS[2],
    "optimizer": COLORS[3],
    "kv_cache": COLORS[6],
    "activations": COLORS[1],
    "rollout": COLORS[7],
    "gathered": "#8C6D31",
    "buckets": "#C7A76C",
    "temporary": COLORS[5],
}


def part_colors(parts: Sequence[str]) -> list[str]:
    """A colour for each of ``parts``."""
    return [PART_COLORS.get(part, COLORS[0]) for part in parts]


# What tells cases of one method and size apart: the heading of each column.
_APART = {
    "model": "model",
    "setting": "setting",
    "lora_rank": "LoRA rank",
    "options": "options",
    "strategy": "ranks share by",
    "world_size": "ranks",
}


def _apart(frame: pd.DataFrame) -> list[str]:
    """The columns of ``_APART`` that have several values."""
    return [name for name in _APART if frame[name].nunique() > 1]


def _word_of(name: str, value: object) -> str:
    """The word of a value in a label; empty for one process and for the defaults of options."""
    if name == "world_size":
        return "" if value == 1 else f"{value} ranks"
    return f"LoRA rank {value}" if name == "lora_rank" else str(value)


def plan_table(frame: pd.DataFrame, *, caption: str, max_batch_limit: int | None = None) -> TerminalTable:
    """Table of what fits, the largest batch that fits, the floor, the phase of the peak and every part in GiB.

    Args:
        frame: the plans.
        caption: what they share.
        max_batch_limit: where the search for the largest batch ended: more may fit, and a plus says so.
    """
    rows = frame.to_dict("records")
    known = {
        "total GiB": [_gib(int(row["total_bytes"])) for row in rows],
        "fits": [_word(row["fits"]) for row in rows],
        "max batch": [_word(row["max_batch_size"]) + "+" * (row["max_batch_size"] == max_batch_limit) for row in rows],
        "floor s/sample": [_seconds(row["floor_s_per_sample"]) for row in rows],
        "peak in": [str(row["peak_phase"]) for row in rows],
    }
    sizes = {f"{_label(part)} GiB": [_gib(int(row[f"{part}_part_bytes"])) for row in rows] for part in parts_of(frame)}
    apart = {_APART[name]: name for name in _apart(frame)}
    names = {"method": "title", **apart, "length": "seq_len", "batch": "batch_size"}
    return terminal(
        caption,
        [
            *(
                Column(
                    heading=heading,
                    cells=[str(row[name]) for row in rows],
                    is_word=True,
                    may_head=heading in ("model", "length", "batch"),
                )
                for heading, name in names.items()
            ),
            *(Column(heading=heading, cells=cells) for heading, cells in known.items()),
            *(Column(heading=heading, cells=cells, group=1) for heading, cells in sizes.items()),
        ],
        files="plan --json",
    )


def plan_figure(frame: pd.DataFrame, *, caption: str, limit_bytes: int | None) -> Figure:
    """One stacked bar per case, by part, and the memory of the device as a line; the first 100 of many cases."""
    apart = _apart(frame)
    if len(frame) > _MAX_BARS:
        caption += f" · the first {_MAX_BARS} of {len(frame):,} cases: plan.json has all"
        frame = frame.head(_MAX_BARS)
    with matplotlib.rc_context(STYLE):
        num_lines = 1 + len(caption) // _CAPTION_CHARS
        figure = Figure(figsize=(8.5, 1.4 + 0.2 * num_lines + 0.42 * len(frame)), layout="constrained")
        axes = figure.add_subplot()
        places = np.arange(len(frame))
        done = np.zeros(len(frame))
        for part, color in zip(parts_of(frame), part_colors(parts_of(frame)), strict=True):
            sizes = frame[f"{part}_part_bytes"].to_numpy(dtype=float) / GIB
            axes.barh(places, sizes, left=done, color=color, label=_label(part), height=0.72)
            done += sizes
        for place, total in zip(places, done, strict=True):
            axes.text(float(total), float(place), f" {total:.3g}", va="center", fontsize=9)
        if limit_bytes is not None:
            axes.axvline(limit_bytes / GIB, color=COLORS[0], linewidth=1.4, linestyle="--")
            axes.text(limit_bytes / GIB, -0.75, f"{limit_text(limit_bytes)} ", ha="right", va="center", fontsize=9)
        labels = [
            ", ".join(
                (
                    r["title"],
                    *(word for name in apart if (word := _word_of(name, r[name]))),
                    f"{r['seq_len']} tokens, batch {r['batch_size']}",
                )
            )
            for r in frame.to_dict("records")
        ]
        axes.set_yticks(places, labels)
        axes.set_ylim(len(frame) - 0.4, -1.1)
        axes.set_xlim(0, max(float(done.max()), (limit_bytes or 0) / GIB) * 1.1)
        axes.set_xlabel("GiB at the step's highest total")
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Predicted memory\n{textwrap.fill(caption, _CAPTION_CHARS)}", fontsize=11)
        figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def limit_text(size: int) -> str:
    """The memory of a device in words: whole GiB from 10 on, three digits below, where half a GiB counts."""
    gib = size / GIB
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib:.3g} GiB"


def draw_plan(frame: pd.DataFrame, path_stem: Path, *, caption: str, limit_bytes: int | None) -> tuple[Path, Path]:
    """Writes ``plan_figure`` as ``path_stem``.png and .svg, and returns both paths."""
    return write_figure(plan_figure(frame, caption=caption, limit_bytes=limit_bytes), path_stem)


def _label(name: str) -> str:
    return name.replace("_", " ")


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB else ("0" if size == 0 else "<0.01")


def _word(value: object) -> str:
    if value is None or value != value:
        return ABSENT
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    return f"{float(str(value)):.0f}"


def _seconds(value: object) -> str:
    return ABSENT if value is None or value != value else f"{float(str(value)):.3g}"
