"""The meaning of every option, read from the docstring of its group."""

from __future__ import annotations

import dataclasses
import inspect
import re

from rlhfkernels.config.options import Options


def option_meanings() -> dict[str, str]:
    """The meaning of every option by dotted name, on one line; empty under ``python -OO``, which drops docstrings."""
    defaults = Options()
    return {
        f"{group.name}.{name}": meaning
        for group in dataclasses.fields(Options)
        for name, meaning in attribute_meanings(type(getattr(defaults, group.name))).items()
    }


def attribute_meanings(kind: type) -> dict[str, str]:
    """The fields of a dataclass with what the Attributes section of its docstring says of each."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    # An entry is indented by four spaces and its next lines by more.
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    found = {name: " ".join(text.split()) for name, text in entries}
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(kind)}
