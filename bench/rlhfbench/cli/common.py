"""Shared by the verbs: exit codes, the options that define cases, and the sweep made from them."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from rlhfbench.errors import RunFolderError, SweepError
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import DataOptions, LoraOptions
from rlhfkernels.config.rules import shown
from rlhfkernels.naming import unknown

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rlhfbench.cases.sweep import Sweep

DONE, NO, WRONG, NOTHING, INTERRUPTED = 0, 1, 2, 3, 130
EXIT_CODES = "Exit codes: 0 done, 2 the command is wrong, 3 nothing could be measured, 130 interrupted."
READING_CODES = "Exit codes: 0 done, 2 the command is wrong, 130 interrupted."

CASES, MODEL_INPUT, HARDWARE = "Cases", "Training data", "Device and weights"

_MAX_INTEGER = 2**64
_PIPE_CHARS, MAX_TEXT_CHARS = 200, 100
_CASE_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Case)}


class SectionedCommand(TyperCommand):
    """A command whose plain help lists its options in sections, one for each ``rich_help_panel``.

    typer draws panels with rich only, whose import takes a fifth of a second.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the sections in the order of their first option."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                section = "Arguments" if param.param_type_name == "argument" else "Other"
                sections.setdefault(getattr(param, "rich_help_panel", None) or section, []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def epilog(*examples: str, codes: str = EXIT_CODES) -> str:
    r"""The end of a verb's help: examples and exit codes. ``\b`` keeps click from joining the lines."""
    return "\b\nExamples:\n" + "".join(f"  {example}\n" for example in examples) + f"\n{codes}"


def number(flag: str, kind: type[int] | type[float]) -> Callable[[Any], int | float]:
    """The parser of a numeric option. typer's own message names the flag and not the value."""

    def parse(text: Any) -> int | float:
        rule = "a whole number" if kind is int else "a number"
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


# Every default is None: an option that is given wins over a sweep file, and over a setting.
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=CASES, help="Preset, checkpoint folder, .gguf file or hub id.  [default: tiny]"
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", rich_help_panel=CASES, help="Methods and families, joined by commas, or all.  [default: ppo]"
    ),
]
SeqLens = Annotated[
    str | None,
    typer.Option(
        metavar="N,...",
        rich_help_panel=CASES,
        help="Sequence lengths in tokens: a prompt and its completion.  [default: 32,64,128; gate: 32]",
    ),
]
BatchSizes = Annotated[
    str | None,
    typer.Option(
        metavar="N,...", rich_help_panel=CASES, help="Data rows in one training step.  [default: 1,4; gate: 2]"
    ),
]
SweepFile = Annotated[
    str | None,
    typer.Option("--sweep", metavar="FILE", rich_help_panel=CASES, help="Sweep in TOML; other options win over it."),
]
Setting = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        rich_help_panel=CASES,
        help="Named options: paper, modern or both; other options win.  [default: modern]",
    ),
]
PromptFraction = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        parser=number("--prompt-fraction", float),
        rich_help_panel=CASES,
        help="Share of the prompt in a sequence.  [default: 0.5]",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=number("--seed", int),
        rich_help_panel=CASES,
        help=f"Seed of weights, data and samples.  [default: {_CASE_DEFAULTS['seed']}]",
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        rich_help_panel=CASES,
        help="Any other option, such as ppo.kl_coef=0.05; may be repeated. See methods --options.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=MODEL_INPUT, help="Prompts in JSON lines; random tokens by default."),
]
PromptField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL_INPUT,
        help=f"Field of a row that holds the prompt.  [default: {DataOptions().prompt_field}]",
    ),
]
Demonstrations = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=MODEL_INPUT, help="Prompts and completions in JSON lines; random by default."
    ),
]
Pairs = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=MODEL_INPUT,
        help="Preferences in JSON lines: prompt, chosen, rejected; random by default.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=HARDWARE,
        help=f"cpu, cuda or cuda:N.  [default: {_CASE_DEFAULTS['device']}; plan: cuda]",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=HARDWARE,
        help=f"float32, bfloat16 or float64.  [default: {_CASE_DEFAULTS['dtype']}]",
    ),
]
LoraRank = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=number("--lora-rank", int),
        rich_help_panel=HARDWARE,
        help=f"Rank of the adapters.  [default: {LoraOptions().r}]",
    ),
]


def given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value not in (None, {})}


def case_spec(params: Mapping[str, Any]) -> dict[str, Any]:
    """The sweep spec of the options above.

    Args:
        params: the parameters of a verb by name, as in ``typer.Context.params``.

    Raises:
        SweepError: a list of numbers or a ``KEY=VALUE`` is malformed; or no such option exists.
    """
    from rlhfbench.cases.spec import parse_option

    named = {
        "lora.r": params["lora_rank"],
        "data.prompts": params["prompts"],
        "data.prompt_field": params["prompt_field"],
        "data.demonstrations": params["demonstrations"],
        "data.pairs": params["pairs"],
    }
    return given(
        methods=words(params["methods"]),
        models=None if params["model"] is None else [params["model"]],
        seq_lens=numbers("--seq-lens", params["seq_lens"]),
        batch_sizes=numbers("--batch-sizes", params["batch_sizes"]),
        prompt_fraction=params["prompt_fraction"],
        device=params["device"],
        dtype=params["dtype"],
        seed=params["seed"],
        options=dict(map(parse_option, params["option"] or ())) | given(**named),
    )


def make_sweep(
    spec: Mapping[str, Any], file: str | None, setting: str | None, *, defaults: Mapping[str, Any] | None = None
) -> Sweep:
    """The sweep of the options of a verb.

    Args:
        spec: from ``case_spec``; wins over ``file`` and over settings.
        file: a sweep in TOML.
        setting: names of settings, joined by commas. They win over the settings that ``file`` names, and over what
            ``file`` says about the same options.
        defaults: a spec; ``file`` wins over it.

    Raises:
        SweepError: every problem, one sentence each.
    """
    from rlhfbench.cases.spec import SETTING_KEYS, override, read_spec
    from rlhfbench.cases.sweep import Sweep
    from rlhfkernels.config.settings import SETTINGS

    in_file = read_spec(file) if file is not None else {}
    in_file = override(defaults, in_file) if defaults else in_file
    names = words(setting)
    if names is None:
        return Sweep.from_spec(override(in_file, spec))
    wrong = [unknown("setting", name, SETTINGS) for name in names if name not in SETTINGS]
    if wrong:
        raise SweepError(wrong)
    rest = {key: value for key, value in in_file.items() if key not in SETTING_KEYS}
    return Sweep.joined(
        Sweep.from_spec(override(override(rest, SETTINGS[name]), spec)) for name in dict.fromkeys(names)
    )


def draw(run_dir: Path, **how: bool) -> RenderableType:
    """Draws a run into its folder and returns its tables. See ``rlhfbench.runs.drawing.draw_run``, which takes ``how``.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    from rlhfbench.runs.drawing import draw_run

    try:
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
    """The whole numbers that commas join, of the option ``flag``."""
    found = words(text)
    wrong = [word for word in found or () if not re.fullmatch(r"[+-]?[0-9]{1,1000}", word)]
    if wrong:
        raise SweepError(f"{flag} has {shown(word)}: it must be whole numbers, joined by commas." for word in wrong)
    return None if found is None else [int(word) for word in found]
