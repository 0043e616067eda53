"""The named setting that a case's options belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhfkernels.config.options import Options
from rlhfkernels.config.settings import SETTINGS

CUSTOM = "custom"

_DEFAULTS = Options().flat()
# Not telling: the rank is the machine's to choose, as the dtype is, and stands beside the setting in every report.
_QUIET = ("lora.r",)
_TELLING = tuple(
    dict.fromkeys(name for setting in SETTINGS.values() for name in setting.get("options", {}) if name not in _QUIET)
)


def flat_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a record, by group, as values by dotted name."""
    return {f"{group}.{field}": value for group, table in options.items() for field, value in table.items()}


def setting_of(options: Mapping[str, Mapping[str, Any]]) -> str:
    """The setting whose options ``options`` has; ``custom`` where none matches.

    Args:
        options: the options of a case by group, as in a record. One that an older record lacks counts as the default.
    """
    given = flat_options(options)
    for name, setting in SETTINGS.items():
        values = {**_DEFAULTS, **setting.get("options", {})}
        if all(given.get(field, _DEFAULTS[field]) == values[field] for field in _TELLING):
            return name
    return CUSTOM


def changed_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options, by dotted name, that are not as their setting has them; the LoRA rank is never among them."""
    usual = {**_DEFAULTS, **SETTINGS.get(setting_of(options), {}).get("options", {})}
    return {
        name: value
        for name, value in sorted(flat_options(options).items())
        if name not in _QUIET and (name not in usual or value != usual[name])
    }
