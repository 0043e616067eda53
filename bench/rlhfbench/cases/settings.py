"""The named setting of a case, derived from its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from rlhfkernels.config.options import CPU_LOGPROB_CHUNK, Options
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.program import SourceName

CUSTOM = "custom"

_DEFAULTS = Options().flat()
# The rank often differs from the setting's to fit a machine, as the dtype does. Reports name both beside the setting.
# Alpha belongs to the rank: records of schema 1 hold 1/128 of it at every rank.
_IGNORED = ("lora.r", "lora.alpha")
# A data file belongs to its kind of method. Beside others it would split one size of a table into a block a method.
_UNNAMED = ("lora.r", *(f"data.{source}" for source in get_args(SourceName)))
_DECIDING = tuple(
    dict.fromkeys(name for setting in SETTINGS.values() for name in setting.get("options", {}) if name not in _IGNORED)
)


def flat_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a record by dotted name, from tables by group."""
    flat = {f"{group}.{field}": value for group, table in options.items() for field, value in table.items()}
    if flat.get("engine.logprob_chunk_size") == CPU_LOGPROB_CHUNK:
        flat["engine.logprob_chunk_size"] = None  # what records held before the default followed the device
    return flat


def setting_of(options: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of the setting that ``options`` matches, or ``custom``.

    Args:
        options: the options of a case by group, as in a record. An option that an old record lacks has its default.
    """
    given = flat_options(options)
    for name, setting in SETTINGS.items():
        values = {**_DEFAULTS, **setting.get("options", {})}
        if all(given.get(field, _DEFAULTS[field]) == values[field] for field in _DECIDING):
            return name
    return CUSTOM


def changed_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options, by dotted name, that differ from their setting, without the LoRA rank and the data files."""
    usual = {**_DEFAULTS, **SETTINGS.get(setting_of(options), {}).get("options", {})}
    return {
        name: value
        for name, value in sorted(flat_options(options).items())
        if name not in _UNNAMED and (name not in usual or value != usual[name])
    }
