"""Shared by the verbs: exit codes, options of several verbs and their parsers, and printing."""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rlhfbench.errors import RunFolderError, SweepError
from rlhfkernels.config.case import Case
from rlhfkernels.config.rules import shown

if TYPE_CHECKING:
    from rich.console import RenderableType


DONE, NO, WRONG, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = "Exit codes: 0 done, 2 the command is wrong, 3 nothing could be measured, 130 interrupted."
READING_CODES = "Exit codes: 0 done, 2 the command is wrong, 130 interrupted."

CASES, HARDWARE = "Cases", "Device and weights"

_MAX_INTEGER = 2**64
_PIPE_CHARS, MAX_TEXT_CHARS = 200, 100
CASE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Case)}


class SectionedCommand(TyperCommand):
    """A command whose plain help lists its options in sections, one for each ``rich_help_panel``.

    typer draws panels with rich only, whose import takes a fifth of a second.
    """

    def sections(self, ctx: Any) -> dict[str, list[tuple[str, str]]]:
        """Returns flags and meanings by the title of their section, in the order of their first option."""
        found: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                section = "Arguments" if param.param_type_name == "argument" else "Other"
                found.setdefault(getattr(param, "rich_help_panel", None) or section, []).append(row)
        return found

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the sections."""
        for title, rows in self.sections(ctx).items():
            with formatter.section(title):
                formatter.write_dl(rows)


def epilog(*examples: str, codes: str = EXIT_CODES) -> str:
    r"""The end of a verb's help: examples and exit codes. ``\b`` keeps click from joining the lines."""
    return "\b\nExamples:\n" + "".join(f"  {example}\n" for example in examples) + f"\n{codes}"


def number(flag: str, kind: type[int] | type[float]) -> Callable[[Any], int | float]:
    """The parser of a numeric option. typer's own message names the flag and not the value."""

    def parse(text: Any) -> int | float:
        rule = "an integer" if kind is int else "a number"
        try:
            value = kind(text)
        except ValueError:  # also for integers of more digits than Python converts
            raise SweepError([f"{flag} is {shown(text)}: it must be {rule}."]) from None
        if kind is int and abs(value) > _MAX_INTEGER:
            raise SweepError([f"{flag} is {shown(value)}: it must be {rule} of at most 64 bits."])
        return value

    return parse


def path_text(flag: str) -> Callable[[Any], str]:
    """The parser of an option that names a folder or a file. An empty one is most likely a variable that is not set."""

    def parse(text: Any) -> str:
        if not text:
            raise SweepError([f"{flag} is '': it must name a folder or a file."])
        return str(text)

    return parse


def name_text(flag: str) -> Callable[[Any], str]:
    """The parser of an option that names something other than a path. An empty one would act as if it was not given."""

    def parse(text: Any) -> str:
        if not text:
            raise SweepError([f"{flag} is '': it must not be empty; is a variable not set?"])
        return str(text)

    return parse


def check_options(flags: Mapping[str, tuple[str, Any]], options: Mapping[str, Any]) -> None:
    """Checks that no flag says something else than ``--option`` says of the same option.

    Args:
        flags: the option's dotted name and its value, by the flag; ``None`` where the flag is not given.
        options: values by dotted name, from ``--option``.

    Raises:
        SweepError: one does.
    """
    problems = [
        f"{flag} is {shown(value)} and --option {name} is {shown(options[name])}: give one of the two."
        for flag, (name, value) in flags.items()
        if value is not None and name in options and options[name] != value
    ]
    if problems:
        raise SweepError(problems)


# Every default is None: an option that is given wins over a sweep file, and over a setting.
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=CASES,
        help="Preset, checkpoint folder, .gguf file or Hugging Face model id.  [default: tiny]",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=HARDWARE,
        help=f"cpu, cuda or cuda:N.  [default: {CASE_DEFAULTS['device']}; plan: cuda]",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=HARDWARE,
        help=f"float32, bfloat16 or float64.  [default: {CASE_DEFAULTS['dtype']}]",
    ),
]


def given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value not in (None, {})}


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the block as Ctrl-C does, so that what it began is ended and what it has is kept."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def needing_packages(what: str) -> Iterator[None]:
    """Names a package that only drawing needs and that is missing, as in a source tree that no installer has checked.

    Args:
        what: what the block draws.

    Raises:
        RunFolderError: a package is missing.
    """
    try:
        yield
    except ImportError as error:  # pandas raises no ModuleNotFoundError for tabulate
        raise RunFolderError(f"{what} cannot be drawn: {' '.join(str(error).split()).removesuffix('.')}.") from error


def draw(run_dir: Path, **how: Any) -> RenderableType:
    """Draws a run into its folder and returns its tables; arguments as ``rlhfbench.runs.drawing.draw_run``.

    Raises:
        RunFolderError: the folder cannot be written, or a package is missing.
    """
    from rlhfbench.runs.drawing import draw_run

    try:
        with needing_packages(f"run '{run_dir}'"):
            return draw_run(run_dir, **how)
    except OSError as error:
        raise RunFolderError(f"run '{run_dir}' cannot be drawn: {error.strerror}.") from error


def print_table(table: RenderableType) -> None:
    """Prints a table in the form that fits the terminal, or 200 columns in a pipe or a file."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _PIPE_CHARS).print(table)


def text_chars() -> int:
    """Width of running text: that of the terminal, at most 100."""
    return min(shutil.get_terminal_size().columns, MAX_TEXT_CHARS) if sys.stdout.isatty() else MAX_TEXT_CHARS


def fill(text: str, indent: str = "", *, hanging: str | None = None) -> str:
    """Wraps ``text`` to the width of running text. ``hanging`` indents all lines but the first."""
    return textwrap.fill(
        text,
        text_chars(),
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False,
    )


def words(text: str | None) -> list[str] | None:
    """The words that commas join."""
    return None if text is None else [word.strip() for word in text.split(",")]


def numbers(flag: str, text: str | None) -> list[int] | None:
    """The integers that commas join, of the option ``flag``."""
    found = words(text)
    wrong = [word for word in found or () if not re.fullmatch(r"[+-]?[0-9]{1,1000}", word)]
    if wrong:
        raise SweepError(f"{flag} has {shown(word)}: it must list integers, joined by commas." for word in wrong)
    return None if found is None else [int(word) for word in found]
