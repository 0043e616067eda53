"""The lines of tooltips: one table of fields, so that a field has the same words and digits in every chart."""

from __future__ import annotations

import altair as alt

# By field: its title, and the format of a number; text has none.
_FIELDS: dict[str, tuple[str, str]] = {
    "title": ("method", ""),
    "line": ("method", ""),
    "size": ("size", ""),
    "case": ("case", ""),
    "seq_len": ("tokens", "d"),
    "batch_size": ("batch size", "d"),
    "phase": ("phase", ""),
    "part": ("part", ""),
    "label": ("ranks", ""),
    "words": ("in all", ""),
    "value": ("value", ".4~g"),
    "world_size": ("ranks", "d"),
    "gib": ("GiB", ".4~g"),
    "total": ("total GiB", ".4~g"),
    "predicted_gib": ("predicted GiB", ".4~g"),
    "measured_gib": ("measured GiB", ".4~g"),
    "percent": ("difference, %", "+.3~g"),
    "word": ("outcome", ""),
    "error": ("why", ""),
    "shown": ("value", ""),
    "seconds": ("seconds", ".3~g"),
    "sum(seconds_per_sample)": ("seconds per sample", ".3~g"),
    "sum(floor_s_per_sample)": ("least at the ceilings", ".3~g"),
    "intensity": ("FLOP/byte", ".3~g"),
    "flops_per_s": ("FLOP/s", ".3~s"),
    "floor_fraction": ("of the roofline", ".0%"),
    "speedup": ("speed-up", ".3f"),
    "machines": ("machines", ""),
    "low": ("95 % interval from", ".3f"),
    "high": ("to", ".3f"),
    "block": ("block", "d"),
    "others": ("taken by others, %", ".1f"),
    "mhz": ("CPU MHz", ".0f"),
    "disturbed_by": ("disturbed by", ""),
    "name": ("call", ""),
    "op": ("op", ""),
    "kind": ("kind", ""),
    "what": ("what", ""),
    "count": ("calls", ",d"),
    "share": ("of the phase", ".1%"),
    "event": ("event", ",d"),
    "events": ("events", ""),
    "tensor": ("tensor", ""),
    "made": ("made in", ""),
}


def tooltips(*fields: str, **titles: str) -> list[alt.Tooltip]:
    """The lines for ``fields``, in their order.

    Args:
        fields: of the chart's data.
        titles: where a field has another title than in other charts.
    """
    found = []
    for field in fields:
        title, digits = _FIELDS[field]
        title = titles.get(field, title)
        found.append(
            alt.Tooltip(f"{field}:Q", title=title, format=digits) if digits else alt.Tooltip(f"{field}:N", title=title)
        )
    return found
