"""The page of a run as a person uses it, in a real browser."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WAIT_MS = 30_000


def column(page: Any, table: str, heading: str) -> list[str]:
    """The texts of a column of the rows that are shown."""
    names = page.eval_on_selector_all(
        f"#{table}_wrapper .dt-scroll-head thead tr:first-child th", "ths => ths.map(th => th.innerText.trim())"
    )
    place = names.index(heading) + 1
    found: list[str] = page.eval_on_selector_all(
        f"#{table} tbody tr td:nth-child({place})", "cells => cells.map(cell => cell.innerText)"
    )
    return found


# The first row that is shown begins, in the column of a heading, with a text.
_FIRST_IS = """([table, heading, first]) => {
    const heads = [...document.querySelectorAll(`#${table}_wrapper .dt-scroll-head thead tr:first-child th`)];
    const place = heads.findIndex((th) => th.innerText.trim() === heading);
    return document.querySelector(`#${table} tbody tr`).cells[place].innerText === first;
}"""


def sort_by(page: Any, table: str, heading: str, first: str) -> list[str]:
    """Sorts by a column and returns it; ``first`` is the text that it then begins with."""
    head = page.locator(f"#{table}_wrapper .dt-scroll-head th", has_text=heading).first
    head.locator("button.dtcc-button_order").click()
    page.wait_for_function(_FIRST_IS, arg=[table, heading, first], timeout=_WAIT_MS)
    return column(page, table, heading)


@contextmanager
def searched(page: Any, words: str) -> Iterator[None]:
    """Shows the rows of the memory table with every word of ``words``."""
    search = page.locator("#memory-table_wrapper .dt-search input")
    rows = "[...document.querySelectorAll('#memory-table tbody tr')]"
    num = page.evaluate(f"() => {rows}.length")
    search.fill(words)
    shown = f"(words) => {rows}.every((row) => words.every((word) => row.innerText.includes(word)))"
    page.wait_for_function(shown, arg=words.split(), timeout=_WAIT_MS)
    yield
    search.fill("")
    page.wait_for_function(f"(num) => {rows}.length === num", arg=num, timeout=_WAIT_MS)


def test_a_table_sorts_by_numbers(page: Any) -> None:
    heading = "total GiB"
    before = column(page, "memory-table", heading)
    rising = [float(text) for text in sort_by(page, "memory-table", heading, "CRASHED") if text[:1].isdigit()]
    assert rising == sorted(rising)
    falling = [float(text) for text in sort_by(page, "memory-table", heading, "0.384") if text[:1].isdigit()]
    assert falling == sorted(falling, reverse=True)
    # A third click gives the order of the run back.
    assert sort_by(page, "memory-table", heading, before[0]) == before


def test_a_table_is_searched_and_filtered(page: Any, expect: Any) -> None:
    rows = page.locator("#memory-table tbody tr")
    methods = column(page, "memory-table", "method")
    with searched(page, "OOM"):
        assert len(column(page, "memory-table", "method")) == 1
    head = page.locator("#memory-table_wrapper .dt-scroll-head th", has_text="method").first
    head.locator("button.dtcc-button_dropdown").click()
    page.locator(".dtcc-list-buttons").get_by_label("Hydra-PPO", exact=True).click()
    expect(rows).to_have_count(methods.count("Hydra-PPO"))
    assert set(column(page, "memory-table", "method")) == {"Hydra-PPO"}
    page.locator(".dtcc-list-selectNone").click()
    page.keyboard.press("Escape")
    expect(rows).to_have_count(len(methods))


def test_a_case_that_failed_is_a_row_with_its_reason(page: Any) -> None:
    with searched(page, "OOM"):
        row = page.locator("#memory-table tbody tr")
        assert row.count() == 1
        assert "out of memory" in row.get_attribute("title")


def test_text_of_a_record_is_shown_and_not_run(opened: Any) -> None:
    with searched(opened.page, "CRASHED"):
        titles = opened.page.eval_on_selector_all("#memory-table tr[title]", "rows => rows.map(row => row.title)")
        assert any("<script>alert('run')</script>" in title for title in titles)
    assert opened.dialogs == []
    assert opened.page.locator("img[src='x']").count() == 0


def downloaded(page: Any, title: str) -> str:
    with page.expect_download() as found:
        page.locator("[data-downloads='memory-table']").get_by_role("button", name=title).click()
    assert found.value.suggested_filename.startswith("memory-table.")
    return Path(found.value.path()).read_text(encoding="utf-8")


def test_a_download_holds_the_table(page: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(downloaded(page, "CSV"))))
    assert len(rows) == 30
    assert {"method", "total_bytes"} <= set(rows[0])


def test_a_download_holds_the_rows_that_are_shown(page: Any) -> None:
    with searched(page, "Hydra-PPO 128"):
        shown = column(page, "memory-table", "total GiB")
        rows = list(csv.DictReader(io.StringIO(downloaded(page, "CSV"))))
        in_markdown = downloaded(page, "Markdown").splitlines()[2:]
        in_latex = downloaded(page, "LaTeX").split("\\midrule\n")[1].split("\\bottomrule")[0].splitlines()
    assert 0 < len(shown) == len(rows) == len(in_markdown) == len(in_latex) < 30
    assert {row["method"] for row in rows} <= {"hydra", "joined-hydra"}
    for i, text in enumerate(shown):
        assert f" {text} " in in_markdown[i]
        assert f" {text} " in in_latex[i]


def test_every_button_of_a_column_has_a_name_of_its_own(page: Any) -> None:
    names = page.eval_on_selector_all(
        "#memory-table_wrapper .dt-scroll-head button", "all => all.map(one => one.ariaLabel ?? one.innerText)"
    )
    assert len(names) == len(set(names)) > 10
    assert {"Sort by total GiB", "Sort by method", "Filter method"} <= set(names)
    assert page.get_by_role("button", name="Filter method").count() >= 1


def ends(texts: list[str]) -> tuple[float, float]:
    """The first and the last number of an axis with these texts."""
    numbers = sorted(map(float, texts))
    return numbers[0], numbers[-1]


def test_the_flame_chart_zooms_by_keyboard(page: Any, expect: Any) -> None:
    buttons = page.locator("figure:has([data-chart='flame']) .switches")
    axis = page.locator("[data-chart='flame'] svg g.role-axis-label text")
    whole = axis.all_text_contents()
    buttons.get_by_role("button", name="Zoom in").focus()
    page.keyboard.press("Enter")
    expect(axis).not_to_have_text(whole)
    zoomed = axis.all_text_contents()
    assert ends(whole)[0] < ends(zoomed)[0] < ends(zoomed)[1] < ends(whole)[1]
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Later"
    page.keyboard.press("Space")
    expect(axis).not_to_have_text(zoomed)
    later = axis.all_text_contents()
    assert ends(later)[1] > ends(zoomed)[1]
    buttons.get_by_role("button", name="Whole").press("Enter")
    expect(axis).not_to_have_text(later)
    assert ends(axis.all_text_contents()) == ends(whole)


def test_the_tensor_under_the_cursor_is_named_and_elsewhere_the_moment(page: Any) -> None:
    chart = page.locator("[data-chart='timeline-0']")
    chart.scroll_into_view_if_needed()
    box = chart.locator("svg.marks g.mark-area path").first.bounding_box()
    words = chart.locator("svg.marks text", has_text=", event ")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 2)
    words.wait_for(timeout=_WAIT_MS)
    assert re.fullmatch(r"\w[\w ]*, [\d.]+ GiB, event [\d,]+", words.first.text_content())
    tensor = chart.locator("svg.marks g.mark-area path[fill-opacity='0']").first.bounding_box()
    page.mouse.move(tensor["x"] + tensor["width"] / 2, tensor["y"] + tensor["height"] / 2)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for(timeout=_WAIT_MS)
    assert "8192 × 256 float32" in tooltip.inner_text()
    assert "<script>" in tooltip.inner_text()
    page.mouse.move(0, 0)


def test_the_keyboard_sorts_chooses_and_unfolds(page: Any) -> None:
    before = column(page, "memory-table", "total GiB")
    head = page.locator("#memory-table_wrapper .dt-scroll-head th", has_text="total GiB").first
    head.locator("button.dtcc-button_order").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(_FIRST_IS, arg=["memory-table", "total GiB", "CRASHED"], timeout=_WAIT_MS)
    for _ in range(2):
        page.keyboard.press("Enter")
    page.wait_for_function(_FIRST_IS, arg=["memory-table", "total GiB", before[0]], timeout=_WAIT_MS)
    fold = page.locator("#where-time details:has(a[href^='traces/']) > summary")
    fold.focus()
    page.keyboard.press("Enter")
    page.locator("#where-time details a[href^='traces/']").first.wait_for(timeout=_WAIT_MS)
    page.keyboard.press("Enter")
