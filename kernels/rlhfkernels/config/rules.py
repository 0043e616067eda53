"""Checks values against annotated types with pydantic, and words each broken rule as one sentence."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt, MinLen

from rlhfkernels.naming import unknown


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass by field, constraints included."""
    return typing.get_type_hints(kind, include_extras=True)


def checked(field: str, value: object, annotation: Any) -> tuple[Any, str | None]:
    """The value in its declared type, and the sentence that names the broken rule.

    Args:
        field: the name that the sentence uses.
        value: what was given. An integer is accepted for a float; nothing else is converted.
        annotation: the declared type, with constraints of ``annotated_types``.

    Returns:
        (value, ``None``), or (value, one sentence with field, value and rule).
    """
    import pydantic

    try:
        return _adapter(annotation).validate_python(value, strict=True), None
    except pydantic.ValidationError:
        choices = literal_choices(annotation)
        if choices:
            return value, unknown(field, value, choices)
        return value, f"{field} is {shown(value)}: it must be {rule(annotation)}."


@functools.cache
def _adapter(annotation: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(allow_inf_nan=False))


def shown(value: object) -> str:
    """The value as Python writes it, cut to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def literal_choices(annotation: Any) -> list[str]:
    """The values of a ``Literal``, with ``none`` if the value may be absent; empty for other annotations."""
    parts = _alternatives(annotation)
    found = [str(choice) for part in parts if typing.get_origin(part) is Literal for choice in typing.get_args(part)]
    return [*found, *(["none"] if found and type(None) in parts else [])]


def rule(annotation: Any) -> str:
    """The rule of an annotation in words, such as "an integer of at least 1"."""
    words = [_rule_of(part) for part in _alternatives(annotation) if part is not type(None)]
    return " or ".join([*words, *(["none"] if type(None) in _alternatives(annotation) else [])])


def _rule_of(annotation: Any) -> str:
    base, bounds = _split(annotation)
    if typing.get_origin(base) is Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(base))
    if base is bool:
        return "true or false"
    if base is str:
        return "a non-empty string" if any(isinstance(bound, MinLen) for bound in bounds) else "a string"
    noun = "an integer" if base is int else "a finite number"
    low = next((bound.ge for bound in bounds if isinstance(bound, Ge)), None)
    above = next((bound.gt for bound in bounds if isinstance(bound, Gt)), None)
    high = next((bound.le for bound in bounds if isinstance(bound, Le)), None)
    below = next((bound.lt for bound in bounds if isinstance(bound, Lt)), None)
    if low is not None and high is not None:
        return f"{noun} from {low} to {high}"
    if low is not None and below is not None:
        return f"{noun} of at least {low} and below {below}"
    if low is not None:
        return f"{noun} of at least {low}"
    if above is not None and high is not None:
        return f"{noun} above {above} and at most {high}"
    return noun if above is None else f"{noun} above {above}"


def accepts(annotation: Any, kind: type) -> bool:
    """True if the annotation is ``kind``, or a union with it."""
    return any(_split(part)[0] is kind for part in _alternatives(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    return list(_members(annotation))


def _members(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _members(part)
    else:
        yield annotation


def _split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The bare type of an annotation, and its constraints."""
    if typing.get_origin(annotation) is typing.Annotated:
        base, *bounds = typing.get_args(annotation)
        return base, tuple(bounds)
    return annotation, ()
