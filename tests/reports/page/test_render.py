from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from rlhfreports.page.blocks import Code, Items, Section, Text, downloads, table_of
from rlhfreports.page.charts import DARK
from rlhfreports.page.data import Page, Run
from rlhfreports.page.render import columns_of, page_html, rendered, write_page
from rlhfreports.styles import COLORS
from rlhfreports.tables import ReportTable


def decoded(column: Any) -> list[Any]:
    return [column["values"][code] for code in column["codes"]] if isinstance(column, Mapping) else column


def test_columns_are_json_without_absent_or_infinite_numbers() -> None:
    frame = pd.DataFrame(
        {
            "text": pd.array(["a", None, "a", "a"], dtype="string"),
            "whole": pd.array([1, None, 3, 4], dtype="Int64"),
            "number": [1.23456789, float("nan"), float("inf"), 1.0],
            "flag": [True, False, True, True],
        }
    )
    found = columns_of(frame)
    assert found["text"] == {"values": ["a", None], "codes": [0, 1, 0, 0]}
    assert decoded(found["whole"]) == [1, None, 3, 4]
    assert decoded(found["number"]) == [1.23457, None, None, 1.0]
    assert decoded(found["flag"]) == [True, False, True, True]
    json.dumps(found, allow_nan=False)


def test_values_that_are_equal_but_of_two_types_stay_apart() -> None:
    column = columns_of(pd.DataFrame({"x": pd.Series([1, True, 1, True, 1, True], dtype="object")}))["x"]
    assert [type(value) for value in decoded(column)] == [int, bool] * 3


def test_a_page_is_one_file_without_addresses_that_load(make_run: Callable[..., Run], rows: tuple[Any, ...]) -> None:
    html = page_html(Page.of([make_run(*rows)]))
    assert len(html.encode()) < 6_000_000
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", html)
    # Data, specifications, files, two libraries and the page's own script: no library ends its element early.
    assert html.count("</script>") == 6


def test_blocks_are_escaped() -> None:
    hostile = "<b>&"
    section = Section(
        id="s",
        title=hostile,
        blocks=[Text(text=hostile), Items(items=[hostile], title=hostile), Code(title=hostile, text=hostile)],
    )
    html = rendered(hostile, [hostile], [section])
    body = html[html.index("<body") : html.index('<script type="application/json"')]
    assert "<b>" not in body
    assert body.count("&lt;b&gt;&amp;") == 9


def test_a_page_depends_on_its_runs_alone(make_run: Callable[..., Run], rows: tuple[Any, ...]) -> None:
    assert page_html(Page.of([make_run(*rows)])) == page_html(Page.of([make_run(*rows)]))


def test_a_page_is_written_whole(make_run: Callable[..., Run], tmp_path: Any) -> None:
    path = write_page(Page.of([make_run({})]), tmp_path / "index.html")
    assert path.read_text().rstrip().endswith("</html>")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index.html"]


def test_downloads_are_the_table_as_csv_markdown_and_latex() -> None:
    cells = pd.DataFrame({"method": ["a_b|c"], "total GiB": ["1.0"]})
    csv, markdown, latex = downloads("t", cells, 1, 'method,error\na,"two\nlines"\n')
    assert (csv.name, markdown.name, latex.name) == ("t.csv", "t.md", "t.tex")
    assert (csv.head, csv.rows, csv.foot) == ("method,error\n", ['a,"two\nlines"\n'], "")
    assert markdown.head.count("\n") == 2
    assert markdown.rows == ["| a_b\\|c   |         1.0 |\n"]
    assert latex.head.startswith(r"\begin{tabular}{lr}")
    assert latex.rows == ["a\\_b|c & 1.0 \\\\\n"]
    assert latex.foot == "\\bottomrule\n\\end{tabular}\n"


def test_a_line_end_in_a_cell_breaks_no_row_of_a_download() -> None:
    cells = pd.DataFrame({"method": ["a\nb", "c"], "GiB": ["1", "2"]})
    for file in downloads("t", cells, 1, cells.to_csv(index=False)):
        assert len(file.rows) == 2, file.name
        assert "c" in file.rows[1]


def test_a_table_without_rows_has_downloads_without_rows() -> None:
    for file in downloads("t", pd.DataFrame({"method": []}), 1, "method\n"):
        assert (list(file.rows), file.head.strip() + file.foot.strip() != "") == ([], True), file.name


def test_every_colour_can_be_told_from_the_background_in_dark_mode() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    background = luminance("#16191C")
    for color in COLORS:
        contrast = (luminance(DARK[color]) + 0.05) / (background + 0.05)
        assert contrast >= 3, color  # WCAG's least for graphics
    assert len(set(DARK.values())) == len(DARK)


def test_every_cell_of_a_column_of_numbers_says_what_it_is_sorted_by() -> None:
    texts = ["OOM", "9.5", "10.25", "<0.001", "–", "1.26x (1.21 to 1.31)", "1,024", "≥8", "-3 %", "1.2e-05", "1.23e+03"]
    cells = pd.DataFrame({"method": ["1"] * len(texts), "number": texts})
    made = ReportTable(caption="t", cells=cells, num_text_columns=1, explanation="", frame=cells)
    table = table_of(made, name="t")
    assert [row[1].order for row in table.rows] == [None, 9.5, 10.25, 0.001, None, 1.26, 1024, 8, -3, 1.2e-05, 1230]
    html = rendered("t", "", [Section(id="s", title="s", blocks=[table])])
    # One cell without it in the first row would make the whole column text, in which 10 comes before 9.
    orders = re.findall(r'<td class="number" data-order="([^"]*)">', html)
    assert orders == ["", "9.5", "10.25", "0.001", "", "1.26", "1024.0", "8.0", "-3.0", "1.2e-05", "1230.0"]


def test_text_that_turns_the_direction_of_writing_turns_none() -> None:
    section = Section(id="s", title="T", blocks=[Text(text="a \u202e model \u2066")])
    html = rendered("run \u202e", ["caption \u202d"], [section])
    assert not set(html) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    assert "a \ufffd model \ufffd" in html
