"""``rlhfbench methods``: lists the methods, or the options of a case."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from rlhfbench.cli.common import READING_CODES, epilog, fill

EPILOG = epilog(
    "rlhfbench methods", "rlhfbench methods --options", "rlhfbench methods --options --json", codes=READING_CODES
)


def methods(
    options: Annotated[
        bool, typer.Option("--options", help="List the options of a case: default, rule and meaning.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the methods with their roles and phases.

    With --options: the options that --option takes.
    """
    rows = option_rows() if options else method_rows()
    if as_json:
        print(json.dumps(rows))
    elif options:
        _print_options(rows)
    else:
        _print_methods(rows)


def method_rows() -> list[dict[str, Any]]:
    """One JSON object a method."""
    from rlhfkernels.methods.table import METHODS

    return [
        {
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
        for method in METHODS.values()
    ]


def _print_methods(rows: list[dict[str, Any]]) -> None:
    print(fill("Each role reads a base, or base+adapter, through a head. Brackets: the parts that are trained.") + "\n")
    for row in rows:
        counts = f"bases loaded: {row['num_bases']}, LoRA sets: {row['num_adapter_sets']}"
        print(fill(f"{row['name']} ({row['title']}): {counts}", hanging="    "))
        for role, spec in row["roles"].items():
            weights = spec["base"] + (f"+{spec['adapter']}" if spec["adapter"] else "")
            trains = f" [{', '.join(spec['trains'])}]" if spec["trains"] else ""
            print(fill(f"{role:<10} {weights:<16} {spec['head']} head{trains}", "  ", hanging=" " * 13))
        phases = ", ".join(phase["name"] for phase in row["phases"])
        print(fill(f"{'phases':<10} {phases}", "  ", hanging=" " * 13) + "\n")


def option_rows() -> list[dict[str, Any]]:
    """One JSON object an option: ``name``, ``default``, ``rule`` and ``meaning``."""
    from rlhfkernels.config.case import option_annotations
    from rlhfkernels.config.meanings import option_meanings
    from rlhfkernels.config.options import Options
    from rlhfkernels.config.rules import rule

    defaults, meanings = Options().flat(), option_meanings()
    return [
        {"name": name, "default": defaults[name], "rule": rule(annotation), "meaning": meanings[name]}
        for name, annotation in option_annotations().items()
    ]


def _print_options(rows: list[dict[str, Any]]) -> None:
    group = None
    for row in rows:
        name, default = row["name"], row["default"]
        if name.split(".")[0] != group:
            group = name.split(".")[0]
            print(f"{group}\n")
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
        print(fill(f"{name}={shown}  ({row['rule']})", "  ", hanging=" " * 4))
        print(fill(row["meaning"].replace("``", ""), " " * 6), end="\n\n")
