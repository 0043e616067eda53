"""Groups of options that verbs share: dataclasses whose fields are options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")


def with_groups(verb: Callable[..., Result]) -> Callable[..., Result]:
    """Makes an option of each field of every parameter of ``verb`` that is a dataclass.

    typer makes options of a function's parameters, and knows no groups of them. The verb is called with the groups.

    Args:
        verb: Its groups stand where their options stand in the help.
    """
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {
        name: hint for name, hint in hints.items() if name != "return" and dataclasses.is_dataclass(hint)
    }

    @functools.wraps(verb)
    def called(**values: Any) -> Result:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return verb(**values)

    def options() -> Iterator[inspect.Parameter]:
        for name, parameter in inspect.signature(verb).parameters.items():
            if name in groups:
                yield from _options_of(groups[name])
            else:
                yield parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)

    signature = inspect.Signature(list(options()))
    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__annotations__ = {name: option.annotation for name, option in signature.parameters.items()}
    return called


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
