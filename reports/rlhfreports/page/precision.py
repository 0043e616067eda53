"""The sections on predictions and on how sure the numbers are."""

from __future__ import annotations

import altair as alt
import pandas as pd

from rlhfreports import frames
from rlhfreports.page.blocks import Block, Chart, Section, Text
from rlhfreports.page.charts import HEIGHT, by_mode, method_scales, select, specification
from rlhfreports.page.data import Page
from rlhfreports.page.tooltips import tooltips
from rlhfreports.predicted import comparisons, has_predictions, worst_sentence
from rlhfreports.ratios import interval_decimals, resolution
from rlhfreports.styles import COLORS
from rlhfreports.tables import counted

_PREDICTED_CAPTION = (
    "Each point is a case: memory that a plan predicted without running, and what the ledger counted. On the dashed "
    "line both are equal."
)
_BLOCKS_CAPTION = (
    "Each point is a block: a case timed once in a process of its own, at the moment when it ran. Its height is how "
    "far its time is from the median of its case. A run without disturbance has no pattern in time; disturbed blocks "
    "are triangles."
)
# Why timing ended, in words.
_STOPPED = {
    "precise": "the interquartile mean was precise enough",
    "steady": "the noise was steady",
    "budget": "the time budget was spent",
}
_OTHERS_CAPTION = "CPU time of the machine that other processes or the hypervisor took beside each block."


def predicted_section(page: Page) -> Section | None:
    """Predicted memory against measured; ``None`` where nothing was planned."""
    if not has_predictions(page.frame):
        return None
    data = frames.predicted(page.frame)
    blocks: list[Block] = [Text(text=worst_sentence(comparisons(page.frame)))]
    failed = page.frame["plan_error"].dropna()
    blocks += (
        [Text(text=f"{counted(len(failed), 'case')} without a prediction: {failed.iloc[0]}", kind="warning")]
        if len(failed)
        else []
    )
    if len(data):
        sizes = [float(value) for name in ("predicted_gib", "measured_gib") for value in data[name]]
        line = pd.DataFrame({"gib": [min(sizes), max(sizes)]})
        colors, shapes = method_scales(page.frame)
        scale = alt.Scale(type="log", nice=False, padding=20)
        base = alt.Chart(alt.NamedData("predicted")).transform_filter("datum.kind === kind")
        dots = base.mark_point(size=70, opacity=1).encode(
            x=alt.X("predicted_gib:Q", title="predicted GiB", scale=scale),
            y=alt.Y("measured_gib:Q", title="measured GiB", scale=scale),
            color=alt.Color("title:N", scale=colors),
            shape=alt.Shape("title:N", scale=shapes),
            tooltip=tooltips("case", "predicted_gib", "measured_gib", "percent", percent="prediction off by, %"),
        )
        diagonal = (
            alt.Chart(alt.NamedData("predicted-line"))
            .mark_line(strokeDash=[4, 3], color=by_mode("#777777", "#999999"))
            .encode(x=alt.X("gib:Q", title="predicted GiB"), y=alt.Y("gib:Q", title="measured GiB"))
        )
        made = alt.layer(diagonal, dots).add_params(select("kind", list(dict.fromkeys(data["kind"])), "memory"))
        blocks.append(
            Chart(
                id="predicted-memory",
                title="Measured memory against predicted",
                caption=_PREDICTED_CAPTION,
                spec=specification(made.properties(height=HEIGHT), description=_PREDICTED_CAPTION),
                data={"predicted": data, "predicted-line": line},
            )
        )
    return Section(id="predicted", title="Predicted against measured", blocks=blocks)


def precision_section(page: Page) -> Section | None:
    """Blocks and interference over the wall time of each run; ``None`` where nothing was timed."""
    blocks: list[Block] = []
    for i, run in enumerate(page.runs):
        if not run.frame["total_s_per_sample"].notna().any():
            continue
        several = len(page.runs) > 1
        blocks.append(Text(text=(f"{run.name}: " if several else "") + resolution(run.frame)))
        blocks += [Text(text=sentence, kind=kind) for sentence, kind in _how_timed(run.frame)]
        data = frames.block_times(run.frame, run.blocks)
        blocks += [Text(text=_drift_sentence(data))] if len(data) else []
        blocks += _charts(data, f"blocks-{i}", f", {run.name}" if several else "")
    return Section(id="sure", title="Precision of the times", blocks=blocks) if blocks else None


def _how_timed(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Sentences on why timing ended and on disturbance, each with the kind of its paragraph."""
    found = []
    reasons = frame["stopped_because"].dropna()
    if len(reasons):
        found_by = reasons.value_counts(sort=False).items()
        counts = [(count, f"because {_STOPPED.get(str(reason), reason)}") for reason, count in found_by]
        why = (
            f" {counts[0][1]}"
            if len(counts) == 1
            else ": " + ", ".join(f"{count} {because}" for count, because in counts)
        )
        found.append((f"Timing of {counted(len(reasons), 'case')} ended{why}.", ""))
    disturbed = frame["num_disturbed_blocks"].fillna(0)
    if (disturbed > 0).any():
        worst = frame["disturbed_by"].iloc[int(disturbed.to_numpy().argmax())]
        found.append((f"{counted(int(disturbed.sum()), 'disturbed block')}: {worst}.", "warning"))
    return found


def _drift_sentence(data: pd.DataFrame) -> str:
    found = frames.drift(data)
    if found is None:
        return "The run has too few blocks to tell a drift from noise."
    percent, half_width = found
    decimals = min(interval_decimals(abs(percent), half_width), 1)
    interval = f"{percent:+.{decimals}f} % ± {half_width:.{decimals}f} from the first block to the last"
    if abs(percent) <= half_width:
        return f"No drift that the blocks can tell from noise: {interval}."
    return f"Drift: blocks became {'slower' if percent > 0 else 'faster'} over the run, {interval}."


def _charts(data: pd.DataFrame, name: str, title: str) -> list[Chart]:
    data = data.assign(state=["quiet" if pd.isna(by) else "disturbed" for by in data["disturbed_by"]])
    if data.empty or data["minutes"].isna().all():
        return []
    x = alt.X("minutes:Q", title="minutes since the first block", axis=alt.Axis(tickCount=10))
    states = alt.Scale(domain=["quiet", "disturbed"], range=[by_mode(COLORS[4], "#3D9BE0"), COLORS[1]])
    shapes = alt.Scale(domain=["quiet", "disturbed"], range=["circle", "triangle-up"])
    base = (
        alt.Chart(alt.NamedData(name))
        .mark_point(filled=True, size=45)
        .encode(
            x=x,
            color=alt.Color("state:N", scale=states),
            shape=alt.Shape("state:N", scale=shapes),
            tooltip=tooltips(
                "line",
                "size",
                "block",
                "percent",
                "others",
                "mhz",
                "disturbed_by",
                percent="from the median of its case, %",
            ),
        )
    )
    charts = []
    for kind, field, heading, axis, caption in (
        ("", "percent", "Blocks over the run", "from the median of its case (%)", _BLOCKS_CAPTION),
        ("-others", "others", "Interference over the run", "taken by others (%)", _OTHERS_CAPTION),
    ):
        made = base.encode(y=alt.Y(f"{field}:Q", title=axis)).properties(height=HEIGHT // 2)
        spec = specification(made, description=caption)
        charts.append(Chart(id=name + kind, title=heading + title, caption=caption, spec=spec, data={name: data}))
    return charts
