"""Sweeps: an ordered list of cases, from a grid or a TOML file, and back into a file.

A *spec* is what both are made of: a mapping with the keys of a sweep file. Explicit flags of the command line replace
the file's values before the cases are made, so one set of rules checks all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from rlhfbench.errors import SweepError
from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.config.options import RENAMED_OPTIONS, Options
from rlhfkernels.config.rules import accepts
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import METHODS
from rlhfkernels.naming import unknown

Spec = Mapping[str, Any]

# What `rlhfbench run` runs with no flag at all: small enough for a laptop with two cores.
DEFAULT_GRID: dict[str, Any] = {
    "methods": list(METHODS),
    "models": ["tiny"],
    "seq_lens": [32, 64, 128],
    "batch_sizes": [1, 4],
}

LENGTH_KEYS = ("seq_lens", "prompt_lens", "completion_lens")
GRID_KEYS = ("methods", "models", *LENGTH_KEYS, "batch_sizes")
SETTING_KEYS = ("settings", "setting")
FIELD_KEYS = ("device", "dtype", "seed")
SHARED_KEYS = (*FIELD_KEYS, "prompt_fraction", "options")
_SINGULAR = {key.removesuffix("s"): key for key in GRID_KEYS}
_CASE_NEEDS = ("methods", "models", "batch_sizes")
_NONE = "none"  # TOML has no null


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """An ordered list of cases without repetitions."""

    cases: tuple[Case, ...]

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        """The sweep that ``spec`` describes, smaller cases first.

        Keys: ``methods``, ``models``, ``seq_lens`` (prompt and completion together) or ``prompt_lens`` and
        ``completion_lens`` (taken in pairs), ``batch_sizes``: one value or a list each; every combination is a case.
        ``device``, ``dtype``, ``seed``, ``prompt_fraction``, ``options`` (a table for each group of ``Options``, or
        dotted names): one value for all. ``settings``: names of settings, under each of which every case stands once;
        what the spec says itself wins. ``cases``: tables of the same keys, added at the end in their order. What is absent takes the
        default; where ``cases`` stands without a grid, the default grid is left out.

        Raises:
            SweepError: every problem of it, one sentence each.
        """
        if any(key in spec for key in SETTING_KEYS):
            return cls._under_settings(spec)
        spec = _plural(spec)
        problems = _check_keys("", spec, (*GRID_KEYS, *SHARED_KEYS, "settings", "cases"))
        tables = spec.get("cases", [])
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            raise SweepError([*problems, "cases must be tables: write each below a line [[cases]]."])
        cases: list[Case] = []
        if not tables or any(key in spec for key in GRID_KEYS):
            cases += _grid("", {**_default_lengths(spec), **spec}, problems)
        shared = {key: spec[key] for key in SHARED_KEYS if key in spec}
        for number, table in enumerate(tables, start=1):
            where = f"cases[{number}]: "
            table = _plural(table)
            problems += _check_keys(where, table, (*GRID_KEYS, *SHARED_KEYS))
            missing = [key.removesuffix("s") for key in _CASE_NEEDS if key not in table]
            missing += [] if any(key in table for key in LENGTH_KEYS) else ["prompt_len and completion_len"]
            if missing:
                problems.append(f"cases[{number}] lacks {', '.join(missing)}.")
                continue
            cases += _grid(where, _joined(shared, table), problems)
        if problems:
            raise SweepError(problems)
        return cls(cases=tuple({case.id: case for case in cases}.values()))

    @classmethod
    def _under_settings(cls, spec: Spec) -> Self:
        """The sweep of a ``spec`` that names settings."""
        rest = {key: value for key, value in spec.items() if key not in SETTING_KEYS}
        problems: list[str] = []
        named = {"settings": next(spec[key] for key in SETTING_KEYS if key in spec)}
        names = list(dict.fromkeys(_names("", named, "settings", problems)))
        problems += [unknown("setting", name, SETTINGS) for name in names if name not in SETTINGS]
        sweeps = []
        for name in [name for name in names if name in SETTINGS] or list(SETTINGS)[:1]:
            try:
                sweeps.append(cls.from_spec(_joined(SETTINGS[name], rest)))
            except SweepError as error:
                problems += [problem for problem in error.problems if problem not in problems]
        if problems:
            raise SweepError(problems)
        return cls.joined(sweeps)

    @classmethod
    def joined(cls, sweeps: Iterable[Sweep]) -> Self:
        """The cases of ``sweeps`` in turn, the first of each and then the second: what compares is run together."""
        turns = itertools.zip_longest(*(sweep.cases for sweep in sweeps))
        return cls(cases=tuple({case.id: case for turn in turns for case in turn if case is not None}.values()))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The sweep in a TOML file. See ``from_spec`` for its keys.

        Raises:
            SweepError: the file cannot be read, is not TOML or describes no sweep.
        """
        return cls.from_spec(read_spec(path))

    def to_spec(self) -> dict[str, Any]:
        """A spec of exactly these cases in this order: what they share at its top, then a table for each."""
        if not self.cases:
            return {}
        first = self.cases[0]
        shared = {key: getattr(first, key) for key in FIELD_KEYS}
        shared["options"] = _nested(_storable(first.options.flat()))
        return {**shared, "cases": [_case_table(case, shared) for case in self.cases]}

    def to_toml(self) -> str:
        """A sweep file that loads back to the identical cases."""
        import tomli_w

        return tomli_w.dumps(self.to_spec())


def read_spec(path: str | Path) -> dict[str, Any]:
    """The content of a sweep file, unchecked.

    Raises:
        SweepError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SweepError([f"sweep file '{path}' cannot be read: {error.strerror}."]) from error
    except ValueError as error:
        raise SweepError([f"sweep file '{path}' is not TOML: {error}."]) from error


def override(spec: Spec, flags: Spec) -> dict[str, Any]:
    """``spec`` with what ``flags`` set put in its place, in its ``cases`` too.

    Raises:
        SweepError: a flag of the grid where the file lists its cases one by one.
    """
    merged = dict(_plural(spec))
    tables = merged.get("cases")
    if tables:
        grid = [key for key in GRID_KEYS if key in flags]
        if grid:
            raise SweepError([f"{', '.join(grid)} cannot be given for a sweep file that lists its [[cases]]."])
        merged["cases"] = [override(table, flags) if isinstance(table, Mapping) else table for table in tables]
    if "seq_lens" in flags:
        merged = {key: value for key, value in merged.items() if key not in LENGTH_KEYS}
    return _joined(merged, flags)


def _joined(under: Spec, over: Spec) -> dict[str, Any]:
    """Both specs as one; what ``over`` says wins, option by option."""
    merged = {**under, **over}
    tables = [spec["options"] for spec in (under, over) if "options" in spec]
    if tables and all(isinstance(table, Mapping) for table in tables):
        merged["options"] = {name: value for table in tables for name, value in _dotted(table).items()}
    return merged


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted name, from tables by group and dotted names alike."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= (
            {f"{name}.{field}": item for field, item in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return found


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by group, from dotted names."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return groups


def _storable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a TOML file must hold: ``None`` is written as a word, and left out where it is the default."""
    defaults = Options().flat()
    return {
        name: _NONE if value is None else value
        for name, value in values.items()
        if value is not None or defaults[name] is not None
    }


def parse_option(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of the command line, with the value in the type of that field of ``Options``.

    A value that is not of the type stays a text, for the case's rules to name.

    Raises:
        SweepError: there is no ``=`` in it, or no such option.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise SweepError([f"option {text!r} has no value: write it as KEY=VALUE."])
    annotation = option_annotations().get(name)
    if annotation is None:
        raise SweepError([_unknown_option(name)])
    if value.lower() == _NONE and accepts(annotation, type(None)):
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


def _unknown_option(name: str) -> str:
    """The sentence for a name that is no option; it says the new name of an old one."""
    if name in RENAMED_OPTIONS:
        return f"option {name!r} is now called {RENAMED_OPTIONS[name]!r}."
    return unknown("option", name, option_annotations())


def split_length(seq_len: int, prompt_fraction: float) -> tuple[int, int]:
    """(prompt, completion) of a sequence length. Of an odd length the completion gets the larger half."""
    # The tiny addend: 0.7 * 10 is 6.999… in binary and means 7.
    prompt_len = min(max(math.floor(seq_len * prompt_fraction + 1e-9), 1), seq_len - 1)
    return prompt_len, seq_len - prompt_len


def _plural(spec: Spec) -> dict[str, Any]:
    """``spec`` with ``model`` for ``models`` and the like brought to one form."""
    return {_SINGULAR.get(key, key): value for key, value in spec.items()}


def _check_keys(where: str, spec: Spec, valid: Iterable[str]) -> list[str]:
    names = list(valid)
    return [
        f"{where}sweep key {key!r} is now the option {RENAMED_OPTIONS[key]!r}."
        if key in RENAMED_OPTIONS
        else unknown(f"{where}sweep key", key, names)
        for key in spec
        if key not in names
    ]


def _default_lengths(spec: Spec) -> dict[str, Any]:
    """The default grid, without its lengths where ``spec`` has some."""
    has_lengths = any(key in spec for key in LENGTH_KEYS)
    return {key: value for key, value in DEFAULT_GRID.items() if not (has_lengths and key in LENGTH_KEYS)}


def _grid(where: str, spec: Spec, problems: list[str]) -> list[Case]:
    """Every combination in ``spec`` by model, batch size, length, method; what is wrong goes to ``problems``."""
    found: list[str] = []
    methods = _names(where, spec, "methods", found)
    models = _names(where, spec, "models", found)
    lengths = _lengths(where, spec, found)
    batch_sizes = _integers(where, spec, "batch_sizes", 1, found)
    options = _options(where, spec.get("options", {}), found)
    shared = {key: spec[key] for key in FIELD_KEYS if key in spec}
    # What needs no length and no batch size is checked even where those are wrong: every problem at once.
    for method in methods or list(METHODS)[:1]:
        found += _try_case(method, "-", (1, 1), _least_batch(options), shared, options)[1]
    cases: list[Case] = []
    if not found:
        for model in models:
            for batch_size in sorted(batch_sizes):
                for length in sorted(lengths, key=sum):
                    for method in methods:
                        case, wrong = _try_case(method, model, length, batch_size, shared, options)
                        found += wrong
                        cases += [case] if case else []
    problems += found
    return cases


def _least_batch(options: Spec) -> int:
    """A batch that divides as ``options`` want it; what is wrong with them is for the case's own rules to say."""
    parts = (options.get("ppo.num_mini_batches"), options.get("engine.micro_batch_size"))
    return math.prod(part for part in parts if isinstance(part, int) and part > 0)


def _try_case(
    method: str, model: str, length: tuple[int, int], batch_size: int, shared: Spec, options: Spec
) -> tuple[Case | None, list[str]]:
    """The case, or what is wrong with it."""
    try:
        return (
            Case(
                method=method,
                model=model,
                prompt_len=length[0],
                completion_len=length[1],
                batch_size=batch_size,
                **shared,
                options=Options.of(options),
            ),
            [],
        )
    except CaseError as error:
        return None, list(error.problems)


def _values(where: str, spec: Spec, key: str, problems: list[str]) -> list[Any]:
    value = spec.get(key, [])
    values = value if isinstance(value, list) else [value]
    if not values:
        problems.append(f"{where}{key} is empty: it must have at least one value.")
    return values


def _names(where: str, spec: Spec, key: str, problems: list[str]) -> list[str]:
    values = _values(where, spec, key, problems)
    problems += [f"{where}{key} has {v!r}: it must be a name." for v in values if not isinstance(v, str) or not v]
    return [v for v in values if isinstance(v, str) and v]


def _integers(where: str, spec: Spec, key: str, least: int, problems: list[str]) -> list[int]:
    values = _values(where, spec, key, problems)
    good = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= least]
    problems += [
        f"{where}{key} has {v!r}: it must be a whole number of at least {least}." for v in values if v not in good
    ]
    return good


def _lengths(where: str, spec: Spec, problems: list[str]) -> list[tuple[int, int]]:
    """(prompt, completion) pairs."""
    fraction = spec.get("prompt_fraction", 0.5)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        problems.append(f"{where}prompt_fraction is {fraction!r}: it must be a number between 0 and 1.")
        fraction = 0.5
    if "seq_lens" in spec:
        if "prompt_lens" in spec or "completion_lens" in spec:
            problems.append(f"{where}seq_lens stands beside prompt_lens or completion_lens: give one or the other.")
        seq_lens = _integers(where, spec, "seq_lens", 2, problems)
        return list(dict.fromkeys(split_length(seq_len, fraction) for seq_len in seq_lens))
    prompts = _integers(where, spec, "prompt_lens", 1, problems)
    completions = _integers(where, spec, "completion_lens", 1, problems)
    if len(prompts) != len(completions) and 1 not in (len(prompts), len(completions)):
        problems.append(
            f"{where}prompt_lens has {len(prompts)} values and completion_lens {len(completions)}: "
            "they are taken in pairs, so both need the same number, or one of them a single value."
        )
        return []
    number = max(len(prompts), len(completions))
    return list(zip(_stretched(prompts, number), _stretched(completions, number), strict=False))


def _stretched(values: list[int], number: int) -> list[int]:
    return values * number if len(values) == 1 else values


def _options(where: str, table: object, problems: list[str]) -> dict[str, Any]:
    """The options of a spec by dotted name, with "none" read as ``None``; their values are for the case to check."""
    if not isinstance(table, Mapping):
        problems.append(f"{where}options is {table!r}: it must be a table.")
        return {}
    annotations = option_annotations()
    options: dict[str, Any] = {}
    for name, value in _dotted(table).items():
        if name not in annotations:
            problems.append(f"{where}{_unknown_option(name)}")
        elif value == _NONE and accepts(annotations[name], type(None)):
            options[name] = None
        else:
            options[name] = value
    return options


def _case_table(case: Case, shared: Spec) -> dict[str, Any]:
    """What a ``[[cases]]`` table must say of ``case`` beside what it shares with the others."""
    table = {key: getattr(case, key) for key in ("method", "model", "prompt_len", "completion_len", "batch_size")}
    table |= {key: getattr(case, key) for key in FIELD_KEYS if getattr(case, key) != shared[key]}
    values = {name: _NONE if value is None else value for name, value in case.options.flat().items()}
    inherited = _dotted(shared["options"])
    differing = {name: value for name, value in values.items() if value != inherited.get(name, _NONE)}
    return {**table, **({"options": _nested(differing)} if differing else {})}


def differences(asked: Iterable[Case], there: Iterable[Case]) -> str:
    """What tells two sets of cases apart, field by field, in a phrase."""
    rows = [[_flat(case) for case in cases] for cases in (asked, there)]
    phrases = []
    for field in rows[0][0] if rows[0] else ():
        new, old = (sorted({str(row[field]) for row in side}) for side in rows)
        if new != old:
            phrases.append(f"{field} {', '.join(new)} instead of {', '.join(old)}")
    return "; ".join(phrases) or "other combinations of the same values"


def _flat(case: Case) -> dict[str, Any]:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "options"}
    return {**fields, **case.options.flat()}
