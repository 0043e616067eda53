"""Named settings: which one a case is of, told by its options, and a sweep's spec under one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhfkernels.config.case import Options
from rlhfkernels.config.settings import SETTINGS

CUSTOM = "custom"

_DEFAULTS = dataclasses.asdict(Options())
_FIELDS = tuple(dict.fromkeys(field for setting in SETTINGS.values() for field in setting.get("options", {})))


def setting_options(name: str) -> dict[str, Any]:
    """Every option as it is in setting ``name``; the defaults for a name that is none."""
    return {**_DEFAULTS, **SETTINGS.get(name, {}).get("options", {})}


def setting_of(options: Mapping[str, Any]) -> str:
    """The setting whose values ``options`` have in all fields that any setting sets; ``custom`` where none has them.

    Only options tell: the dtype and the LoRA rank, which a setting gives too, are the machine's to choose, and stand
    beside the setting in every report.

    Args:
        options: those of a case, as in a record. One that an older record lacks counts as the default.
    """
    found = {field: options.get(field, _DEFAULTS[field]) for field in _FIELDS}
    for name in SETTINGS:
        values = setting_options(name)
        if all(found[field] == values[field] for field in _FIELDS):
            return name
    return CUSTOM


def under(setting: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` with what ``setting`` sets put under it: what the spec says itself wins."""
    values = SETTINGS[setting]
    merged = {**values, **spec}
    options = spec.get("options", {})
    if isinstance(options, Mapping):  # else it is wrong, and for the sweep's rules to say
        merged["options"] = {**values.get("options", {}), **options}
    return merged
