"""The options that define cases, and the sweep made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli.common import (
    CASE_DEFAULTS,
    CASES,
    HARDWARE,
    Device,
    Dtype,
    Model,
    check_options,
    given,
    name_text,
    number,
    numbers,
    path_text,
    words,
)
from rlhfbench.errors import SweepError
from rlhfkernels.config.options import DataOptions, LoraOptions
from rlhfkernels.config.rules import shown
from rlhfkernels.naming import unknown

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep

MODEL_INPUT = "Training data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """The options that define cases. ``None`` is an option that is not given."""

    model: Model = None
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=CASES,
            help="Methods and families, joined by commas, or all.  [default: ppo]",
        ),
    ] = None
    seq_lens: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            rich_help_panel=CASES,
            help="Sequence lengths in tokens: a prompt and its completion.  [default: 32,64,128; gate: 32]",
        ),
    ] = None
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            metavar="N,...", rich_help_panel=CASES, help="Data rows in one training step.  [default: 1,4; gate: 2]"
        ),
    ] = None
    sweep: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=path_text("--sweep"),
            rich_help_panel=CASES,
            help="Sweep in TOML; other options override it.",
        ),
    ] = None
    setting: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            parser=name_text("--setting"),
            rich_help_panel=CASES,
            help="Named sets of options: modern, paper, or paper,modern for both; other options override them."
            "  [default: modern]",
        ),
    ] = None
    prompt_fraction: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--prompt-fraction", float),
            rich_help_panel=CASES,
            help="Share of the prompt in a sequence.  [default: 0.5]",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--seed", int),
            rich_help_panel=CASES,
            help=f"Seed of weights, data and samples.  [default: {CASE_DEFAULTS['seed']}]",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            rich_help_panel=CASES,
            help="Any other option, such as ppo.kl_coef=0.05; may be repeated. See methods --options.",
        ),
    ] = None
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", rich_help_panel=MODEL_INPUT, help="Prompts in JSON lines; random tokens by default."
        ),
    ] = None
    prompt_field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MODEL_INPUT,
            help=f"Field of a row that holds the prompt.  [default: {DataOptions().prompt_field}]",
        ),
    ] = None
    demonstrations: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=MODEL_INPUT,
            help="Prompts and completions in JSON lines; random by default.",
        ),
    ] = None
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=MODEL_INPUT,
            help="Preferences in JSON lines: prompt, chosen, rejected; random by default.",
        ),
    ] = None
    device: Device = None
    dtype: Dtype = None
    lora_rank: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--lora-rank", int),
            rich_help_panel=HARDWARE,
            help=f"Rank of the adapters.  [default: {LoraOptions().r}]",
        ),
    ] = None

    def spec(self) -> dict[str, Any]:
        """Returns the sweep spec of what was given, without ``sweep`` and ``setting``.

        Raises:
            SweepError: a list of numbers or a ``KEY=VALUE`` is malformed; no such option exists; or a flag and
                ``--option`` contradict each other.
        """
        from rlhfbench.cases.spec import parse_option

        named = {
            "--lora-rank": ("lora.r", self.lora_rank),
            "--prompts": ("data.prompts", self.prompts),
            "--prompt-field": ("data.prompt_field", self.prompt_field),
            "--demonstrations": ("data.demonstrations", self.demonstrations),
            "--pairs": ("data.pairs", self.pairs),
        }
        pairs = list(map(parse_option, self.option or ()))
        options = dict(pairs)
        unlike = [(name, value) for name, value in pairs if value != options[name]]
        if unlike:
            raise SweepError(
                f"--option {name} is {shown(value)} and {shown(options[name])}: give one, or a list in a sweep file."
                for name, value in unlike
            )
        check_options(named, options)
        if self.prompt_field is not None and self.prompts is self.sweep is None and "data.prompts" not in options:
            raise SweepError([f"--prompt-field is {shown(self.prompt_field)}: it needs --prompts FILE."])
        return given(
            methods=words(self.methods),
            models=None if self.model is None else [self.model],
            seq_lens=numbers("--seq-lens", self.seq_lens),
            batch_sizes=numbers("--batch-sizes", self.batch_sizes),
            prompt_fraction=self.prompt_fraction,
            device=self.device,
            dtype=self.dtype,
            seed=self.seed,
            options=options | given(**dict(named.values())),
        )


def make_sweep(
    spec: Mapping[str, Any], file: str | None, setting: str | None, *, defaults: Mapping[str, Any] | None = None
) -> Sweep:
    """The sweep of the options of a verb.

    Args:
        spec: from ``CaseOptions.spec``; wins over ``file`` and over settings.
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
