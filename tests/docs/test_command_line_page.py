"""``docs/command-line.md`` is current. ``python tests/docs/test_command_line_page.py`` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer

from rlhfbench.cli.common import SectionedCommand
from rlhfbench.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
HEAD = """# Command line

`rlhfbench VERB --help` prints the same, with examples. `N,...` stands for one value or several, joined by commas. The
[exit codes](getting-started.md#exit-codes) of all verbs are alike.
"""

Rows = list[tuple[str, str]]


def test_the_command_line_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == command_line_page(), "run python tests/docs/test_command_line_page.py"


def command_line_page() -> str:
    """The text of the page."""
    group = typer.main.get_group(app)
    written: dict[str, tuple[str, Rows]] = {}  # by title: the last verb that has such a section, and its rows
    lines = (line for name, verb in group.commands.items() for line in _verb(name, verb, written))
    return "\n".join([HEAD, *lines])


def _verb(name: str, verb: SectionedCommand, written: dict[str, tuple[str, Rows]]) -> Iterator[str]:
    yield f"## `{name}`\n\n{(verb.help or '').strip()}\n"
    for title, all_rows in verb.sections(typer.Context(verb)).items():
        # typer decorates the name of an argument as its version likes.
        rows = [(flags.split()[0], said) for flags, said in all_rows] if title == "Arguments" else all_rows
        rows = [row for row in rows if row[0] != "--help"]
        if not rows:
            continue
        elsewhere, same = written.setdefault(title, (name, rows))
        if elsewhere != name and same == rows:
            yield f"{title}: as for [`{elsewhere}`](#{elsewhere}).\n"
        else:
            yield f"| {title} | |\n| --- | --- |"
            yield from (f"| `{_cell(flags)}` | {_cell(meaning)} |" for flags, meaning in rows)
            yield ""


def _cell(text: str) -> str:
    """``text`` inside one cell of a table."""
    return " ".join(text.split()).replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(command_line_page(), encoding="utf-8")
