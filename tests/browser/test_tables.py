"""Tables of the page in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from rlhfreports.page.blocks import Section, table_of
from rlhfreports.page.render import rendered
from rlhfreports.tables import ReportTable

_WAIT_MS = 60_000


def test_numbers_of_several_digits_sort_beside_cases_without_one(browser: Any, expect: Any, tmp_path: Path) -> None:
    cells = pd.DataFrame({"method": list("abcde"), "seconds": ["OOM", "9.5", "10.25", "<0.001", "–"]})
    table = ReportTable(caption="times", cells=cells, num_text_columns=1, explanation="", frame=cells)
    section = Section(id="section", title="Times", blocks=[table_of(table, name="times")])
    (tmp_path / "index.html").write_text(rendered("a run", [], [section]), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_selector("html[data-ready=true]", timeout=_WAIT_MS)
    order = page.locator("#times_wrapper .dt-scroll-head th", has_text="seconds").locator("button.dtcc-button_order")
    shown = page.locator("#times tbody td:nth-child(2)")
    order.click()
    expect(shown).to_have_text(["OOM", "–", "<0.001", "9.5", "10.25"])
    order.click()
    expect(shown).to_have_text(["10.25", "9.5", "<0.001", "–", "OOM"])
    page.close()


def test_a_print_has_every_row_and_the_screen_its_page_again(browser: Any, expect: Any, tmp_path: Path) -> None:
    cells = pd.DataFrame({"method": [f"m{i}" for i in range(60)], "seconds": ["1"] * 60})
    table = ReportTable(caption="times", cells=cells, num_text_columns=1, explanation="", frame=cells)
    section = Section(id="section", title="Times", blocks=[table_of(table, name="times")])
    (tmp_path / "index.html").write_text(rendered("a run", [], [section]), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    page.wait_for_selector("html[data-ready=true]", timeout=_WAIT_MS)
    rows = page.locator("#times tbody tr")
    expect(rows).to_have_count(50)
    for event, num_rows in (("beforeprint", 60), ("afterprint", 50)):
        page.evaluate("(name) => { window.dispatchEvent(new Event(name)); }", event)
        expect(rows).to_have_count(num_rows)
    page.close()
