"""The chart of memory over one step, with the largest tensors under the cursor."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from rlhfreports import frames
from rlhfreports.columns import parts_of
from rlhfreports.page.blocks import Chart
from rlhfreports.page.charts import HEIGHT, by_mode, part_color, select, specification
from rlhfreports.page.data import Run, Timeline
from rlhfreports.page.tooltips import tooltips
from rlhfreports.tables import GIB
from rlhfreports.timelines import Floats, scale

_CAPTION = (
    "Live bytes by part over one step. An event is a tensor made, named or freed; short phases are widened. The line "
    "below names the moment under the pointer: phase, total and event."
)
_OF_TENSORS = " Over an outlined area the pointer names the tensor, one of the largest of its part."
_OF_PLANS = " Choose a predicted step to compare: it leaves out most decode steps."
_PREDICTED = ", predicted"  # after the words of a case
_BEFORE = "made before the step"


def timeline_chart(run: Run, name: str, title: str) -> Chart | None:
    """Live bytes over the events of one step, as areas by part; a switch chooses the case."""
    moments, spans, tensors = timeline_frames(run)
    if moments.empty:
        return None
    cases = list(dict.fromkeys(moments["case"]))
    measured = [case for case in cases if not case.endswith(_PREDICTED)]
    layers = [_areas(run, name), *_phases(name), *_moments(name), *([_tensors(run, name)] if len(tensors) else [])]
    made = alt.layer(*layers).add_params(select("shown_case", cases, "case", (measured or cases)[-1]))
    caption = _CAPTION + (_OF_TENSORS if len(tensors) else "") + (_OF_PLANS if run.predicted_timelines else "")
    data = {f"{name}-moments": moments, f"{name}-phases": spans}
    return Chart(
        id=name,
        title=f"Memory over one step{f', {title}' if title else ''}",
        caption=caption,
        spec=specification(made.properties(height=HEIGHT), description=caption),
        data=data | ({f"{name}-tensors": tensors} if len(tensors) else {}),
    )


def timeline_frames(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The timelines of a run for its chart.

    Returns:
        The moments: ``n`` (their number), ``case`` (in words), ``x`` (a place between 0 and 1), ``event``, ``phase``,
        ``gib`` (the total), and the GiB of each part in a column of its name. The phases: ``case``, ``phase``,
        ``left``, ``right`` and ``middle``. The largest tensors: ``id``, ``case``, ``part``, ``place`` (of the part),
        ``gib``, ``tensor`` (shape and dtype), ``op``, ``made`` (the phase), ``events``, and the moments ``first``,
        ``last`` and ``end`` (the one after, where there is one).
    """
    cases = run.frame.drop_duplicates("case_id").set_index("case_id")
    words: Any = frames.line_of(cases) + ", " + frames.size_of(cases) if len(cases) else {}
    found: list[tuple[pd.DataFrame, ...]] = []
    num_moments = 0
    for case_id in run.timelines:
        for timelines, kind in ((run.timelines, ""), (run.predicted_timelines, _PREDICTED)):
            if case_id in words and case_id in timelines:
                found.append(_frames_of(timelines[case_id], num_moments))
                for frame in found[-1]:
                    frame.insert(0, "case", f"{words[case_id]}{kind}")
                num_moments += len(found[-1][0])
    if not found:
        return pd.DataFrame(), pd.DataFrame(), pd.DataFrame()
    moments, spans, tensors = (pd.concat(rows, ignore_index=True) for rows in zip(*found, strict=True))
    return moments, spans, tensors.assign(id=range(len(tensors)))


def _frames_of(timeline: Timeline, num_before: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The frames of one case, whose first moment has the number ``num_before``."""
    points, phases, tensors = timeline
    knots, places = scale(points, phases)
    inside = points[points["event"].between(int(knots[0]), int(knots[-1]))]
    # Without phases the places are the ends of the axis.
    lefts, rights = (ends[: len(phases)] / places[-1] for ends in (places[0:-1:2], places[1::2]))
    names = [str(name).replace("_", " ") for name in phases["phase"]]
    x: Floats = np.interp(inside["event"].to_numpy(dtype=float), knots, places) / places[-1]
    at = np.clip(np.searchsorted(lefts, x, side="right") - 1, 0, None)
    columns = {part: inside[f"{part}_part_bytes"].to_numpy(dtype=float) / GIB for part in parts_of(points)}
    moments = pd.DataFrame(
        {
            "n": num_before + np.arange(len(inside)),
            "x": x,
            "event": inside["event"].to_numpy(),
            "phase": [names[i] for i in at] if names else "",
            "gib": np.sum(list(columns.values()), axis=0),
            **columns,
        }
    )
    spans = pd.DataFrame({"phase": names, "left": lefts, "right": rights, "middle": (lefts + rights) / 2})
    return moments, spans, _named(tensors, moments, phases, list(columns))


def _named(tensors: pd.DataFrame, moments: pd.DataFrame, phases: pd.DataFrame, parts: list[str]) -> pd.DataFrame:
    """The tensors that live at one moment or more and are high enough to be pointed at, in words."""
    events = moments["event"].to_numpy()
    first, after = (np.searchsorted(events, tensors[name].to_numpy(dtype=int)) for name in ("first_event", "end_event"))
    bounds = phases["first_event"].to_numpy()
    made_in = np.searchsorted(bounds, tensors["born_event"].to_numpy(dtype=int), side="left") - 1
    start = int(moments["n"].iloc[0]) if len(moments) else 0
    rows = pd.DataFrame(
        {
            "part": tensors["part"].str.replace("_", " "),
            "place": tensors["part"].map({part: place for place, part in enumerate(parts)}),
            "gib": tensors["bytes"].astype("float64") / GIB,
            "tensor": tensors["shape"] + " " + tensors["dtype"],
            "op": tensors["op"].str.removesuffix(".default").fillna(_BEFORE),
            "made": [
                str(phases["phase"].iloc[i]).replace("_", " ") if i >= 0 else "before the phases" for i in made_in
            ],
            "events": [
                f"{born:,}–{end - 1:,}" for born, end in zip(tensors["first_event"], tensors["end_event"], strict=True)
            ],
            "first": start + first,
            "last": start + after - 1,
            "end": start + np.minimum(after, len(moments) - 1),
        }
    )
    # A lower one is under a pixel of the chart. With all of them a choice of case took five times as long.
    is_seen = rows["gib"] >= moments["gib"].max() / HEIGHT
    found: pd.DataFrame = rows[(after > first) & rows["place"].notna() & is_seen]
    return found


_IN_CASE = "datum.case === shown_case"


def _x() -> alt.X:
    return alt.X("x:Q", title="events of one step", axis=alt.Axis(labels=False, ticks=False, grid=False))


def _areas(run: Run, name: str) -> Any:
    parts = parts_of(run.frame)
    return (
        alt.Chart(alt.NamedData(f"{name}-moments"))
        .transform_filter(_IN_CASE)
        .transform_fold([*parts], as_=["column", "in_part"])
        .transform_calculate(
            place=f"indexof({parts}, datum.column)",
            part="replace(datum.column, /_/g, ' ')",
            in_part="datum.in_part || 0",
        )
        .mark_area(interpolate="step-after")
        .encode(
            x=_x(),
            y=alt.Y("in_part:Q", stack="zero", title="GiB"),
            color=part_color(run.frame, offset=26),
            order=alt.Order("place:Q"),
        )
    )


def _phases(name: str) -> list[Any]:
    phases = alt.Chart(alt.NamedData(f"{name}-phases")).transform_filter(_IN_CASE)
    ends = phases.mark_rule(strokeDash=[2, 3]).encode(x=alt.X("left:Q"))
    names = (
        phases.transform_filter("datum.right - datum.left > 0.07")
        .mark_text(baseline="bottom", dy=-3)
        .encode(x=alt.X("middle:Q"), y=alt.value(0), text="phase:N")
    )
    return [ends, names]


def _moments(name: str) -> list[Any]:
    """A rule at the moment next to the cursor, and its words below the axis.

    No tooltip: Vega-Lite says "undefined" for text in that of a nearest point. The rule is below the tensors, so that a
    tensor is named first.
    """
    near = alt.selection_point(
        name="near", fields=["x"], nearest=True, on="pointermove", clear="pointerout", empty=False
    )
    moments = alt.Chart(alt.NamedData(f"{name}-moments")).transform_filter(_IN_CASE)
    rule = moments.mark_rule(tooltip=None).encode(x=_x(), opacity=alt.condition(near, alt.value(0.8), alt.value(0)))
    words = (
        moments.transform_filter(alt.ParameterPredicate(param="near", empty=False))
        .transform_calculate(
            words="datum.phase + ', ' + format(datum.gib, '.4~g') + ' GiB, event ' + format(datum.event, ',d')"
        )
        .mark_text(align="left", baseline="top")
        .encode(x=alt.value(0), y=alt.value({"expr": "height + 6"}), text="words:N")
    )
    return [rule.add_params(near), words]


def _tensors(run: Run, name: str) -> Any:
    """The largest tensors over the areas of their parts, invisible but for their edges.

    A tensor's row is spread over its moments here, as the page would need 4 MB for these rows of ten cases. The last of
    them ends the last step of its area.
    """
    parts = parts_of(run.frame)
    below = [" + ".join(["0", *(f"datum.{part}" for part in parts[:place])]) for place in range(len(parts))]
    own = ", ".join(f"datum.{part}" for part in parts)
    hovered = alt.selection_point(name="hovered", fields=["id"], on="pointerover", clear="pointerout", empty=False)
    edge = by_mode("#FFFFFF", "#16191C")
    return (
        alt.Chart(alt.NamedData(f"{name}-tensors"))
        .transform_filter(_IN_CASE)
        .transform_calculate(n="sequence(datum.first, datum.end + 1)")
        .transform_flatten(["n"])
        .transform_lookup(
            lookup="n", from_=alt.LookupData(alt.NamedData(f"{name}-moments"), key="n", fields=["x", *parts])
        )
        .transform_calculate(
            below=f"[{', '.join(below)}][datum.place]", own=f"[{own}][datum.place]", is_end="datum.n > datum.last"
        )
        .transform_stack(
            stack="gib",
            groupby=["n", "place", "is_end"],
            sort=[alt.SortField("gib", order="descending"), alt.SortField("id")],
            as_=["from", "to"],
        )
        # A tensor may be named for another part after the peak was made: it never leaves its part's area.
        .transform_calculate(
            low="datum.below + min(datum.from, datum.own)", high="datum.below + min(datum.to, datum.own)"
        )
        .mark_area(interpolate="step-after", stroke=edge, strokeWidth=0.5, strokeOpacity=0.25)
        .encode(
            x=_x(),
            y=alt.Y("low:Q", title="GiB"),
            y2="high:Q",
            detail="id:N",
            fill=alt.value(by_mode("#000000", "#FFFFFF")),
            fillOpacity=alt.condition(hovered, alt.value(0.3), alt.value(0)),
            tooltip=tooltips("tensor", "part", "gib", "op", "made", "events"),
        )
        .add_params(hovered)
    )
