"""The sections of the page, in their order. A new section is one function in this table."""

from __future__ import annotations

from collections.abc import Callable

from rlhfreports.page.blocks import Section
from rlhfreports.page.data import Page
from rlhfreports.page.memory import memory_section
from rlhfreports.page.times import times_section
from rlhfreports.page.where_time import where_time_section

# Each returns None where the runs have nothing to show in it.
SECTIONS: tuple[Callable[[Page], Section | None], ...] = (
    memory_section,
    times_section,
    where_time_section,
)


def sections_of(page: Page) -> list[Section]:
    """The sections that ``page`` has something for."""
    return [section for make in SECTIONS if (section := make(page)) is not None]
