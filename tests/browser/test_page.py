"""The page of a run as a person uses it, in a real browser."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

READY = "html[data-ready=true]"
# Elements that a person can act on; of a group of radio buttons the Tab key reaches one.
ACTIVE = "a[href], button, input, select, summary, [tabindex='0']"
_WAIT_MS = 30_000


class Opened:
    """A page, and what it said and asked for since it was opened."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("dialog", self._dismiss)
        self.url = path.as_uri()
        page.goto(self.url)
        page.wait_for_selector(READY, timeout=_WAIT_MS)

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()


@pytest.fixture(scope="module")
def opened(browser: Any, page_path: Path) -> Iterator[Opened]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield Opened(context.new_page(), page_path)
    context.close()


@pytest.fixture
def page(opened: Opened) -> Iterator[Any]:
    """The page at a common size in light mode. Tests leave the switches as they were."""
    yield opened.page
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(media="screen", color_scheme="light")


def test_the_page_loads_without_a_word_on_the_console_and_without_the_network(opened: Opened) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("blob:", "data:"))] == [opened.url]
    assert opened.dialogs == []


def test_every_chart_is_drawn(page: Any) -> None:
    charts = page.locator("[data-chart]")
    assert charts.count() >= 8
    for i in range(charts.count()):
        chart = charts.nth(i)
        num_marks = chart.locator("svg .mark-group path, svg .mark-symbol path, svg .mark-rect path").count()
        assert num_marks > 3, chart.get_attribute("data-chart")


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
def searched(page: Any, word: str) -> Iterator[None]:
    """Shows the rows of the memory table with ``word``."""
    search = page.locator("#memory-table_wrapper .dt-search input")
    search.fill(word)
    yield
    search.fill("")


def test_a_table_sorts_by_numbers(page: Any) -> None:
    heading = "total GiB"
    before = column(page, "memory-table", heading)
    rising = [float(text) for text in sort_by(page, "memory-table", heading, "CRASHED") if text[:1].isdigit()]
    assert rising == sorted(rising)
    falling = [float(text) for text in sort_by(page, "memory-table", heading, "0.384") if text[:1].isdigit()]
    assert falling == sorted(falling, reverse=True)
    # A third click gives the order of the run back.
    assert sort_by(page, "memory-table", heading, before[0]) == before


def test_a_table_is_searched_and_filtered(page: Any) -> None:
    with searched(page, "OOM"):
        assert len(column(page, "memory-table", "method")) == 1
    head = page.locator("#memory-table_wrapper .dt-scroll-head th", has_text="method").first
    head.locator("button.dtcc-button_dropdown").click()
    page.locator(".dtcc-list-buttons").get_by_label("Hydra-PPO", exact=True).click()
    assert set(column(page, "memory-table", "method")) == {"Hydra-PPO"}
    page.locator(".dtcc-list-selectNone").click()
    page.keyboard.press("Escape")
    assert len(set(column(page, "memory-table", "method"))) > 2


def test_a_case_that_failed_is_a_row_with_its_reason(page: Any) -> None:
    with searched(page, "OOM"):
        row = page.locator("#memory-table tbody tr")
        assert row.count() == 1
        assert "out of memory" in row.get_attribute("title")


def test_text_of_a_record_is_shown_and_not_run(opened: Opened) -> None:
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


def ends_of_flames(page: Any) -> tuple[float, float]:
    """The first and the last number of the x axis of the flame chart."""
    texts = page.locator("[data-chart='flame'] svg g.role-axis-label text").evaluate_all(
        "all => all.map(t => t.textContent)"
    )
    numbers = sorted(map(float, texts))
    return numbers[0], numbers[-1]


def test_the_flame_chart_zooms_by_keyboard(page: Any) -> None:
    buttons = page.locator("figure:has([data-chart='flame']) .switches")
    low, high = ends_of_flames(page)
    buttons.get_by_role("button", name="Zoom in").focus()
    page.keyboard.press("Enter")
    assert low < ends_of_flames(page)[0] < ends_of_flames(page)[1] < high
    before = ends_of_flames(page)
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent") == "Later"
    page.keyboard.press("Space")
    assert ends_of_flames(page)[1] > before[1]
    buttons.get_by_role("button", name="Whole").press("Enter")
    assert ends_of_flames(page) == (low, high)


def picture(page: Any, chart: str) -> str:
    found: str = page.locator(f"[data-chart='{chart}'] svg.marks").inner_html()
    return found


def chart_ids(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("[data-chart]", "all => all.map(one => one.dataset.chart)")
    return found


def test_each_switch_changes_its_plot(page: Any) -> None:
    num_switches = 0
    for chart in chart_ids(page):
        figure = page.locator(f"figure:has([data-chart='{chart}'])")
        for i in range(figure.locator("select").count()):
            switch = figure.locator("select").nth(i)
            values = switch.locator("option").evaluate_all("all => all.map(one => one.value)")
            num_switches += _changes(page, chart, switch.select_option, switch.input_value(), values)
        buttons = figure.locator("input[type=radio]")
        for name in dict.fromkeys(buttons.evaluate_all("all => all.map(one => one.name)")):
            group = buttons.and_(page.locator(f"[name='{name}']"))
            values = group.evaluate_all("all => all.map(one => one.value)")
            first = values[group.evaluate_all("all => all.findIndex(one => one.checked)")]

            def check(value: str, group: Any = group, values: list[str] = values) -> None:
                group.nth(values.index(value)).check()

            num_switches += _changes(page, chart, check, first, values)
    assert num_switches >= 6


def _changes(page: Any, chart: str, choose: Callable[[str], object], first: str, values: list[str]) -> bool:
    """Chooses every value, and the first again; true if there was something to choose. The picture must change."""
    if len(values) < 2:
        return False
    before = picture(page, chart)
    changed = []
    for value in values:
        if value != first:
            choose(value)
            changed.append(picture(page, chart) != before)
    choose(first)
    assert any(changed), (chart, values)
    return True


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


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_window_shows_all_without_scrolling_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_function("() => document.documentElement.scrollWidth <= window.innerWidth + 1", timeout=_WAIT_MS)
    for chart in chart_ids(page):
        box = page.locator(f"[data-chart='{chart}']").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width + 1, chart


def brightness(page: Any, selector: str, style: str) -> float:
    """Mean of the three components of a colour as the browser computed it, from 0 to 255."""
    color = page.locator(selector).first.evaluate(f"one => getComputedStyle(one).{style}")
    return sum(float(part) for part in color[color.index("(") + 1 : -1].split(",")[:3]) / 3


def test_dark_mode_is_dark_and_print_is_light(page: Any) -> None:
    label = "[data-chart='latency'] svg .mark-text text"
    assert brightness(page, "html", "backgroundColor") > 200 > 100 > brightness(page, label, "fill")
    page.emulate_media(color_scheme="dark")
    assert brightness(page, "html", "backgroundColor") < 60
    assert brightness(page, "body", "color") > 180
    page.wait_for_function(
        f"() => getComputedStyle(document.querySelector(\"{label}\")).fill !== 'rgb(51, 51, 51)'", timeout=_WAIT_MS
    )
    assert brightness(page, label, "fill") > 150
    page.emulate_media(media="print", color_scheme="dark")
    assert brightness(page, "html", "backgroundColor") > 200
    assert brightness(page, "body", "color") < 60
    assert not page.locator("header nav").is_visible()


def test_the_page_prints(page: Any) -> None:
    assert page.pdf().startswith(b"%PDF")


def test_the_keyboard_reaches_everything(page: Any) -> None:
    page.evaluate("() => { document.activeElement?.blur(); window.getSelection().removeAllRanges(); }")
    page.evaluate("() => { document.querySelectorAll('[data-reached]').forEach(e => delete e.dataset.reached); }")
    missing = f"""() => [...document.querySelectorAll("{ACTIVE}")].filter(e => {{
        if (e.tabIndex < 0 || e.disabled || !e.checkVisibility({{ visibilityProperty: true }})) return false;
        if (e.dataset.reached) return false;
        const group = e.type === "radio" && e.name
            ? [...e.closest("form, figure, body").querySelectorAll(`input[name="${{e.name}}"]`)] : [e];
        return !group.some(one => one.dataset.reached);
    }}).map(e => e.outerHTML.slice(0, 160))"""
    num = page.locator(ACTIVE).count()
    page.locator(".skip").focus()
    for _ in range(2 * num):
        page.evaluate("() => { document.activeElement.dataset.reached = 'yes'; }")
        page.keyboard.press("Tab")
        if page.evaluate(
            "() => document.activeElement === document.body || document.activeElement.className === 'skip'"
        ):
            break
    assert page.evaluate(missing) == []


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
    assert page.locator("#where-time details a[href^='traces/']").first.is_visible()
    page.keyboard.press("Enter")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.emulate_media(color_scheme=scheme)
    # What depends on the mode is contrast alone.
    options = {"runOnly": ["color-contrast"]} if scheme == "dark" else {}
    # The thousands of marks in a chart's own picture have one name, which the picture carries.
    found = axe.Axe().run(page, context={"exclude": [["svg.marks > g"]]}, options=options).response
    serious = [
        (violation["id"], violation["help"], [node["html"][:200] for node in violation["nodes"]][:3])
        for violation in found["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert len(found["passes"]) >= (1 if scheme == "dark" else 10)
