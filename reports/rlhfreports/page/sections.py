"""The sections of the page, in their order. A new section is one function in this table."""

from __future__ import annotations

from collections.abc import Callable

from altair.utils.schemapi import debug_mode

from rlhfreports.page.blocks import Section
from rlhfreports.page.configuration import configuration_section
from rlhfreports.page.data import Page
from rlhfreports.page.memory import memory_section
from rlhfreports.page.parts import parts_section
from rlhfreports.page.precision import precision_section, predicted_section
from rlhfreports.page.ranks import ranks_section
from rlhfreports.page.summary import answer_section, comparison_section, paper_section
from rlhfreports.page.times import times_section
from rlhfreports.page.where_time import where_time_section

# Each returns None where the runs have nothing to show in it.
SECTIONS: tuple[Callable[[Page], Section | None], ...] = (
    answer_section,
    comparison_section,
    paper_section,
    memory_section,
    times_section,
    parts_section,
    where_time_section,
    ranks_section,
    predicted_section,
    precision_section,
    configuration_section,
)


def sections_of(page: Page) -> list[Section]:
    """The sections that ``page`` has something for."""
    # Altair would check each object that it makes, and checks every chart anyway: a fifth of the time of a page.
    with debug_mode(False):
        return [section for make in SECTIONS if (section := make(page)) is not None]
