"""``rlhfbench gate``: did a change make a step slower or larger."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhfbench.cli import common
from rlhfbench.cli.cases import CaseOptions, make_sweep
from rlhfbench.cli.common import ended_by_sigterm, epilog, name_text, number, path_text
from rlhfbench.cli.gate_output import Output, progress
from rlhfbench.cli.groups import with_groups
from rlhfbench.errors import GateError
from rlhfbench.files import check_writable
from rlhfbench.launch import refuse_launcher

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.gate.compare import GateOptions
    from rlhfbench.gate.findings import Finding

COMPARED, JUDGEMENT, OUTPUT = "What is compared", "Judgement", "Output"
EPILOG = epilog(
    "rlhfbench gate --base main",
    "rlhfbench gate --base v1.2 --step mytrainer.bench:make_step",
    "rlhfbench gate --baseline runs/baseline --memory-only",
    "rlhfbench gate --self-test --seq-lens 64 --batch-sizes 2",
    codes="Exit codes: 0 no regression, 1 a regression, 2 the command is wrong, 3 it cannot tell, 130 interrupted.",
)
# The cases without any option: the PPO methods at one size that takes a tenth of a second a step.
SMALL: dict[str, Any] = {"seq_lens": [32], "batch_sizes": [2]}
# So that a slow step can be compared at all: a pair has at least ten steps.
_TIMEOUT_PER_BUDGET = 10


@with_groups
def gate(
    *,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="REV",
            parser=name_text("--base"),
            rich_help_panel=COMPARED,
            help="Revision that the working tree is compared with.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            parser=path_text("--baseline"),
            rich_help_panel=COMPARED,
            help="Folder of a stored run to compare with.",
        ),
    ] = None,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", rich_help_panel=COMPARED, help="Store the new run as --baseline.")
    ] = False,
    memory_only: Annotated[
        bool, typer.Option("--memory-only", rich_help_panel=COMPARED, help="With --baseline, judge memory alone.")
    ] = False,
    self_test: Annotated[
        bool,
        typer.Option(
            "--self-test",
            rich_help_panel=COMPARED,
            help="Compare the working tree with itself, with and without faults, and print what the gate can promise.",
        ),
    ] = False,
    bisect: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="GOOD BAD", rich_help_panel=COMPARED, help="Find the first commit after GOOD with a regression."
        ),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            rich_help_panel=COMPARED,
            help="Function that returns your own step in place of a method's: called with each case.",
        ),
    ] = None,
    cases: CaseOptions,
    smallest_effect: Annotated[
        float,
        typer.Option(
            metavar="X",
            parser=number("--smallest-effect", float),
            rich_help_panel=JUDGEMENT,
            help="Relative change that counts: slower or faster only if the whole 95 % interval lies beyond it.",
        ),
    ] = 0.02,
    promised_effect: Annotated[
        float,
        typer.Option(
            metavar="X",
            parser=number("--promised-effect", float),
            rich_help_panel=JUDGEMENT,
            help="Relative change that must not be missed: same only if the interval excludes it.",
        ),
    ] = 0.05,
    budget_s: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            parser=number("--budget-s", float),
            rich_help_panel=JUDGEMENT,
            help="Seconds per case, both sides together, after which an ambiguous answer stands.  [default: 60]",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            parser=number("--threads", int),
            rich_help_panel=JUDGEMENT,
            help="Threads of torch in a case.  [default: the physical cores, but at least one core is left free]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            parser=path_text("--out"),
            rich_help_panel=OUTPUT,
            help="Keep the runs of both sides in this folder.",
        ),
    ] = None,
    summary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            parser=path_text("--summary"),
            rich_help_panel=OUTPUT,
            help="Write the table to this file too.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print everything as JSON.")] = False,
) -> int:
    """Tell whether a change made a step slower or larger.

    Two revisions take their steps in turns, in fresh processes on this machine, until the answer is clear or the time
    is spent. Without options for cases: the PPO methods on a tiny model at one small size.
    """
    refuse_launcher("rlhfbench gate")
    if sum(map(bool, (base, baseline, self_test, bisect))) != 1:
        raise GateError("one of --base, --baseline, --self-test and --bisect must be given, and only one.")
    if (update_baseline or memory_only) and not baseline:
        raise GateError("--update-baseline and --memory-only need --baseline RUN.")
    spec = cases.spec()
    is_new = bool(baseline and update_baseline and not any(Path(baseline).glob("*")))
    if step and baseline:
        raise GateError("--step needs --base, --bisect or --self-test.")
    if baseline and not is_new and (spec or cases.sweep or cases.setting or threads):
        raise GateError("--baseline takes no cases and no --threads: they are those of the stored run.")
    if baseline and budget_s is not None:
        raise GateError("--baseline takes no --budget-s: each side is one run, and takes as long as that run.")
    output = Output(summary=summary, as_json=as_json, out=out)
    output.check()
    if baseline and update_baseline:
        check_writable("baseline", Path(baseline))
        # What is stored replaces the files of the folder, and would replace those of the new run with them.
        if out is not None and Path(out).resolve().is_relative_to(Path(baseline).resolve()):
            raise GateError(f"--out '{out}' lies in --baseline '{baseline}': name another folder, or leave it out.")
    from rlhfbench.cases.preflight import check_devices
    from rlhfbench.runs import environment

    environment.check_system()  # first: the gate imports modules that Windows lacks
    from rlhfbench.gate import sides

    options = _options(smallest_effect, promised_effect, budget_s, threads, step)
    # However it ends, processes and folders are removed.
    with ended_by_sigterm(), sides.only_gate(), sides.temporary_folder() as temporary:
        folder = temporary / "runs" if out is None else Path(out)
        if baseline and not is_new:
            return _against_run(
                Path(baseline), folder, options, output, update=update_baseline, memory_only=memory_only
            )
        small = {**SMALL, "methods": ["full"]} if step else SMALL  # the method only names a user's own step
        sweep = make_sweep(spec if cases.sweep else {**small, **spec}, cases.sweep, cases.setting)
        if step:
            check_devices(sweep)  # of methods, more is checked
        if baseline:
            return _first_baseline(Path(baseline), sweep, folder, options, output)
        if self_test:
            return _self_test(sweep, folder, options, output)
        if bisect:
            return _bisect(bisect, sweep, folder, options, output)
        assert base is not None
        root = sides.repository()
        roots = sides.module_roots(root, with_working_folder=step is not None)
        head = sides.head_side(root, roots, step=step)
        note = sides.sameness(base, root)  # before --out may lie in the working tree
        with sides.unedited(root, roots), sides.checked_out(base, root, "base", roots, step=step) as other:
            findings = _compare(other, head, sweep, folder, options)
        return output.finish(findings, other.title, head.title, note=note)


def _options(
    smallest: float, promised: float, budget_s: float | None, threads: int | None, step: str | None
) -> GateOptions:
    from rlhfbench.gate.compare import GateOptions
    from rlhfbench.gate.decide import Effects

    for name, value in (("--smallest-effect", smallest), ("--promised-effect", promised)):
        if not 0 < value < 10:
            raise GateError(f"{name} is {value:g}: it must be above 0 and below 10.")
    if promised <= smallest:
        raise GateError(f"--promised-effect is {promised:g}: it must be above --smallest-effect, {smallest:g}.")
    if budget_s is not None and not 4 <= budget_s <= 1e6:
        raise GateError(f"--budget-s is {budget_s:g}: it must be from 4, for four pairs of blocks, to 1000000.")
    if threads is not None and not 1 <= threads <= 1024:
        raise GateError(f"--threads is {threads}: it must be from 1 to 1024.")
    if step is not None and not all(step.partition(":")):
        raise GateError(f"--step is '{step}': it must be MODULE:FUNCTION.")
    module = (step or "").partition(":")[0]
    if "/" in module or module.startswith(".") or module.endswith(".py"):
        raise GateError(f"--step is '{step}': its module must be named as in an import, such as mytrainer.bench.")
    effects = Effects(smallest=smallest, promised=promised)
    options = GateOptions(effects=effects, num_threads=threads, step=step)
    if budget_s is None:
        return options
    timeout_s = max(options.case_timeout_s, min(_TIMEOUT_PER_BUDGET * budget_s, 1e6))
    return dataclasses.replace(options, budget_s=budget_s, case_timeout_s=timeout_s)


def _compare(base: Any, head: Any, cases: Sweep, folder: Path, options: GateOptions) -> list[Finding]:
    from rlhfbench.gate.compare import Comparison

    return Comparison(base, head, cases, folder, options, progress).run()


def _self_test(cases: Sweep, folder: Path, options: GateOptions, output: Output) -> int:
    from rlhfbench.gate.selftest import self_test
    from rlhfbench.gate.sides import Side

    paths = (str(Path.cwd()),) if options.step else ()
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        output.tell(line)

    found = self_test(Side(name="head", title="this", paths=paths), cases, folder, options, tell)
    output.store("\n".join(["```", *lines, "```", ""]))
    if output.as_json:
        print(json.dumps(found.to_json()))
    return common.DONE


def _bisect(ends: tuple[str, str], cases: Sweep, folder: Path, options: GateOptions, output: Output) -> int:
    from rlhfbench.gate import bisect as search
    from rlhfbench.gate import sides

    root = sides.repository()
    roots = sides.module_roots(root, with_working_folder=options.step is not None)
    commits = search.commits_between(*ends, root)
    with sides.checked_out(ends[0], root, "base", roots, step=options.step) as good:

        def compare(commit: str) -> list[Finding]:
            try:
                with sides.checked_out(commit, root, "head", roots, step=options.step) as head:
                    return _compare(good, head, cases, folder / commit[:10], options)
            except GateError as error:  # a commit that cannot be compared
                progress(str(error))
                return []

        def subject(commit: str) -> str:
            return sides.git("log", "-1", "--format=%s", commit, folder=root)

        found = search.bisect(commits, compare, subject, progress)
    if not found.is_clear:
        output.tell(f"{ends[1]} could not be judged against {ends[0]}: whether there is a commit to find is not known.")
    elif not found.regressions:
        output.tell(f"{ends[1]} shows no regression against {ends[0]}: there is nothing to find.")
    title = f"{found.commit[:10]} ({found.subject})"
    return output.finish(
        found.findings,
        good.title,
        title,
        note=found.note,
        commit=found.commit if found.regressions else None,
        unjudged=found.unjudged,
    )


def _against_run(
    baseline: Path, folder: Path, options: GateOptions, output: Output, *, update: bool, memory_only: bool
) -> int:
    from rlhfbench.gate import baseline as stored

    findings = stored.compare_with_run(baseline, folder, options, memory_only=memory_only)
    note = (_store(folder, baseline) or f"The baseline in {baseline} is now this run.") if update else ""
    return output.finish(findings, f"the run in {baseline}", stored.run_title(folder), note=note)


def _first_baseline(baseline: Path, cases: Sweep, folder: Path, options: GateOptions, output: Output) -> int:
    from rlhfbench.gate.baseline import run_title
    from rlhfbench.gate.compare import default_threads
    from rlhfbench.runs.options import RunOptions
    from rlhfbench.runs.runner import run_sweep

    # Those of a case of a gate that compares revisions.
    if run_sweep(cases, folder, RunOptions(num_threads=options.num_threads or default_threads())).interrupted:
        return common.INTERRUPTED
    note = _store(folder, baseline) or f"The baseline in {baseline} is new: there was nothing to compare with."
    return output.finish([], f"the run in {baseline}", run_title(folder), note=note)


def _store(run: Path, baseline: Path) -> str | None:
    """Stores a run as the baseline, or returns one sentence on why it cannot be one."""
    from rlhfbench.gate import baseline as stored

    obstacle = stored.storing_obstacle(run)
    if obstacle is None:
        stored.update_baseline(run, baseline)
    return obstacle
