"""The frames of cases over several ranks: scaling against the world size, strategies at one world size, each rank.

The frame of records has the columns of ``rlhfreports.columns``, and of ranks ``world_size``, ``parallel``,
``zero_stage``, ``global_batch_size``, ``worst_rank``, ``waiting_share``, ``imbalance``, ``communication_bytes`` and
``communication_calls``. Its memory is that of the worst rank, its seconds those of the slowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from rlhfreports.columns import CONDITIONS, HOST, is_measured, parts_of
from rlhfreports.frames import line_of, size_of
from rlhfreports.ratios import Ratio, percent, ratio, rounded
from rlhfreports.tables import ABSENT, GIB, outcome_word

KINDS = {"weak": "batch_size", "strong": "global_batch_size"}  # by the batch size that is the same at every point
MEMORY, TIME = "GiB by part", "seconds"  # what bars are made of
AT_WORK, WAITING = "at work", "waiting"
# In the order in which they divide more; a strategy has the same marker in every run.
STRATEGIES = (
    *("DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP"),
    *("ZeRO-3, gathered by rollout", "FSDP, gathered by rollout"),
)
_NAMES = {"ddp": "DDP", "fsdp": "FSDP", "deepspeed": "ZeRO"}
_BY_ROLLOUT = "parallel.gather=rollout"
_OF_RANKS = ("parallel.strategy=", "parallel.world_size=", "parallel.zero_stage=", _BY_ROLLOUT)
_MAX_RANKS = 64  # of a case in the picture of each rank
_BARS = ["title", "label", "at", "what", "part", "place", "value", "words"]


def has_ranks(frame: pd.DataFrame) -> bool:
    """True if ``frame`` has cases over ranks, of one or more."""
    return "parallel" in frame and bool(frame["parallel"].notna().any())


def strategy_words(parallel: object, zero_stage: object, options: object) -> str:
    """The strategy by which the ranks of a case share a step, in words: ``DDP``, ``FSDP``, ``ZeRO-2``."""
    name = _NAMES.get(str(parallel), str(parallel))
    name = name if pd.isna(zero_stage) else f"{name}-{zero_stage}"  # type: ignore[call-overload]
    by_rollout = _BY_ROLLOUT in str(options).split(", ")
    return f"{name}, gathered by rollout" if by_rollout else name


def strategy_place(name: str) -> int:
    """The place of a strategy among ``STRATEGIES``; that of none of them is the last."""
    return STRATEGIES.index(name) if name in STRATEGIES else len(STRATEGIES)


def ranked(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of cases over ranks, by strategy.

    Returns:
        The rows, with ``title`` (of the method), ``strategy``, ``label`` (the strategy, with the setting and the run
        where these vary), ``line`` (title and label), and ``options`` without those that name ranks.
    """
    rows = frame[frame["parallel"].notna()] if "parallel" in frame else frame.iloc[:0]
    titles = rows["method_title"].astype("object")
    named = zip(*(rows.get(name, ()) for name in ("parallel", "zero_stage", "options")), strict=True)
    strategies = pd.Series([strategy_words(*words) for words in named], rows.index, dtype="object")
    rows = rows.assign(title=titles, strategy=strategies, options=[other_options(text) for text in rows["options"]])
    rest = [line.removeprefix(title) for line, title in zip(line_of(rows), titles, strict=True)]
    rows["label"] = strategies + pd.Series(rest, rows.index, dtype="object")
    rows["line"] = titles + ", " + rows["label"]
    return rows.sort_values("strategy", key=lambda names: names.map(strategy_place), kind="stable")


def other_options(options: object) -> str:
    """The options of a row without those that name its ranks, which every point of a line differs in."""
    words = [] if pd.isna(options) else str(options).split(", ")  # type: ignore[call-overload]
    return ", ".join(word for word in words if not word.startswith(_OF_RANKS))


def scaling_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Every case that makes a line with others: they differ in their ranks alone.

    Args:
        frame: a frame of ``rlhfbench.records_frame``.

    Returns:
        Rows of ``ranked`` with ``scaling`` (one of ``KINDS``: the batch of a rank or the batch over all ranks is the
        same), ``at`` (that, with the size in words), ``speed_up`` (samples per second relative to the smallest world of
        the line) with the ends of its 95 % interval (``speed_up_low``, ``speed_up_high``), and
        ``efficiency`` (the speed-up, per rank).
    """
    rows = ranked(frame)
    found = []
    for points in _lines(rows[is_measured(rows)]):
        first, *others = (row for _, row in points.iterrows())
        ratios = [Ratio(1.0), *(ratio(first, row) for row in others)]
        ends = {f"speed_up_{end}": [getattr(one, end) for one in ratios] for end in ("low", "high")}
        speed_up = np.array([one.value for one in ratios])
        ranks = points["world_size"].to_numpy(dtype=float)
        found.append(points.assign(speed_up=speed_up, **ends, efficiency=speed_up * ranks[0] / ranks))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["at", "line", "scaling"])


def _lines(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The rows of each line of several worlds, with ``scaling`` and ``at``, by world size."""
    for kind, batch in KINDS.items():
        at = f"{kind}: " + size_of(rows.assign(batch_size=rows[batch])) if len(rows) else None
        for _, line in rows.assign(scaling=kind, at=at).groupby(["at", "line"], sort=False):
            points = line.drop_duplicates("world_size", keep="last").sort_values("world_size", kind="stable")
            if len(points) > 1:
                yield points


def planned_cases(frame: pd.DataFrame, plans: pd.DataFrame) -> pd.DataFrame:
    """Planned memory of a rank beside the measured one, for every case over ranks that was planned.

    Args:
        frame: the records. Their own predictions count too.
        plans: plans beside them, as a frame of records; empty for none.

    Returns:
        Rows of ``ranked``, one a case, with ``planned_bytes``, ``measured_bytes`` (of the worst rank; may be absent)
        and ``error_percent`` (of the plan).
    """
    measured = frame["total_bytes"].where((frame["outcome"] == "ok").fillna(False).astype(bool))
    rows = frame.assign(planned_bytes=frame["predicted_total_bytes"], measured_bytes=measured)
    if len(plans):
        nothing = pd.array([pd.NA] * len(plans), dtype="Int64")
        rows = pd.concat([rows, plans.assign(planned_bytes=plans["total_bytes"], measured_bytes=nothing)])
    # Memory hardly depends on a machine and its threads, and a plan has neither; nor does it on the seed.
    rows = ranked(rows.drop(columns=[HOST, CONDITIONS, "seed"], errors="ignore").reset_index(drop=True))
    if rows.empty:
        return rows.assign(error_percent=None)
    found = rows.assign(at=at_world(rows))
    both = found.groupby(["line", "at"], sort=False)[["planned_bytes", "measured_bytes"]].transform("first")
    found = found.assign(planned_bytes=both["planned_bytes"], measured_bytes=both["measured_bytes"])
    found = found[found["planned_bytes"].notna()].drop_duplicates(["line", "at"], ignore_index=True)
    return found.assign(error_percent=100 * (found["planned_bytes"] / found["measured_bytes"] - 1))


def planned_lines(cases: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``planned_cases`` that make lines over several worlds, with ``scaling`` and ``at``."""
    found = list(_lines(cases))
    return pd.concat(found, ignore_index=True) if found else cases.iloc[:0]


def at_world(rows: pd.DataFrame) -> pd.Series[str]:
    """The words that cases beside each other share: their number of ranks, length, batch of a rank, other axes."""
    ranks = ["1 rank, " if size == 1 else f"{size} ranks, " for size in rows["world_size"]]
    return pd.Series(ranks, rows.index, dtype="object") + size_of(rows)


def strategy_bars(frame: pd.DataFrame) -> pd.DataFrame:
    """Memory by part and time of every measured case over ranks, as pieces of bars.

    Returns:
        ``title``, ``label``, ``at`` (``at_world``), ``what`` (``MEMORY`` of the worst rank or ``TIME`` per sample of
        the slowest), ``part`` (of memory; ``AT_WORK`` or ``WAITING`` of time), its ``place``, ``value`` and ``words``
        (of the whole bar).
    """
    every = ranked(frame)
    rows = every[is_measured(every)]
    if rows.empty:
        return pd.DataFrame(columns=_BARS)
    # In the words of all cases, as those that failed stand in the same chart.
    shared = rows[["title", "label"]].assign(at=at_world(every).reindex(rows.index))
    seconds, share = (rows[name].astype("float64") for name in ("total_s_per_sample", "waiting_share"))
    texts = [rounded(s, w) for s, w in zip(seconds, rows["total_half_width_s_per_sample"], strict=True)]
    return _bars(
        shared,
        rows,
        parts_of(frame),
        {AT_WORK: seconds * (1 - share.fillna(0)), WAITING: seconds * share.fillna(0)},
        {
            MEMORY: [f"{_gib(b)}, {s} s" for b, s in zip(rows["total_bytes"], texts, strict=True)],
            TIME: [_waiting(s, w) for s, w in zip(texts, share, strict=True)],
        },
    )


def rank_bars(frame: pd.DataFrame, ranks: pd.DataFrame) -> pd.DataFrame:
    """Memory by part and time of every rank of the largest case of each method and strategy, as pieces of bars.

    Args:
        frame: the records.
        ranks: one row per rank of a case: ``case_id``, ``rank``, ``host``, ``device``, ``total_bytes``,
            ``{part}_part_bytes``, ``communication_step_s`` and ``waiting_s``.

    Returns:
        The columns of ``strategy_bars``: ``at`` is the case and ``label`` the rank. ``TIME`` is that of the step in
        which collectives were counted, which is slower than the timed ones.
    """
    rows = ranked(frame)
    rows = rows[is_measured(rows) & rows["case_id"].isin(ranks["case_id"] if len(ranks) else [])]
    if rows.empty:
        return pd.DataFrame(columns=_BARS)
    rows = rows.assign(at=rows["line"] + ", " + at_world(rows))
    by_size = rows.sort_values(["world_size", "seq_len", "batch_size"], kind="stable")
    largest = rows.loc[rows.index.isin(by_size.drop_duplicates("line", keep="last").index)].set_index("case_id")
    of_ranks = ranks[ranks["case_id"].isin(largest.index) & (ranks["rank"] < _MAX_RANKS)]
    of_ranks = of_ranks.join(largest[["title", "at"]], on="case_id")
    shared = of_ranks[["title", "at"]].assign(label=_rank_labels(of_ranks))
    seconds, waited = (of_ranks[name].astype("float64") for name in ("communication_step_s", "waiting_s"))
    return _bars(
        shared,
        of_ranks,
        parts_of(of_ranks),
        {AT_WORK: seconds - waited.fillna(0), WAITING: waited.fillna(0)},
        {
            MEMORY: [_gib(total) for total in of_ranks["total_bytes"]],
            TIME: [_waiting(f"{s:.3g}", w / s if s else None) for s, w in zip(seconds, waited, strict=True)],
        },
    )


def _rank_labels(of_ranks: pd.DataFrame) -> list[str]:
    several = of_ranks["host"].nunique() > 1
    pairs = zip(of_ranks["rank"], of_ranks["host"], of_ranks["device"], strict=True)
    return [f"rank {rank}, {device}" + (f" on {host}" if several else "") for rank, host, device in pairs]


def _bars(
    shared: pd.DataFrame,
    rows: pd.DataFrame,
    parts: list[str],
    times: Mapping[str, pd.Series[float]],
    words: Mapping[str, list[str]],
) -> pd.DataFrame:
    """The pieces of the bars of ``rows``; ``words`` are those of a whole bar, by what it is made of."""
    pieces = [(MEMORY, part.replace("_", " "), rows[f"{part}_part_bytes"] / GIB) for part in parts]
    pieces += [(TIME, name, values) for name, values in times.items()]
    found = [
        shared.assign(what=what, part=part, place=place, value=values.astype("float64"), words=words[what])
        for place, (what, part, values) in enumerate(pieces)
    ]
    joined = pd.concat(found, ignore_index=True)
    return joined.loc[joined["value"] > 0, _BARS].reset_index(drop=True)


def _gib(size: float) -> str:
    return ABSENT if pd.isna(size) else f"{size / GIB:#.3g} GiB"


def _waiting(seconds: str, share: float | None) -> str:
    return f"{seconds} s" if share is None or pd.isna(share) else f"{seconds} s, {percent(share)} waiting"


def unmeasured(frame: pd.DataFrame) -> pd.DataFrame:
    """The cases over ranks that were not measured: ``title``, ``label``, ``at``, ``word`` (the outcome), ``error``."""
    rows = ranked(frame)
    at = at_world(rows) if len(rows) else pd.Series(dtype="object")
    rows = rows.assign(at=at)[rows["outcome"] != "ok"]
    return rows.assign(word=rows["outcome"].map(outcome_word))[["title", "label", "at", "word", "error"]]
