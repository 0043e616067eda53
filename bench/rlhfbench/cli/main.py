"""The command line: one verb each, a user's mistake answered with one sentence and exit code 2."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cases.sizes import parse_size
from rlhfbench.cli import flags
from rlhfbench.errors import ForkServerError, RecordsError, RlhfBenchError, RunFolderError, SweepError
from rlhfkernels.errors import RlhfKernelsError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.runs.runner import RunResult, RunSettings

DONE, WRONG, NOTHING, INTERRUPTED = 0, 2, 3, 130
_MOST_TRIED = 512  # sequences; --max-batch stops there

# Plain help: rich's panels take a fifth of a second to import.
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: list[str]) -> int:
    """The exit code of ``rlhfbench`` with ``arguments``; a user's mistake is one sentence on standard error."""
    try:
        code = app(arguments, prog_name="rlhfbench", standalone_mode=False)
    except (ForkServerError, RlhfBenchError, RlhfKernelsError) as error:
        print(error, file=sys.stderr)
        return NOTHING if isinstance(error, ForkServerError) else WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `rlhfbench methods | head`
        sys.stderr.close()
        return DONE
    except Exception as error:
        # click's own errors: typer carries click inside itself, so their type is known by what it can do.
        if not hasattr(error, "format_message"):
            raise
        print(_sentence(error.format_message()), file=sys.stderr)
        return WRONG
    return code if isinstance(code, int) else DONE


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "?")) else text + "."


def _show_version(value: bool) -> None:
    if value:
        from rlhfbench import __version__

        print(f"rlhfbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What each way of training a language model from feedback costs in memory and time, and why."""


@app.command()
def run(
    model: Annotated[str | None, typer.Option(help="Preset, checkpoint folder, .gguf file or hub id.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, joined by commas.")] = None,
    seq_lens: Annotated[str | None, typer.Option(help="Prompt + completion, in tokens, joined by commas.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Sequences a step, joined by commas.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="FILE", help="A TOML sweep; flags beside it win.")] = None,
    setting: Annotated[
        str | None, typer.Option(metavar="NAMES", help="paper, modern or both; other flags win.  [default: modern]")
    ] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="JSON lines; random tokens without.")] = None,
    prompt_field: Annotated[str | None, typer.Option(help="The field that holds a prompt.  [default: prompt]")] = None,
    prompt_fraction: Annotated[
        str | None, typer.Option(metavar="N", help="The prompt's share of a sequence.  [default: 0.5]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.  [default: cpu]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.  [default: float32]")] = None,
    lora_rank: Annotated[str | None, typer.Option(metavar="N", help="Rank of the adapters.  [default: 16]")] = None,
    seed: Annotated[
        str | None, typer.Option(metavar="N", help="Of weights, prompts and samples.  [default: 0]")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option of a case; may be repeated.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="The run's folder; a new one by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Trace each phase, into DIR/traces.")] = False,
    with_plan: Annotated[
        bool, typer.Option("--with-plan", help="Predict each case's memory too, and draw both.")
    ] = False,
    time_budget_s: Annotated[str | None, typer.Option(metavar="N", help="Seconds of timing a case.")] = None,
    case_timeout_s: Annotated[
        str | None, typer.Option(metavar="N", help="When a case is ended.  [default: 600]")
    ] = None,
    memory_limit: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory a case may use: 4GiB.")] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N", help="Threads of a case; torch's choice by default.")
    ] = None,
    max_batch: Annotated[
        bool, typer.Option("--max-batch", help="Find the largest batch that runs, for every method and length.")
    ] = False,
    max_batch_limit: Annotated[
        str | None, typer.Option(metavar="N", help="The largest batch that it tries.  [default: 512]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as a JSON list.")] = False,
) -> int:
    """Run a sweep and draw its report.

    With no flag at all: five methods on a tiny model, in under three minutes.
    """
    from rlhfbench.runs import runner

    given = flags.given(
        methods=flags.words(methods),
        models=flags.words(model, joined=False),
        seq_lens=flags.numbers("seq-lens", seq_lens),
        batch_sizes=flags.numbers("batch-sizes", batch_sizes),
        prompt_fraction=flags.number("prompt-fraction", prompt_fraction, float),
        device=device,
        dtype=dtype,
        seed=flags.number("seed", seed, int),
        options=flags.options(
            option or [],
            {
                "lora.r": flags.number("lora-rank", lora_rank, int),
                "data.prompts": prompts,
                "data.prompt_field": prompt_field,
            },
        ),
    )
    settings = _settings(
        time_budget_s=flags.number("time-budget-s", time_budget_s, float),
        case_timeout_s=flags.number("case-timeout-s", case_timeout_s, float),
        num_threads=flags.number("threads", threads, int),
        memory_limit_bytes=None if memory_limit is None else parse_size("--memory-limit", memory_limit),
        profile=profile or None,
        with_plan=with_plan or None,
    )
    if resume and out is None:
        raise SweepError(["--resume needs --out: name the folder of the run to go on with."])
    out_dir = Path(out or f"rlhfbench-run-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}")
    asked = _sweep(sweep, given, setting, out_dir if resume else None)
    limit = flags.number("max-batch-limit", max_batch_limit, int)
    if limit is not None and not max_batch:
        raise SweepError(["--max-batch-limit needs --max-batch."])
    # A run that is told to end leaves the same behind as one that is interrupted from the keyboard.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if max_batch:
            most = _MOST_TRIED if limit is None else int(limit)
            return _max_batch(asked, out_dir, settings, most, resume=resume, as_json=as_json)
        result = runner.run_sweep(asked, out_dir, settings, resume=resume)
    except RecordsError as error:
        raise RecordsError(f"{error}\nTo go on: {_resume_command(out_dir)}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return _finish(result, as_json=as_json)


def _finish(result: RunResult, *, as_json: bool) -> int:
    """Draws the run, prints it, and says how it ended."""
    if result.interrupted:
        return _interrupted(result)
    table = _draw(result.run_dir)
    if as_json:
        print(json.dumps(result.records))
    else:
        _print(table)
    return _end(result)


def _interrupted(result: RunResult) -> int:
    print(f"Interrupted: {len(result.records)} cases are recorded in {result.run_dir}.", file=sys.stderr)
    print(f"To go on: {_resume_command(result.run_dir)}", file=sys.stderr)
    return INTERRUPTED


def _end(result: RunResult) -> int:
    print(f"The run is in {result.run_dir}.", file=sys.stderr)
    if not result.num_ok:
        print("Nothing could be measured: no case is ok.", file=sys.stderr)
        return NOTHING
    return DONE


def _max_batch(sweep: Sweep, out_dir: Path, settings: RunSettings, limit: int, *, resume: bool, as_json: bool) -> int:
    """Finds the largest batches, draws the run of all tries, prints what was found, and says how it ended."""
    from rlhfbench.runs.max_batch import find_max_batches, max_batch_frame

    result, found = find_max_batches(sweep, out_dir, settings, limit=limit, resume=resume)
    if result.interrupted:
        return _interrupted(result)
    _draw(result.run_dir)
    if as_json:
        print(json.dumps([item.to_dict() for item in found]))
    else:
        from rlhfreports.max_batch import max_batch_table

        _print(max_batch_table(max_batch_frame(found)))
    return _end(result)


def _draw(run_dir: Path, *, every_timeline: bool = False) -> RenderableType:
    from rlhfbench.runs.drawing import draw_run

    try:
        return draw_run(run_dir, every_timeline=every_timeline)
    except OSError as error:
        raise RunFolderError(f"run '{run_dir}' cannot be drawn: {error.strerror}.") from error


def _print(table: RenderableType) -> None:
    from rich.console import Console

    # A pipe or a file has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _resume_command(out_dir: Path) -> str:
    """This command again, with --resume and the folder that it used."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    if not any(argument == "--out" or argument.startswith("--out=") for argument in arguments):
        arguments += ["--out", str(out_dir)]
    return shlex.join(["rlhfbench", *arguments, "--resume"])


def _sweep(file: str | None, given: dict[str, Any], setting: str | None, resumed: Path | None) -> Sweep:
    """The sweep that was asked for. A resumed run that is asked for nothing is asked for its own sweep."""
    from rlhfbench.cases.sweep import SETTING_KEYS, Sweep, override, read_spec
    from rlhfbench.runs.folder import RunFolder
    from rlhfkernels.config.settings import SETTINGS

    if resumed is not None and file is None and not given and setting is None and RunFolder(resumed).is_run:
        return RunFolder(resumed).load_sweep()
    spec = read_spec(file) if file is not None else {}
    names = flags.settings(setting)
    if names is None:
        return Sweep.from_spec(override(spec, given))
    # A flag wins over the file: over its own settings, and over what else it says of what the setting sets.
    rest = {key: value for key, value in spec.items() if key not in SETTING_KEYS}
    return Sweep.joined(Sweep.from_spec(override(override(rest, SETTINGS[name]), given)) for name in names)


def _settings(**given: Any) -> RunSettings:
    from rlhfbench.runs.runner import RunSettings

    return RunSettings(**flags.given(**given))


@app.command()
def plan(
    model: Annotated[str | None, typer.Option(help="Preset, checkpoint folder, .gguf file or hub id.")] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, joined by commas.")] = None,
    seq_lens: Annotated[str | None, typer.Option(help="Prompt + completion, in tokens, joined by commas.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Sequences a step, joined by commas.")] = None,
    sweep: Annotated[str | None, typer.Option(metavar="FILE", help="A TOML sweep; flags beside it win.")] = None,
    setting: Annotated[
        str | None, typer.Option(metavar="NAMES", help="paper, modern or both; other flags win.  [default: modern]")
    ] = None,
    prompt_fraction: Annotated[
        str | None, typer.Option(metavar="N", help="The prompt's share of a sequence.  [default: 0.5]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.  [default: float32]")] = None,
    lora_rank: Annotated[str | None, typer.Option(metavar="N", help="Rank of the adapters.  [default: 16]")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Any other option of a case; may be repeated.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="An accelerator (a100-80gb) or a size: 24GiB.")
    ] = None,
    zero_stage: Annotated[str | None, typer.Option(metavar="N", help="DeepSpeed's ZeRO, 0 to 3.  [default: 0]")] = None,
    world_size: Annotated[str | None, typer.Option(metavar="N", help="Ranks that it divides.  [default: 1]")] = None,
    global_batch: Annotated[
        bool, typer.Option("--global-batch", help="Batch sizes are over all ranks; by default they are of one rank.")
    ] = False,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Where the picture and the JSON go.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as a JSON list.")] = False,
) -> int:
    """Predict memory, with no device and no weights."""
    from rlhfbench.cli import plans as plan_verb

    given = flags.given(
        methods=flags.words(methods),
        models=flags.words(model, joined=False),
        seq_lens=flags.numbers("seq-lens", seq_lens),
        batch_sizes=flags.numbers("batch-sizes", batch_sizes),
        prompt_fraction=flags.number("prompt-fraction", prompt_fraction, float),
        device="cuda",
        dtype=dtype,
        options=flags.options(option or [], {"lora.r": flags.number("lora-rank", lora_rank, int)}),
    )
    zero = flags.given(
        stage=flags.number("zero-stage", zero_stage, int), world_size=flags.number("world-size", world_size, int)
    )
    timelines: dict[str, dict[str, Any]] | None = None if out is None else {}
    plans = plan_verb.make_plans(
        _sweep(sweep, given, setting, None), gpu=gpu, zero=zero, global_batch=global_batch, timelines=timelines
    )
    if as_json:
        print(json.dumps(plans))
    else:
        _print(plan_verb.table(plans, gpu))
        for sentence in plan_verb.advice(plans):
            print(sentence)
    if out is not None:
        plan_verb.write(plans, gpu, Path(out), timelines)
    return DONE


@app.command()
def report(run_dir: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Draw a run again, from its records alone."""
    from rlhfbench.records.file import read_records

    if not read_records(run_dir):
        raise RecordsError(f"run '{run_dir}' holds no records yet: there is nothing to draw.")
    _print(_draw(Path(run_dir), every_timeline=True))


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Show the methods: their role tables, and what follows from them."""
    from rlhfkernels.methods.table import METHODS

    rows = [_method_row(name) for name in METHODS]
    if as_json:
        print(json.dumps(rows))
        return
    print("A weight set is base or base+adapter; what is trained stands in brackets.\n")
    for row in rows:
        print(f"{row['name']} ({row['title']}): bases loaded: {row['num_bases']}, LoRA sets: {row['num_adapter_sets']}")
        for role, spec in row["roles"].items():
            weights = spec["base"] + (f"+{spec['adapter']}" if spec["adapter"] else "")
            trains = f" [{', '.join(spec['trains'])}]" if spec["trains"] else ""
            print(f"  {role:<10} {weights:<16} {spec['head']} head{trains}")
        print(f"  {'phases':<10} {', '.join(phase['name'] for phase in row['phases'])}\n")


def _method_row(name: str) -> dict[str, Any]:
    from rlhfkernels.methods.table import METHODS

    method = METHODS[name]
    return {
        "name": method.name,
        "title": method.title,
        "num_bases": method.num_static_models,
        "num_adapter_sets": len(method.adapter_sets),
        "roles": {
            role: {"base": spec.base, "adapter": spec.adapter, "head": spec.head, "trains": sorted(spec.trains)}
            for role, spec in method.roles.items()
        },
        "phases": [dataclasses.asdict(phase) for phase in method.phases],
    }


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Show the model presets. A checkpoint folder, a .gguf file or a hub id can be named in their place."""
    from rlhfkernels.models.presets import PRESETS

    if as_json:
        print(json.dumps([dataclasses.asdict(preset) for preset in PRESETS.values()]))
        return
    width = max(map(len, PRESETS))
    for preset in PRESETS.values():
        print(f"{preset.name:<{width}}  {preset.model_type:<9} {preset.max_positions:>6} positions  {preset.source}")
