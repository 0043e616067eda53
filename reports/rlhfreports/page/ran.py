"""The section that says what was run: commands, sweep, environment, and what differs between runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from rlhfreports.columns import hosts_note
from rlhfreports.page.blocks import Block, Cell, Code, Items, Section, Table, Text
from rlhfreports.page.data import Page, Run, hardware_of
from rlhfreports.tables import ABSENT, counted, outcome_word

_SOFTWARE = ("rlhfbench", "torch", "transformers")
# Of an environment: different in every run, and no cause of a difference.
_OF_EVERY_RUN = ("run_id", "started_at", "load_average", "resumed")


def ran_section(page: Page) -> Section:
    """The command, the resolved sweep and the environment of every run, and what differs between them."""
    blocks: list[Block] = []
    if len(page.runs) > 1:
        differing = differences(page.runs)
        blocks.append(differing if len(differing.rows) else Text(text="The runs' environments are the same."))
    for run in page.runs:
        name = f", {run.name}" if len(page.runs) > 1 else ""
        blocks.append(Items(items=[f"{run.name}: {text}" if name else text for text in warnings(run)]))
        commands = [command for environment in run.environments if (command := command_of(environment))]
        blocks += [Code(title=f"Command{name}", text="\n".join(commands))] if commands else []
        blocks += [Code(title=f"Sweep with every default{name}", text=run.sweep)] if run.sweep else []
        if run.environments:
            text = json.dumps([dict(e) for e in run.environments], indent=2, ensure_ascii=False)
            blocks.append(Code(title=f"Environment{name}", text=text))
        else:
            blocks.append(Text(text=f"No environment is recorded{name}.", kind="warning"))
    return Section(id="ran", title="What was run", blocks=blocks)


def facts(run: Run) -> str:
    """One line on a run: how many cases were measured, on what, when, and by which software.

    Facts that are not recorded are left out.
    """
    first: Mapping[str, Any] = run.environments[0] if run.environments else {}
    num_ok, num_cases = int((run.frame["outcome"] == "ok").sum()), len(run.frame)
    versions, source = _object(first, "versions"), _object(first, "source")
    software = [f"{name} {versions[name]}" for name in _SOFTWARE if versions.get(name)]
    words = [
        ("" if num_ok == num_cases else f"{num_ok} of ") + f"{counted(num_cases, 'case')} measured",
        *(model for model in dict.fromkeys(hardware_of(run)) if model),
        _day(first.get("started_at")),
        *software,
        f"commit {str(source['commit'])[:12]}" if source.get("commit") else "",
    ]
    return " · ".join(word for word in words if word)


def _object(environment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry of an environment, empty where it is no object."""
    found = environment.get(name)
    return found if isinstance(found, Mapping) else {}


def _day(started_at: object) -> str:
    """``21 November 2026, 22:55 UTC``; empty where the time is not recorded."""
    time = pd.to_datetime(str(started_at), utc=True, errors="coerce", format="ISO8601")
    return "" if pd.isna(time) else f"{time.day} {time:%B %Y, %H:%M} UTC"


def command_of(environment: Mapping[str, Any]) -> str:
    """The command of a segment of a run, empty where none is recorded."""
    argv = environment.get("argv")
    return shlex.join(map(str, argv)) if isinstance(argv, list) else ""


def warnings(run: Run) -> list[str]:
    """Sentences on the run as a whole that touch every number of it."""
    found = []
    first: Mapping[str, Any] = run.environments[0] if run.environments else {}
    source = _object(first, "source")
    if source.get("dirty"):
        found.append(f"The code had changes beside commit {str(source.get('commit'))[:12]}.")
    if len(run.environments) > 1:
        found.append(f"The run was resumed {counted(len(run.environments) - 1, 'time')}.")
    note = hosts_note(run.frame)
    if note is not None:
        found.append(note)
    outcomes = run.frame["outcome"].value_counts(sort=False)
    if set(outcomes.index) - {"ok"}:
        found.append(
            f"Outcomes: {', '.join(f'{count} {outcome_word(outcome)}' for outcome, count in outcomes.items())}."
        )
    return found


def differences(runs: tuple[Run, ...]) -> Table:
    """A row for each entry of the environments, as recorded at the start of each run, in which they differ."""
    flat = [_flat(run.environments[0]) if run.environments else {} for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [
        (name, *values)
        for name in names
        if len(set(values := [one.get(name, ABSENT) for one in flat])) > 1 and name.split(".")[0] not in _OF_EVERY_RUN
    ]
    return Table(
        id="differences",
        caption="What differs between the runs",
        headings=("what", *(run.name for run in runs)),
        rows=[[Cell(text=text) for text in row] for row in rows],
        num_text_columns=1 + len(runs),
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested objects by dotted name."""
    if isinstance(value, Mapping):
        items = value.items()
        return {k: v for name, inner in items for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()}
    if isinstance(value, list):
        return {prefix: ", ".join(json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value)}
    return {prefix: ABSENT if value is None or pd.isna(value) else str(value)}
