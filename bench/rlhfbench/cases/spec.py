"""Specs: mappings with the keys of a sweep file. They are read, merged and checked for unknown keys here.

Options of the command line are merged into the file's spec before any case is made, so that the same rules check both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhfbench.errors import SweepError
from rlhfkernels.config.case import option_annotations
from rlhfkernels.config.options import RENAMED_OPTIONS, unknown_option
from rlhfkernels.config.rules import accepts
from rlhfkernels.naming import unknown

Spec = Mapping[str, Any]

LENGTH_KEYS = ("seq_lens", "prompt_lens", "completion_lens")
GRID_KEYS = ("methods", "models", *LENGTH_KEYS, "batch_sizes")
SETTING_KEYS = ("settings", "setting")
FIELD_KEYS = ("device", "dtype", "seed")
SHARED_KEYS = (*FIELD_KEYS, "prompt_fraction", "options")
_SINGULAR = {key.removesuffix("s"): key for key in GRID_KEYS}
NONE = "none"  # TOML has no null


def read_spec(path: str | Path) -> dict[str, Any]:
    """The content of a sweep file, unchecked.

    Raises:
        SweepError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError([f"sweep file '{path}' cannot be read: {error.strerror}."]) from error
    except RecursionError as error:
        raise SweepError([f"sweep file '{path}' is nested too deeply."]) from error
    except ValueError as error:
        raise SweepError([f"sweep file '{path}' is not TOML: {' '.join(str(error).split())}."]) from error


def override(spec: Spec, flags: Spec) -> dict[str, Any]:
    """Merges ``flags`` into ``spec`` and its ``cases``; flags win.

    Raises:
        SweepError: a key of the grid is in ``flags``, and ``spec`` lists its cases one by one.
    """
    merged = dict(plural(spec))
    tables = merged.get("cases")
    if isinstance(tables, list) and tables:
        grid = [key for key in GRID_KEYS if key in flags]
        if grid:
            raise SweepError([f"{', '.join(grid)} cannot be given for a sweep file that lists its [[cases]]."])
        merged["cases"] = [override(table, flags) if isinstance(table, Mapping) else table for table in tables]
    if "seq_lens" in flags:
        merged = {key: value for key, value in merged.items() if key not in LENGTH_KEYS}
    return merge_specs(merged, flags)


def merge_specs(under: Spec, over: Spec) -> dict[str, Any]:
    """Merges two specs; ``over`` wins, option by option. Options that are no table are kept for the grid to report."""
    merged = {**under, **over}
    tables = [spec["options"] for spec in (under, over) if "options" in spec]
    malformed = [table for table in tables if not isinstance(table, Mapping)]
    if malformed:
        merged["options"] = malformed[0]
    elif tables:
        merged["options"] = {name: value for table in tables for name, value in dotted(table).items()}
    return merged


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted name. A spec may give them as tables by group, as dotted names, or both."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        options = (
            {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, Mapping) else {name: value}
        )
        twice = [
            f"option {option!r} is given twice, as a table's key and by its dotted name."
            for option in options
            if option in found
        ]
        if twice:
            raise SweepError(twice)
        found |= options
    return found


def plural(spec: Spec, where: str = "") -> dict[str, Any]:
    """``spec`` with plural keys: ``models`` for ``model``.

    Raises:
        SweepError: it has a key in both forms, one of which would be passed over.
    """
    twice = [
        f"{where}sweep key {key!r} is given beside {_SINGULAR[key]!r}: give one of the two."
        for key in spec
        if _SINGULAR.get(key) in spec
    ]
    if twice:
        raise SweepError(twice)
    return {_SINGULAR.get(key, key): value for key, value in spec.items()}


def check_keys(where: str, spec: Spec, valid: Iterable[str]) -> list[str]:
    """One sentence for each key of ``spec`` that is none of ``valid``."""
    names = list(valid)
    return [
        f"{where}sweep key {key!r} is now the option {RENAMED_OPTIONS[key]!r}."
        if key in RENAMED_OPTIONS
        else unknown(f"{where}sweep key", key, names)
        for key in spec
        if key not in names
    ]


def parse_option(text: str) -> tuple[str, Any]:
    """Parses ``KEY=VALUE`` of the command line into the dotted name and a value of the option's type.

    A value that cannot be converted stays a string; the rules of the case report it.

    Raises:
        SweepError: ``text`` has no ``=``, or there is no such option.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SweepError([f"option {text!r} has no value: write it as KEY=VALUE."])
    annotation = option_annotations().get(name)
    if annotation is None:
        raise SweepError([unknown_option(name)])
    if value.lower() == NONE and accepts(annotation, type(None)):
        return name, None
    if accepts(annotation, bool):
        return name, {"true": True, "false": False}.get(value.lower(), value)
    for kind in (int, float):
        if accepts(annotation, kind):
            try:
                return name, kind(value)
            except ValueError:
                return name, value
    return name, value
