"""The section on where the time is: phases, the roofline, and what the profiler saw."""

from __future__ import annotations

from rlhfreports.page.blocks import Section
from rlhfreports.page.data import Page
from rlhfreports.page.phases import phase_blocks
from rlhfreports.page.profiles import profile_blocks


def where_time_section(page: Page) -> Section | None:
    """Seconds and roofline of each phase; top ops, flame chart and traces of the cases that were profiled."""
    blocks = [*phase_blocks(page), *profile_blocks(page)]
    return Section(id="where-time", title="Where the time is", blocks=blocks) if blocks else None
