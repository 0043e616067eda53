"""Every page as a person uses it, in a real browser: of one process, of cases over ranks, and of runs with little."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

# Elements that a person can act on; of a group of radio buttons the Tab key reaches one.
ACTIVE = "a[href], button, input, select, summary, [tabindex='0']"
_WAIT_MS = 30_000
# Ends when what was due is done and the next frame has been drawn.
_FRAME = """() => new Promise((done) => setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(done))))"""
# At least so many charts and switches that offer a choice has each page.
PAGES = {
    "one process": (8, 6),
    "ranks": (8, 6),
    "one length": (8, 6),
    "one case": (7, 2),
    "all failed": (0, 0),
    "empty": (0, 0),
}
pytestmark = pytest.mark.parametrize("opened", list(PAGES), indirect=True, scope="module")


def test_the_page_loads_without_a_word_on_the_console_and_without_the_network(opened: Any) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("blob:", "data:"))] == [opened.url]
    assert opened.dialogs == []


def test_every_chart_is_drawn(opened: Any, page: Any) -> None:
    charts = page.locator("[data-chart]")
    assert charts.count() >= PAGES[opened.name][0]
    for i in range(charts.count()):
        chart = charts.nth(i)
        num_marks = chart.locator("svg .role-mark path").count()
        assert num_marks > 0, chart.get_attribute("data-chart")


def picture(page: Any, chart: str) -> list[str]:
    """Elements of a chart with their text, such that a chart that is drawn again with the same values is the same.

    Vega draws again with elements in another order, with other last digits, and with an axis that has its old label.
    """
    drawn = page.locator(f"[data-chart='{chart}'] svg.marks").inner_html()
    rounded = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", drawn)
    return sorted(element for element in re.findall("<[^>]+>[^<]*", rounded) if "role-axis" not in element)


def chart_ids(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("[data-chart]", "all => all.map(one => one.dataset.chart)")
    return found


def test_each_switch_changes_its_plot(opened: Any, page: Any) -> None:
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
    assert num_switches >= PAGES[opened.name][1]


def _changes(page: Any, chart: str, choose: Callable[[str], object], first: str, values: list[str]) -> bool:
    """Chooses every value, and the first again; true if there was something to choose. Each has its own picture."""
    if len(values) < 2:
        return False
    before = picture(page, chart)
    dead = []
    for value in values:
        if value != first:
            choose(value)
            page.evaluate(_FRAME)  # a chart is drawn again in the next frame
            if picture(page, chart) == before:
                dead.append(value)
    choose(first)
    page.evaluate(_FRAME)
    assert dead == [], (chart, first)
    assert picture(page, chart) == before, (chart, first)
    return True


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


def set_scheme(page: Any, scheme: str) -> None:
    """Chooses light or dark mode, and waits until the tables and the charts know."""
    page.emulate_media(color_scheme=scheme)
    is_dark = "(isDark) => document.documentElement.classList.contains('dark') === isDark"
    page.wait_for_function(is_dark, arg=scheme == "dark", timeout=_WAIT_MS)


def test_dark_mode_is_dark_and_print_is_light(opened: Any, page: Any) -> None:
    labels = ["[data-chart='latency'] svg .mark-text text"] if PAGES[opened.name][0] else []
    assert brightness(page, "html", "backgroundColor") > 200
    for label in labels:
        assert brightness(page, label, "fill") < 100
    set_scheme(page, "dark")
    assert brightness(page, "html", "backgroundColor") < 60
    assert brightness(page, "body", "color") > 180
    for label in labels:
        assert brightness(page, label, "fill") > 150
    page.emulate_media(media="print", color_scheme="dark")
    assert brightness(page, "html", "backgroundColor") > 200
    assert brightness(page, "body", "color") < 60
    assert not page.locator("body > nav").is_visible()


def test_a_print_has_every_column_of_a_table(page: Any) -> None:
    clipped = (
        "() => [...document.querySelectorAll('.dt-scroll-body')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    )
    page.evaluate("() => { window.dispatchEvent(new Event('beforeprint')); }")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 900})
    page.wait_for_function(f"() => ({clipped})() === 0", timeout=_WAIT_MS)
    page.evaluate("() => { window.dispatchEvent(new Event('afterprint')); }")


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    set_scheme(page, scheme)
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
