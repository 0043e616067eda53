"""The section that says what was run: commands, sweep, environment, and what differs between runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from rlhfreports.columns import time_notes
from rlhfreports.page.blocks import Block, Cell, Code, Items, Section, Table, Text
from rlhfreports.page.data import Page, Run, hardware_of
from rlhfreports.tables import ABSENT, counted, outcome_word

_SOFTWARE = ("rlhfbench", "torch", "transformers")
# Of an environment: different in every segment of every run, and no cause of a difference.
_OF_EVERY_RUN = ("run_id", "started_at", "load_average", "resumed")


def configuration_section(page: Page) -> Section:
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
    versions = [_object(environment, "versions") for environment in run.environments]
    found = {name: _distinct(version.get(name) for version in versions) for name in _SOFTWARE}
    software = [f"{name} {' and '.join(values)}" for name, values in found.items() if values]
    commits = _distinct(_commit(environment) for environment in run.environments)
    words = [
        ("" if num_ok == num_cases else f"{num_ok} of ") + f"{counted(num_cases, 'case')} measured",
        *(model for model in dict.fromkeys(hardware_of(run)) if model),
        _day(first.get("started_at")),
        *software,
        f"commit {' and '.join(commits)}" if commits else "",
    ]
    return " · ".join(word for word in words if word)


def _distinct(values: Iterable[object]) -> list[str]:
    """The different ones of ``values`` that are recorded, as text."""
    return list(dict.fromkeys(str(value) for value in values if value))


def _commit(environment: Mapping[str, Any]) -> str:
    """The short commit of an environment, empty where none is recorded."""
    return str(_object(environment, "source").get("commit") or "")[:12]


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
    changed = [environment for environment in run.environments if _object(environment, "source").get("dirty")]
    if changed:
        found.append(f"The code had changes beside commit {' and '.join(_distinct(map(_commit, changed)))}.")
    if len(run.environments) > 1:
        values = {name: texts for name, texts in _values(run.environments).items() if len(texts) > 1 and name != "argv"}
        differ = "; ".join(f"{name} ({', '.join(texts)})" for name, texts in values.items())
        found.append(
            f"The run was resumed {counted(len(run.environments) - 1, 'time')}"
            + (f", and its environment changed: {differ}." if differ else ", and its environment did not change.")
        )
    found += time_notes(run.frame)
    outcomes = run.frame["outcome"].value_counts(sort=False)
    if set(outcomes.index) - {"ok"}:
        found.append(
            f"Outcomes: {', '.join(f'{count} {outcome_word(outcome)}' for outcome, count in outcomes.items())}."
        )
    return found


def differences(runs: tuple[Run, ...]) -> Table:
    """A row for each entry of the environments in which the runs differ. A resumed run may have several values."""
    flat = [{name: "; ".join(texts) for name, texts in _values(run.environments).items()} for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, *values) for name in names if len(set(values := [one.get(name, ABSENT) for one in flat])) > 1]
    return Table(
        id="differences",
        caption="What differs between the runs",
        headings=("what", *(run.name for run in runs)),
        rows=[[Cell(text=text) for text in row] for row in rows],
        num_text_columns=1 + len(runs),
    )


def _values(environments: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The different values of each entry of the environments of a run, by dotted name, in their order."""
    flat = [_flat(environment) for environment in environments]
    names = dict.fromkeys(name for one in flat for name in one)
    return {
        name: _distinct(one.get(name, ABSENT) for one in flat)
        for name in names
        if not set(name.split(".")) & set(_OF_EVERY_RUN)
    }


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested objects by dotted name, as texts of which none is empty."""
    if isinstance(value, Mapping):
        items = value.items()
        return {k: v for name, inner in items for k, v in _flat(inner, f"{prefix}.{name}" if prefix else name).items()}
    if isinstance(value, list):
        texts = [json.dumps(item) if isinstance(item, Mapping) else str(item) for item in value]
        return {prefix: ", ".join(texts) or "none"}
    return {prefix: ABSENT if value is None or pd.isna(value) else str(value) or "empty"}
