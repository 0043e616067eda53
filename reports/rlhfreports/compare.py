"""Runs against each other: case by case, the ratio of their times with its interval, and of their memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfreports.columns import CONDITIONS, HOST, RUN, axes_that_vary, is_disturbed, one_machine_note
from rlhfreports.frames import line_of, size_of
from rlhfreports.once import once_per_frame
from rlhfreports.ratios import Ratio, blocks_of, rounded, t_quantile
from rlhfreports.tables import ABSENT, DISTURBED, GIB, ReportTable, counted, outcome_word

_SIZE = ("method", "prompt_len", "completion_len", "batch_size")
EXPLANATION = (
    "Speed-up: seconds of the first run over seconds of the other, above 1 where the other is faster; in parentheses "
    "its 95 % interval, from the blocks of both runs (Welch). Verdict: on the other run, open where the interval "
    "carries no difference. Memory: GiB of the other run over GiB of the first. Runs made at different times also "
    "differ by what changed on the machine between them."
)
HARDWARE = "hardware"  # optional column: the model of the device, in words
ONE, TWO, REFUSED = "one", "two", "two, times not compared"  # machines of a pair of cases
_MIN_FOR_CHANCE = 10  # intervals; of fewer, one that excludes 1 is a sign
_COLUMNS = (
    *("title", "method", "line", "size", "case", "other_run", "first_outcome", "other_outcome", "first_s", "other_s"),
    *("first_half_width_s", "other_half_width_s", "first_disturbed_by", "other_disturbed_by"),
    *("speedup", "low", "high", "first_gib", "other_gib", "memory_ratio", "machines", "first_host", "other_host"),
    *("first_device", "other_device"),
)


def ratio_of_runs(above: Mapping[Any, Any], below: Mapping[Any, Any]) -> Ratio:
    """Returns the ratio of the seconds per sample of one case in two runs.

    Blocks of different runs are no pairs, so its interval is Welch's, of the logarithms of the blocks.
    """
    logs = [[math.log(b) for b in blocks_of(row) if b is not None and b > 0] for row in (above, below)]
    if min(map(len, logs)) < 2:
        return Ratio(float(above["total_s_per_sample"]) / float(below["total_s_per_sample"]))
    value = math.exp(statistics.fmean(logs[0]) - statistics.fmean(logs[1]))
    errors = [statistics.variance(values) / len(values) for values in logs]
    if sum(errors) == 0:
        return Ratio(value, value, value)
    degrees = sum(errors) ** 2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors, logs, strict=True))
    spread = t_quantile(degrees) * math.sqrt(sum(errors))
    return Ratio(value, value * math.exp(-spread), value * math.exp(spread))


@once_per_frame
def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """The cases that the first run of ``frame`` shares with each other one.

    A case is the same where method, lengths and batch size are, and every axis and option that varies within a run. So
    runs on two devices are compared. Times of two machines are compared where the machines are of two kinds, which is
    then the question; between two of one kind a ratio would look like that of the code.

    Args:
        frame: records of several runs, with a column ``run``, and ``hardware`` where it is known.

    Returns:
        ``title``, ``method``, ``line``, ``size`` and ``case`` in words, ``other_run``, the outcome, host, device,
        seconds per sample with half of their interval and what disturbed them, and GiB of both (``first_…``,
        ``other_…``), ``speedup`` with ``low`` and ``high``, ``memory_ratio``, and ``machines`` (``ONE``, ``TWO`` or
        ``REFUSED``).
    """
    runs = list(dict.fromkeys(frame[RUN]))
    of_runs = [RUN, HOST, CONDITIONS]
    keys = [*_SIZE, *(axis for axis in axes_that_vary(frame) if axis not in of_runs)]
    words = frame.drop(columns=of_runs, errors="ignore")
    placed = frame.assign(_line=line_of(words), _size=size_of(words) if len(frame) else [])
    placed["_disturbed_by"] = frame["disturbed_by"].where(is_disturbed(frame))
    placed["options"] = _varying_options(frame)
    # Within a run a case stands once; a seed that varies is one of the keys.
    by_run = {run: rows.drop_duplicates(keys, keep="last") for run, rows in placed.groupby(RUN, sort=False)}
    first = {tuple(map(str, key)): row for key, row in _by_key(by_run.get(runs[0]), keys)} if runs else {}
    found = []
    for run in runs[1:]:
        for key, row in _by_key(by_run[run], keys):
            base = first.get(tuple(map(str, key)))
            if base is not None:
                found.append(_compared(base, row, run))
    return pd.DataFrame(found, columns=list(_COLUMNS))


def _varying_options(frame: pd.DataFrame) -> list[str]:
    """The options of each row without those that every run has with one value in all of its cases, or in none."""
    rows = [set(str(text).split(", ")) - {""} for text in frame["options"].fillna("")]
    by_run: dict[str, list[set[str]]] = {}
    for run, words in zip(frame[RUN], rows, strict=True):
        by_run.setdefault(str(run), []).append(words)
    varying = {
        _option_name(word) for each in by_run.values() for word in each[0].union(*each) - each[0].intersection(*each)
    }
    return [", ".join(sorted(word for word in words if _option_name(word) in varying)) for words in rows]


def _option_name(word: str) -> str:
    return word.partition("=")[0]


def _by_key(rows: pd.DataFrame | None, keys: Sequence[str]) -> list[tuple[tuple[Any, ...], dict[Any, Any]]]:
    return [] if rows is None else [(tuple(row[key] for key in keys), row) for row in rows.to_dict("records")]


def _compared(base: Mapping[Any, Any], row: Mapping[Any, Any], run: str) -> dict[str, Any]:
    both = [base, row]
    timed = all(r["outcome"] == "ok" and not pd.isna(r["total_s_per_sample"]) for r in both)
    timed = timed and all(r["total_s_per_sample"] > 0 for r in both)
    machines = _machines(base, row)
    line, size = (_in_both(str(base[name]), str(row[name])) for name in ("_line", "_size"))
    ratio = ratio_of_runs(base, row) if timed and machines != REFUSED else None
    sizes = [None if pd.isna(r["total_bytes"]) else int(r["total_bytes"]) / GIB for r in both]
    seconds = [None if pd.isna(r["total_s_per_sample"]) else float(r["total_s_per_sample"]) for r in both]
    return {
        "title": row["method_title"],
        "method": row["method"],
        "line": line,
        "size": size,
        "case": f"{line}, {size}",
        "other_run": run,
        "first_outcome": base["outcome"],
        "other_outcome": row["outcome"],
        "first_s": seconds[0],
        "other_s": seconds[1],
        "first_half_width_s": base["total_half_width_s_per_sample"],
        "other_half_width_s": row["total_half_width_s_per_sample"],
        "first_disturbed_by": base["_disturbed_by"],
        "other_disturbed_by": row["_disturbed_by"],
        "speedup": ratio.value if ratio else None,
        "low": ratio.low if ratio else None,
        "high": ratio.high if ratio else None,
        "first_gib": sizes[0],
        "other_gib": sizes[1],
        "memory_ratio": sizes[1] / sizes[0] if sizes[0] and sizes[1] is not None else None,
        "machines": machines,
        "first_host": base.get(HOST),
        "other_host": row.get(HOST),
        "first_device": base["device"],
        "other_device": row["device"],
    }


def _in_both(first: str, other: str) -> str:
    """The words of a case in two runs: those that both have, then those of each, as in ``64 tokens, cpu → cuda``."""
    if first == other:
        return first
    words = [text.split(", ") for text in (first, other)]
    shared = [word for word in words[0] if word in words[1]]
    own = [", ".join(word for word in each if word not in shared) or ABSENT for each in words]
    return ", ".join([*shared, " → ".join(own)])


def _machines(base: Mapping[Any, Any], row: Mapping[Any, Any]) -> str:
    """The machines of a pair of cases, and whether their times compare; ``ONE`` where that is not recorded.

    The CPU and the GPU of one host are two.
    """
    hosts = {host for r in (base, row) if not pd.isna(host := r.get(HOST))}
    devices = {str(device).partition(":")[0] for r in (base, row) if not pd.isna(device := r["device"])}
    if len(hosts) < 2:
        return TWO if len(devices) > 1 else ONE
    kinds = {kind for r in (base, row) if not pd.isna(kind := r.get(HARDWARE))}
    return TWO if len(devices) > 1 or len(kinds) > 1 else REFUSED


def comparison_table(found: pd.DataFrame) -> ReportTable:
    """``compared`` as a table."""
    rows = [
        (
            row["line"],
            row["size"],
            row["other_run"],
            _verdict(row),
            _cell(row["first_s"], row["first_outcome"], row["first_half_width_s"]) + _mark(row["first_disturbed_by"]),
            _cell(row["other_s"], row["other_outcome"], row["other_half_width_s"]) + _mark(row["other_disturbed_by"]),
            ABSENT if pd.isna(row["speedup"]) else str(_ratio(row)),
            _cell(row["first_gib"], row["first_outcome"]),
            _cell(row["other_gib"], row["other_outcome"]),
            ABSENT if pd.isna(row["memory_ratio"]) else f"{row['memory_ratio']:.3f}x",
        )
        for row in found.to_dict("records")
    ]
    headings = (
        "method",
        "size",
        "run",
        "verdict",
        "first s",
        "other s",
        "speed-up",
        "first GiB",
        "other GiB",
        "memory",
    )
    cells = pd.DataFrame(rows, columns=list(headings), dtype="object")
    several = bool((found["machines"] != ONE).any())
    if several:
        cells.insert(3, "machines", found["machines"].to_numpy())
    return ReportTable(
        caption="Cases that both runs have, the first run against each other one",
        cells=cells,
        num_text_columns=4 + several,
        explanation=EXPLANATION,
        frame=found,
    )


def _verdict(row: Mapping[Any, Any]) -> str:
    """``faster`` or ``slower``, of the other run, where the interval carries it; ``open`` where it does not."""
    if pd.isna(row["low"]):
        return ABSENT
    return "faster" if row["low"] > 1 else "slower" if row["high"] < 1 else "open"


def comparison_sentences(frame: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """One sentence for each run after the first: in how many cases it is faster or slower beyond the intervals."""
    runs = list(dict.fromkeys(frame[RUN]))
    note = one_machine_note(frame)
    sentences = [note] if note else []
    for run in runs[1:]:
        rows = found[found["other_run"] == run]
        timed = rows[rows["speedup"].notna()]
        about_machines = _machine_sentences(run, runs[0], rows)
        sentences += about_machines
        about_rest = [*_failure_sentences(run, runs[0], rows), *_memory_sentence(run, runs[0], rows)]
        if timed.empty:
            sentences += [] if about_machines else [f"{run} and {runs[0]} have no timed case in common."]
            sentences += about_rest
            continue
        low, high = timed["low"].astype("float64"), timed["high"].astype("float64")
        faster, slower, unknown = int((low > 1).sum()), int((high < 1).sum()), int(low.isna().sum())
        mean = math.exp(statistics.fmean(math.log(value) for value in timed["speedup"]))
        counts = [
            f"{run} is faster than {runs[0]} in {faster}, slower in {slower}",
            f"in {len(timed) - faster - slower - unknown} the interval carries no difference",
            *([f"{unknown} had one block and so no interval"] if unknown else []),
        ]
        sentences.append(
            f"Of {counted(len(timed), 'case')} that both have, {'; '.join(counts)}. Speed-ups are from "
            f"{timed['speedup'].min():.2f}x to {timed['speedup'].max():.2f}x, their geometric mean {mean:.2f}x."
        )
        sentences += _chance_sentence(faster + slower, len(timed) - unknown)
        sentences += _disturbed_sentences(run, runs[0], timed)
        sentences += about_rest
    return sentences


def _chance_sentence(num_apart: int, num_intervals: int) -> list[str]:
    """Why few intervals beside 1, of many, are no sign of a difference."""
    if num_intervals < _MIN_FOR_CHANCE or not num_apart:
        return []
    from scipy.special import bdtr

    most = next(k for k in range(num_intervals + 1) if bdtr(k, num_intervals, 0.05) >= 0.95)  # of 19 such runs in 20
    if num_apart > most:
        return []
    return [f"Chance alone puts up to {most} of {num_intervals} intervals beside 1 where nothing differs."]


def _disturbed_sentences(run: str, first: str, timed: pd.DataFrame) -> list[str]:
    """One sentence for each of two runs whose compared seconds come from disturbed blocks."""
    sentences = []
    for side, name in (("first", first), ("other", run)):
        found = timed[f"{side}_disturbed_by"].dropna()
        if len(found):
            were = "was" if len(found) == 1 else "were"
            sentences.append(
                f"{DISTURBED}: {len(found)} of these cases {were} timed in {name} while something else used the "
                f"machine, so a difference may come from it: {found.iloc[0]}."
            )
    return sentences


def _mark(disturbed_by: object) -> str:
    return "" if pd.isna(disturbed_by) else DISTURBED  # type: ignore[call-overload]


def _machine_sentences(run: str, first: str, rows: pd.DataFrame) -> list[str]:
    """Why times of two machines are not compared, and what a ratio of them is of."""
    reasons = {
        REFUSED: "which are not known to differ in kind. Their times are not compared, as a difference could be "
        "either's. Are both names of one machine? Then --same-machine compares them",
        TWO: "so their speed-ups are of the {}, with all else that differs between the runs",
    }
    sentences = []
    for machines, why in reasons.items():
        pairs = rows[rows["machines"] == machines]
        if len(pairs):
            what, places = "machines", [_distinct(pairs[f"{side}_host"]) for side in ("first", "other")]
            if not all(places) or places[0] == places[1]:
                what, places = "devices", [_distinct(pairs[f"{side}_device"]) for side in ("first", "other")]
            ran = f"{counted(len(pairs), 'case')} ran on {places[0]} in {first} and on {places[1]} in {run}"
            sentences.append(f"{ran}, two {what}, {why.format(what)}.")
    return sentences


def _distinct(names: pd.Series[Any]) -> str:
    """The different ones of ``names``, empty where none is recorded."""
    return ", ".join(dict.fromkeys(map(str, names.dropna())))


def _failure_sentences(run: str, first: str, rows: pd.DataFrame) -> list[str]:
    """One sentence for each of two runs on the cases that only the other one measured."""
    sentences = []
    for side, name, other_side, other in (("first", first, "other", run), ("other", run, "first", first)):
        lost = rows[(rows[f"{side}_outcome"] != "ok") & (rows[f"{other_side}_outcome"] == "ok")]
        if len(lost):
            outcomes = ", ".join(dict.fromkeys(map(outcome_word, lost[f"{side}_outcome"])))
            were = "was" if len(lost) == 1 else "were"
            sentences.append(f"{counted(len(lost), 'case')} {were} measured in {other} and not in {name}: {outcomes}.")
    return sentences


def _memory_sentence(run: str, first: str, rows: pd.DataFrame) -> list[str]:
    ratios = rows["memory_ratio"].dropna()
    if ratios.empty:
        return []
    if ratios.sub(1).abs().max() < 0.0005:
        return [f"{run} needs the same memory as {first}."]
    return [f"{run} needs {ratios.min():.3f} to {ratios.max():.3f} times the memory of {first}."]


def _ratio(row: Mapping[Any, Any]) -> Ratio:
    ends = [None if pd.isna(row[end]) else float(row[end]) for end in ("low", "high")]
    return Ratio(float(row["speedup"]), *ends)


def _cell(value: float | None, outcome: str, half_width: object = None) -> str:
    if outcome != "ok":
        return outcome_word(outcome)
    return ABSENT if value is None or pd.isna(value) else rounded(value, half_width)
