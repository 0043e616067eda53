"""The profiles of a run: top ops, a flame chart, the traces as files, and the allocator's history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from urllib.parse import quote

import altair as alt
import pandas as pd

from rlhfreports.columns import RUN
from rlhfreports.frames import line_of, size_of
from rlhfreports.page.blocks import Block, Chart, Link, Links, Table, Text, table_of
from rlhfreports.page.charts import HEIGHT, by_mode, names_axis, select, specification
from rlhfreports.page.data import Page, Run
from rlhfreports.page.tooltips import tooltips
from rlhfreports.profiles import TOP, Profile, flame_rects, function_first, kernels, shorter, top_ops
from rlhfreports.styles import COLORS
from rlhfreports.tables import ABSENT, GIB, ReportTable

# Light enough for black words in both modes.
KIND_COLORS = {
    "Python": "#C9D7E6",
    "torch op": "#F3C08B",
    "native op": "#8FD3B6",
    "CUDA call": "#E7B7D3",
    "kernel": "#B5B0E8",
}
_STEP = 19  # pixels of a row
TRACES = "traces"
Found = tuple[str, str, Profile]  # a case in words, its id, its profile


def profile_blocks(page: Page) -> list[Block]:
    """The charts and tables of the profiled cases; none where no case was profiled."""
    found = [
        (label, case_id, profile)
        for run in page.runs
        for case_id, label in _labels(page, run).items()
        if (profile := run.profiles.get(case_id)) is not None
    ]
    if not found:
        return []
    ops, on_device = _joined(found, top_ops), _joined(found, kernels)
    return [
        Text(
            text="The profiler records one step; of a phase that runs several times, only the first. It slows the step "
            "down, so compare shares and not seconds. The seconds above are those of steps without it."
        ),
        *([_ops_chart(ops, "top-ops", "Top ops of each phase", "op")] if len(ops) else ()),
        *([_ops_chart(on_device, "top-kernels", "Top kernels of each phase", "kernel")] if len(on_device) else ()),
        *_flame_blocks(_joined(found, flame_rects)),
        *_allocator_blocks(_joined(found, lambda profile: profile["allocator"])),
        *([_ops_table(ops)] if len(ops) else ()),
        *(_links(found) if len(page.runs) == 1 else ()),
    ]


def _labels(page: Page, run: Run) -> dict[str, str]:
    """Words for each case of ``run``, by its id, that tell it from every other."""
    rows = page.frame if len(page.runs) == 1 else page.frame[page.frame[RUN] == run.name]
    words = (line_of(page.frame) + ", " + size_of(page.frame)).reindex(rows.index)
    return dict(zip(rows["case_id"].astype(str), words, strict=True))


def _joined(found: Sequence[Found], frame_of: Callable[[Profile], pd.DataFrame]) -> pd.DataFrame:
    """A frame of every profile in one, with the words of its case in the column ``case``."""
    frames = [(label, frame_of(profile)) for label, _, profile in found]
    filled = [frame.assign(case=label) for label, frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _kind_scale(kinds: Iterable[str]) -> alt.Scale:
    present = [kind for kind in KIND_COLORS if kind in set(kinds)]
    return alt.Scale(domain=present, range=[KIND_COLORS[kind] for kind in present])


def _ops_chart(ops: pd.DataFrame, name: str, title: str, what: str) -> Chart:
    caption = (
        f"The {what}s with the most self time, without the ops that they call. A native op is one of this project's C "
        "ops; the native op 'program' is a whole decode step. Python is the time between ops."
        if what == "op"
        else "The kernels and copies of the device with the most time."
    )
    caption += _of_gaps(ops)
    ops = ops.assign(label=ops["op"].map(shorter))
    base = alt.Chart(alt.NamedData(name)).transform_filter("datum.case === profiled && datum.phase === phase")
    y = alt.Y(
        "label:N",
        title=None,
        sort=alt.EncodingSortField("rank", op="min", order="ascending"),
        axis=names_axis(420),
    )
    bars = base.mark_bar().encode(
        y=y,
        x=alt.X("seconds:Q", title="seconds in the profiled stretch"),
        color=alt.Color("kind:N", scale=_kind_scale(ops["kind"])),
        tooltip=tooltips("op", "kind", "count", "seconds", "share", op=what),
    )
    words = base.mark_text(align="left", dx=4, fontSize=11).encode(
        y=y, x=alt.X("seconds:Q"), text=alt.Text("share:Q", format=".0%")
    )
    return Chart(
        id=name,
        title=title,
        caption=caption,
        spec=specification(
            alt.layer(bars, words).add_params(*_switches(ops)).properties(height=_STEP * TOP),
            description=caption,
        ),
        data={name: ops},
    )


def _switches(rows: pd.DataFrame) -> list[alt.Parameter]:
    return [
        select("profiled", list(rows["case"].drop_duplicates()), "case"),
        select("phase", list(rows["phase"].drop_duplicates()), "phase"),
    ]


def _of_gaps(rows: pd.DataFrame) -> str:
    """A sentence for the caption where some case has no rows of a phase that the switch offers."""
    num_shown = len(rows[["case", "phase"]].drop_duplicates())
    is_full = num_shown == rows["case"].nunique() * rows["phase"].nunique()
    return "" if is_full else " The chart is empty where the chosen case has no such phase."


def _ops_table(ops: pd.DataFrame) -> Table:
    cells = ops[["case", "phase", "op", "kind"]].astype(str)
    cells = cells.assign(
        calls=[ABSENT if pd.isna(count) else f"{int(count):,}" for count in ops["count"]],
        seconds=[f"{seconds:.3g}" for seconds in ops["seconds"]],
        share=[ABSENT if pd.isna(share) else f"{100 * share:.1f}" for share in ops["share"]],
    ).rename(columns={"share": "% of phase"})
    table = ReportTable(
        caption="Top ops of all phases and profiled cases.", cells=cells, num_text_columns=4, explanation="", frame=ops
    )
    return table_of(table, name="top-ops-table", filters=("case", "phase", "kind"))


def _flame_blocks(rects: pd.DataFrame) -> list[Block]:
    if rects.empty:
        return []
    caption = (
        "Callers above, what they call below, as wide as their time; equal calls from the same place are one. The "
        "buttons above zoom and move; so do dragging, Shift with the wheel, and a double-click for the whole. Recorded "
        "in a step of its own, in which Python takes longer than usual."
    )
    caption += _of_gaps(rects)
    width = "scale('x', datum.x1) - scale('x', datum.x0)"
    base = (
        alt.Chart(alt.NamedData("flame"))
        .transform_filter("datum.case === profiled && datum.phase === phase")
        .transform_calculate(below="datum.depth + 1", middle="datum.depth + 0.5")
    )
    x = alt.X("x0:Q", title="seconds", scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(grid=False))
    num_rows = int(rects["depth"].max()) + 1
    y = alt.Y("depth:Q", title=None, axis=None, scale=alt.Scale(domain=[0, num_rows], reverse=True, nice=False))
    zoom = alt.selection_interval(
        name="zoom",
        bind="scales",
        encodings=["x"],
        zoom="wheel![event.shiftKey]",  # the wheel alone scrolls the page
    )
    boxes = base.mark_rect(clip=True, stroke=by_mode("#FFFFFF", "#16191C"), strokeWidth=0.5).encode(
        x=x,
        x2="x1:Q",
        y=y,
        y2="below:Q",
        color=alt.Color("kind:N", scale=_kind_scale(rects["kind"])),
        tooltip=tooltips("name", "kind", "seconds", "share", "count"),
    )
    words = base.mark_text(
        clip=True,
        align="left",
        dx=3,
        fontSize=10.5,
        color="#111111",
        limit=alt.ExprRef(f"max(1, {width} - 6)"),
        opacity=alt.ExprRef(f"{width} > 24 ? 1 : 0"),
    ).encode(x=x, y=alt.Y("middle:Q"), text="label:N")
    made = alt.layer(boxes.add_params(zoom), words).add_params(*_switches(rects)).properties(height=_STEP * num_rows)
    return [
        Chart(
            id="flame",
            title="Flame chart of each phase",
            caption=caption,
            spec=specification(made, description=caption),
            data={"flame": rects.assign(label=rects["name"].map(function_first))},
        )
    ]


def _allocator_blocks(curves: pd.DataFrame) -> list[Block]:
    if curves.empty:
        return []
    caption = "The CUDA allocator over one step: what tensors hold, and what the allocator keeps from the driver."
    rows = pd.concat(
        [
            curves.rename(columns={"s": "seconds"}).assign(gib=curves[f"{what}_bytes"] / GIB, what=what)[
                ["case", "seconds", "gib", "what"]
            ]
            for what in ("reserved", "active")
        ]
    )
    made = (
        alt.Chart(alt.NamedData("allocator"))
        .transform_filter("datum.case === profiled")
        .mark_area(interpolate="step-after", opacity=0.6)
        .encode(
            x=alt.X("seconds:Q", title="seconds"),
            y=alt.Y("gib:Q", title="GiB", stack=None),
            color=alt.Color("what:N", scale=alt.Scale(domain=["reserved", "active"], range=["#BBBBBB", COLORS[4]])),
            tooltip=tooltips("what", "seconds", "gib"),
        )
        .add_params(select("profiled", list(rows["case"].drop_duplicates()), "case"))
        .properties(height=HEIGHT)
    )
    return [
        Chart(
            id="allocator",
            title="The CUDA allocator",
            caption=caption,
            spec=specification(made, description=caption),
            data={"allocator": rows},
        )
    ]


def _links(found: Sequence[Found]) -> list[Block]:
    links = [
        Link(text=f"{label}: {str(row['phase']).replace('_', ' ')}", url=_url(case_id, str(row["trace"])))
        for label, case_id, profile in found
        for row in profile["phases"].to_dict("records")
        if not pd.isna(row["trace"])
    ]
    snapshots = [
        Link(text=f"{label}: allocator snapshot", url=_url(case_id, "snapshot.pickle"))
        for label, case_id, profile in found
        if len(profile["allocator"])
    ]
    return [
        Links(
            title=f"{len(links) + len(snapshots)} files of the profiler",
            text="Traces open in ui.perfetto.dev or chrome://tracing, snapshots of the allocator in "
            "pytorch.org/memory_viz. They lie beside this page, in the folder of the run.",
            links=[*links, *snapshots],
        )
    ]


def _url(case_id: str, name: str) -> str:
    return "/".join((TRACES, quote(case_id, safe=""), quote(name, safe="")))
