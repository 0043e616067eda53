"""The papers' numbers, and a run laid beside them.

Hydra-RLHF (Santacroce et al., 2023), Table 1 and Figure 2: Llama-7B on StackExchange, 400 + 400 tokens, LoRA rank 128,
ZeRO-1 on 8 GPUs of 80 GB. Its GB are GiB. trlX (Havrilla et al., 2023), Table 3: samples per second and GPU on A100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pandas as pd

from rlhfreports.columns import RUN, axes_of
from rlhfreports.ranks import other_options
from rlhfreports.tables import ABSENT, GIB, ReportTable, number_text

PROMPT_LEN = COMPLETION_LEN = 400
MODELS = ("llama-7b",)
SETTING = "paper"
LORA_RANK = 128
PAPERS_STAGE = 1  # of ZeRO
_BASE = "lora"
_OF_RANKS = ("parallel", "zero_stage", "world_size")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row of Hydra-RLHF's Table 1, per GPU; seconds per sample are absent where the paper has none."""

    method: str
    title: str
    batch_size: int
    model_gib: float
    activation_gib: float
    total_gib: float
    inference_s: float | None = None
    update_s: float | None = None
    total_s: float | None = None


TABLE_1 = (
    Row(method="full", title="PPO", batch_size=1, model_gib=111.8, activation_gib=101.3, total_gib=220.0),
    Row(
        method="lora",
        title="LoRA-PPO",
        batch_size=1,
        model_gib=53.2,
        activation_gib=12.5,
        total_gib=68.0,
        inference_s=17.23,
        update_s=1.52,
        total_s=18.75,
    ),
    Row(
        method="joined-hydra",
        title="J-Hydra-PPO",
        batch_size=4,
        model_gib=14.3,
        activation_gib=51.4,
        total_gib=67.9,
        inference_s=4.63,
        update_s=0.38,
        total_s=5.01,
    ),
    Row(
        method="hydra",
        title="Hydra-PPO",
        batch_size=4,
        model_gib=15.9,
        activation_gib=52.8,
        total_gib=71.1,
        inference_s=4.88,
        update_s=1.59,
        total_s=6.47,
    ),
)
FIGURE_2 = (
    "Figure 2 has seconds per sample against sequence length, both axes logarithmic, at the largest batch that fits: "
    "roughly straight lines, and LoRA-PPO does not fit at 2,048 tokens. Its points at 800 tokens are those of Table 1 "
    "(hollow in the chart)."
)
# trlX, Table 3: samples per second and GPU of PPO: DeepSpeed-Chat, trlX, by the name of the model.
TRLX_TABLE_3: dict[str, tuple[str, str]] = {
    "opt-1.3b": ("2.1", "2.0"),
    "opt-6.7b": ("0.44", "0.41"),
    "opt-30b": ("0.14 (LoRA)", "0.12"),
    "opt-66b": ("0.076 (LoRA)", "0.043 (half of the layers frozen)"),
}


def is_the_papers(frame: pd.DataFrame) -> pd.Series[bool]:
    """True for rows of Llama-7B at the paper's lengths and in its setting."""
    return (
        frame["model"].map(_model_name).isin(MODELS)
        & (frame["setting"] == SETTING).fillna(False)
        & (frame["prompt_len"] == PROMPT_LEN).fillna(False)
        & (frame["completion_len"] == COMPLETION_LEN).fillna(False)
    ).astype(bool)


def papers_row(row: pd.Series[Any], *, is_the_papers: bool) -> Row | None:
    """The row of Table 1 of the same method and batch size, if the case is otherwise the paper's."""
    if not is_the_papers or row["lora_rank"] != LORA_RANK or other_options(row["options"]):
        return None
    same = (r for r in TABLE_1 if (r.method, r.batch_size) == (row["method"], row["batch_size"]))
    return next(same, None)


def paper_cells(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Columns of the paper's numbers for the memory table; empty where no row is the paper's."""
    found = [
        papers_row(row, is_the_papers=is_same)
        for (_, row), is_same in zip(frame.iterrows(), is_the_papers(frame), strict=True)
    ]
    if not any(found):
        return {}
    return {
        "paper total GiB": [f"{row.total_gib:.1f}" if row else "" for row in found],
        # Of a GPU, and not over all ranks as the run's beside them.
        "paper s/sample": [
            (f"{row.total_s:.2f}" if row.total_s and size == 1 else ABSENT) if row else ""
            for row, size in zip(found, frame["world_size"].fillna(1), strict=True)
        ],
    }


def table_1(frame: pd.DataFrame) -> ReportTable:
    """Table 1 beside the run: numbers, and each as a ratio to LoRA-PPO, which can be compared across models.

    Of each method it takes the run's case at the paper's setting, lengths and batch size; without one, the largest
    batch at the longest length at which LoRA-PPO was measured, on one machine and in one setting.
    """
    measured = _at_length(of_a_rank(alike(frame)))
    ours = {row.method: _ours(measured, row) for row in TABLE_1}
    base, paper_base = ours[_BASE], next(row for row in TABLE_1 if row.method == _BASE)
    rows = []
    for row in TABLE_1:
        own = ours[row.method]
        rows.append(
            (
                row.title,
                f"{row.batch_size}",
                ABSENT if own is None else f"{own['seq_len']} tokens, batch {own['batch_size']}",
                f"{row.model_gib:.1f}",
                _gib(own, "persistent_model_bytes"),
                f"{row.activation_gib:.1f}",
                _gib(own, "activation_bytes"),
                f"{row.total_gib:.1f}",
                _gib(own, "total_bytes"),
                f"{row.total_gib / paper_base.total_gib:.2f}",
                _against(own, base, "total_bytes"),
                ABSENT if row.total_s is None else f"{row.total_s:.2f}",
                ABSENT if own is None else _number(own["total_s_per_sample"]),
                ABSENT if row.total_s is None or not paper_base.total_s else f"{row.total_s / paper_base.total_s:.2f}",
                _against(own, base, "total_s_per_sample"),
            )
        )
    pairs = ("model GiB", "activation GiB", "total GiB", "total / LoRA-PPO", "s/sample", "s / LoRA-PPO")
    headings = [
        "method",
        "paper's batch",
        "our case",
        *(f"{name}, {who}" for name in pairs for who in ("paper", "ours")),
    ]
    return ReportTable(
        caption="Hydra-RLHF, Table 1: Llama-7B, 400 + 400 tokens, LoRA rank 128, ZeRO-1 on 8 GPUs of 80 GB; of one GPU",
        cells=pd.DataFrame(rows, columns=headings, dtype="object"),
        num_text_columns=3,
        explanation=" ".join([conditions(measured if len(measured) else frame), *_left_out(frame, measured)]),
        frame=pd.DataFrame(rows, columns=headings),
    )


def _left_out(frame: pd.DataFrame, kept: pd.DataFrame) -> list[str]:
    """A sentence on the methods that no kept row is of, though they were measured."""
    lost = set(frame.loc[_is_measured(frame), "method"]) - set(kept["method"])
    titles = [row.title for row in TABLE_1 if row.method in lost]
    words = "Measured, but not at the length, options and conditions of LoRA-PPO's case"
    return [f"{words}: {', '.join(titles)}."] if titles else []


def _is_measured(frame: pd.DataFrame) -> pd.Series[bool]:
    return ((frame["outcome"] == "ok").fillna(False) & frame["total_bytes"].notna()).astype(bool)


def conditions(frame: pd.DataFrame) -> str:
    """One sentence on how the run's conditions differ from the paper's."""
    papers = frame[is_the_papers(frame)]
    if len(papers):
        worlds = sorted(papers.loc[(papers["zero_stage"] == PAPERS_STAGE).fillna(False), "world_size"].unique())
        divided = f"divided by ZeRO-1 over {', '.join(map(str, worlds))} ranks" if worlds else "not divided by ZeRO"
        return f"The run has cases at the paper's model, lengths and setting; its optimizer is {divided}."
    models = ", ".join(dict.fromkeys(frame["model"].map(_model_name).dropna()))
    lengths = ", ".join(str(length) for length in sorted(frame["seq_len"].dropna().unique()))
    settings = ", ".join(dict.fromkeys(frame["setting"].dropna()))
    return (
        f"The run's conditions are others: model {models}, {lengths} tokens, setting {settings}. Only ratios to "
        "LoRA-PPO can be compared, and those with care."
    )


def trlx_table(frame: pd.DataFrame) -> ReportTable:
    """trlX's Table 3 beside the fastest PPO case that the run has of each of its models."""
    is_ok = (frame["outcome"] == "ok").fillna(False) & frame["total_s_per_sample"].notna()
    rows = []
    for model, (deepspeed_chat, trlx) in TRLX_TABLE_3.items():
        same = frame[is_ok & (frame["family"] == "PPO").fillna(False) & (frame["model"].map(_model_name) == model)]
        same = of_a_rank(same)
        fastest = "not run"
        if len(same):
            row = same.sort_values("total_s_per_sample", kind="stable").iloc[0]
            ranks = f", {row['world_size']} ranks" if row["world_size"] > 1 else ""
            fastest = f"{1 / row['total_s_per_sample']:.3g} ({row['method_title']}, {row['seq_len']} tokens{ranks})"
        rows.append((model, deepspeed_chat, trlx, fastest))
    headings = ["model", "DeepSpeed-Chat", "trlX", "ours"]
    return ReportTable(
        caption="trlX, Table 3: samples per second and GPU of PPO on A100",
        cells=pd.DataFrame(rows, columns=headings, dtype="object"),
        num_text_columns=1,
        explanation="The paper does not give the lengths of these rows.",
        frame=pd.DataFrame(rows, columns=headings),
    )


def zero_table(frame: pd.DataFrame) -> ReportTable:
    """Table 1's way to share, ZeRO-1, at the numbers of ranks that the run has: planned and measured on a rank."""
    order = {row.method: row for row in TABLE_1}
    is_zero = (frame["zero_stage"] == PAPERS_STAGE).fillna(False).astype(bool) & frame["method"].isin(order)
    rows = of_a_rank(frame[is_zero]).sort_values(["world_size", "seq_len", "batch_size"], kind="stable")
    rows = rows.sort_values("method", key=lambda names: names.map(list(order).index), kind="stable")
    sizes = ("predicted_persistent_model_bytes", "persistent_model_bytes", "predicted_total_bytes", "total_bytes")
    found = [
        (
            row["method_title"],
            *(str(row[name]) for name in ("world_size", "seq_len", "batch_size")),
            f"{order[row['method']].model_gib:.1f}",
            *(_gib(row, name) for name in sizes),
            _number(row["total_s_per_sample"]),
        )
        for _, row in rows.iterrows()
    ]
    headings = (
        *("method", "ranks", "tokens", "batch of a rank", "paper model GiB (8 ranks)"),
        *("planned model GiB", "model GiB", "planned total GiB", "total GiB", "s/sample"),
    )
    return ReportTable(
        caption="ZeRO-1, as in Hydra-RLHF's Table 1, at the numbers of ranks that were run",
        cells=pd.DataFrame(found, columns=list(headings), dtype="object"),
        num_text_columns=1,
        explanation="Model: weights, whole gradients and the optimizer states of a rank. Planned: by run --with-plan. "
        "Seconds: of one GPU.",
        frame=pd.DataFrame(found, columns=list(headings)),
    )


def of_a_rank(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame`` with the seconds that one rank takes for a sample of its own, as the papers give them of a GPU.

    A record's seconds are over the samples of all ranks.
    """
    sizes = frame["world_size"].fillna(1)
    names = [
        name
        for name in map(str, frame)
        if name.endswith("_s_per_sample") and pd.api.types.is_numeric_dtype(frame[name])
    ]
    return frame.assign(world_size=sizes, **{name: frame[name] * sizes for name in names})


def _ours(frame: pd.DataFrame, row: Row) -> pd.Series[Any] | None:
    rows = frame[frame["method"] == row.method]
    same = rows[is_the_papers(rows) & (rows["batch_size"] == row.batch_size)] if len(rows) else rows
    if len(same):
        return same.iloc[0]
    rows = rows.sort_values(["seq_len", "batch_size"], kind="stable")
    return rows.iloc[-1] if len(rows) else None


def alike(frame: pd.DataFrame) -> pd.DataFrame:
    """The measured rows that differ from LoRA-PPO's in method, lengths and batch alone.

    Of several such groups the paper's case comes first, then the longest sequences, the paper's setting, ZeRO-1, the
    most ranks, the paper's LoRA rank and options as they are by default. All rows where LoRA-PPO was not measured.
    """
    rows = frame[_is_measured(frame)]
    base = rows[rows["method"] == _BASE]
    if base.empty:
        return rows
    preferred = base.assign(
        _papers=is_the_papers(base),
        _setting=(base["setting"] == SETTING).fillna(False),
        _zero=(base["zero_stage"] == PAPERS_STAGE).fillna(False),
        _ranks=base["world_size"].fillna(1),
        _lora=(base["lora_rank"] == LORA_RANK).fillna(False),
        _usual=base["options"].map(other_options) == "",
    ).sort_values(["_papers", "seq_len", "_setting", "_zero", "_ranks", "_lora", "_usual"], kind="stable")
    first = preferred.iloc[-1]
    same = pd.Series(True, rows.index)
    for name in (*(axis for axis in axes_of(rows) if axis != RUN), *_OF_RANKS):
        same &= rows[name].isna() if pd.isna(first[name]) else (rows[name] == first[name]).fillna(False)
    return rows[same.astype(bool)]


def _at_length(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows at the length of the paper's case of LoRA-PPO, else at its longest."""
    base = rows[rows["method"] == _BASE]
    papers = base[is_the_papers(base)]
    return rows if base.empty else rows[rows["seq_len"] == (papers if len(papers) else base)["seq_len"].max()]


def _model_name(model: object) -> str | None:
    return None if pd.isna(model) else str(model).rstrip("/").rpartition("/")[2].lower()  # type: ignore[call-overload]


def _gib(row: pd.Series[Any] | None, column: str) -> str:
    return ABSENT if row is None or pd.isna(row[column]) else number_text(float(row[column]) / GIB, 3)


def _number(value: object) -> str:
    return ABSENT if pd.isna(value) else f"{float(str(value)):.3g}"  # type: ignore[call-overload]


def _against(row: pd.Series[Any] | None, base: pd.Series[Any] | None, column: str) -> str:
    if row is None or base is None or pd.isna(row[column]) or pd.isna(base[column]) or not base[column]:
        return ABSENT
    return f"{float(row[column]) / float(base[column]):.2f}"


TABLES: tuple[Callable[[pd.DataFrame], ReportTable], ...] = (table_1, zero_table, trlx_table)
