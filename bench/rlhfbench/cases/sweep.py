"""Sweeps: ordered lists of cases, made from a grid or a TOML file, and written back to a file.

A *spec* is a mapping with the keys of a sweep file. Options of the command line are merged into the file's spec before
any case is made, so that the same rules check both.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from rlhfbench.cases.option_grid import combinations
from rlhfbench.errors import SweepError
from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.config.options import MAX_COUNT, RENAMED_OPTIONS, Options, unknown_option
from rlhfkernels.config.rules import accepts, shown
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.program import SourceName
from rlhfkernels.methods.table import METHODS, select
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.naming import unknown

Spec = Mapping[str, Any]

# The sweep of `rlhfbench run` without options: about three minutes on two cores.
DEFAULT_GRID: dict[str, Any] = {
    "methods": ["ppo"],
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
_REQUIRED_KEYS = ("methods", "models", "batch_sizes")
_NONE = "none"  # TOML has no null


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """An ordered list of cases without repetitions.

    Attributes:
        cases: in the order in which they run.

    Raises:
        SweepError: some of ``cases`` is no ``Case``.
    """

    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        wrong = [case for case in self.cases if not isinstance(case, Case)]
        if wrong:
            raise SweepError([f"cases has {shown(wrong[0])}: it must be a Case."])

    @classmethod
    def from_spec(cls, spec: Spec) -> Self:
        """Makes the cases that ``spec`` describes, smaller ones first.

        Args:
            spec: a mapping with these keys, all optional:

                - ``methods`` (rows, families, ``all``), ``models``, ``batch_sizes``, and either ``seq_lens`` (prompt
                  and completion together) or ``prompt_lens`` and ``completion_lens`` (taken in pairs): one value or a
                  list each. Every combination is a case.
                - ``device``, ``dtype``, ``seed``, ``prompt_fraction``: one value for all cases.
                - ``options``: a table for each group of ``Options``, or dotted names. Every combination of options
                  that are lists is a case.
                - ``settings``: names of settings. Every case is made once under each; other keys win over a setting.
                - ``cases``: tables of the same keys, added after the grid. With them and no key of the grid, the
                  default grid is left out.

        Raises:
            SweepError: every problem, one sentence each.

        Example:
            >>> sweep = Sweep.from_spec({"methods": ["ppo"], "models": "tiny", "seq_lens": [64, 128]})
            >>> len(sweep.cases)  # of five methods, two lengths and the default batch sizes, 1 and 4
            20
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
            missing = [key.removesuffix("s") for key in _REQUIRED_KEYS if key not in table]
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
        """The sweep of a spec that names settings."""
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
        """Interleaves the cases of ``sweeps``, so that cases that are compared run one after the other."""
        rounds = itertools.zip_longest(*(sweep.cases for sweep in sweeps))
        return cls(cases=tuple({case.id: case for cases in rounds for case in cases if case is not None}.values()))

    def absolute(self) -> Self:
        """These cases with the absolute paths of their data files and local models, for use in any folder."""
        cases = []
        for case in self.cases:
            names = {name: getattr(case.options.data, name) for name in get_args(SourceName)}
            paths = {f"data.{name}": str(Path(path).absolute()) for name, path in names.items() if path is not None}
            reward_model = case.options.rollout.reward_model
            if reward_model is not None:
                paths["rollout.reward_model"] = _absolute_model(reward_model)
            options = case.options.replace(paths)
            cases.append(dataclasses.replace(case, model=_absolute_model(case.model), options=options))
        return type(self)(cases=tuple({case.id: case for case in cases}.values()))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a sweep from a TOML file. See ``from_spec`` for its keys.

        Raises:
            SweepError: the file cannot be read, is not TOML, or breaks a rule.
        """
        return cls.from_spec(read_spec(path))

    def to_spec(self) -> dict[str, Any]:
        """A spec of exactly these cases in this order: shared values first, then a table for each case."""
        if not self.cases:
            return {}
        first = self.cases[0]
        shared = {key: getattr(first, key) for key in FIELD_KEYS}
        shared["options"] = _nested(_storable(first.options.flat()))
        return {**shared, "cases": [_case_table(case, shared) for case in self.cases]}

    def to_toml(self) -> str:
        """The text of a sweep file that loads to the same cases."""
        import tomli_w

        return tomli_w.dumps(self.to_spec())


def _absolute_model(model: str) -> str:
    """The absolute path of a model on this machine; the name of any other."""
    path = Path(model).expanduser()
    return str(path.absolute()) if model not in PRESETS and path.exists() else model


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
    merged = dict(_plural(spec))
    tables = merged.get("cases")
    if isinstance(tables, list) and tables:
        grid = [key for key in GRID_KEYS if key in flags]
        if grid:
            raise SweepError([f"{', '.join(grid)} cannot be given for a sweep file that lists its [[cases]]."])
        merged["cases"] = [override(table, flags) if isinstance(table, Mapping) else table for table in tables]
    if "seq_lens" in flags:
        merged = {key: value for key, value in merged.items() if key not in LENGTH_KEYS}
    return _joined(merged, flags)


def _joined(under: Spec, over: Spec) -> dict[str, Any]:
    """Merges two specs; ``over`` wins, option by option."""
    merged = {**under, **over}
    tables = [spec["options"] for spec in (under, over) if "options" in spec]
    if tables and all(isinstance(table, Mapping) for table in tables):
        merged["options"] = {name: value for table in tables for name, value in _dotted(table).items()}
    return merged


def _dotted(table: Mapping[str, Any]) -> dict[str, Any]:
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


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by group."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return groups


def _storable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the form of TOML: ``None`` becomes "none", or is left out if it is the default."""
    defaults = Options().flat()
    return {
        name: _NONE if value is None else value
        for name, value in values.items()
        if value is not None or defaults[name] is not None
    }


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


def split_length(seq_len: int, prompt_fraction: float) -> tuple[int, int]:
    """(prompt, completion) tokens of a sequence. The completion gets the larger half of an odd length."""
    # 0.7 * 10 is 6.999… in binary and must give 7.
    prompt_len = min(max(math.floor(seq_len * prompt_fraction + 1e-9), 1), seq_len - 1)
    return prompt_len, seq_len - prompt_len


def _plural(spec: Spec) -> dict[str, Any]:
    """``spec`` with plural keys: ``models`` for ``model``."""
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
    """The default grid, without its lengths if ``spec`` has any."""
    has_lengths = any(key in spec for key in LENGTH_KEYS)
    return {key: value for key, value in DEFAULT_GRID.items() if not (has_lengths and key in LENGTH_KEYS)}


def _grid(where: str, spec: Spec, problems: list[str]) -> list[Case]:
    """Every combination in ``spec``, by model, batch size, length, method and options; appends to ``problems``."""
    found: list[str] = []
    methods = _select(_names(where, spec, "methods", found), found)
    models = _names(where, spec, "models", found)
    lengths = _lengths(where, spec, found)
    batch_sizes = _integers(where, spec, "batch_sizes", 1, found)
    grid = combinations(_options(where, spec.get("options", {}), found))
    shared = {key: spec[key] for key in FIELD_KEYS if key in spec}
    # A case of stand-in sizes: rules that need no size are checked even if the sizes are wrong.
    for method, options in itertools.product(methods or list(METHODS)[:1], grid):
        own = _data_of(method, options, methods)
        found += _try_case(method, "-", (1, 1), _smallest_batch(options), shared, own)[1]
    cases: list[Case] = []
    if not found:
        sizes = itertools.product(models, sorted(batch_sizes), sorted(lengths, key=sum))
        for (model, batch_size, length), method, options in itertools.product(sizes, methods, grid):
            own = _data_of(method, options, methods)
            case, wrong = _try_case(method, model, length, batch_size, shared, own)
            found += wrong
            cases += [case] if case else []
    problems += found
    return cases


def _select(names: list[str], problems: list[str]) -> list[str]:
    """The methods that ``names`` mean; see ``rlhfkernels.methods.table.select``."""
    try:
        return select(names)
    except CaseError as error:
        problems += error.problems
        return []


def _data_of(method: str, options: Spec, methods: list[str]) -> dict[str, Any]:
    """``options`` without the data files that only other methods of the sweep take."""
    taken = {METHODS[name].source for name in methods} - {METHODS[method].source}
    return {name: value for name, value in options.items() if name not in {f"data.{source}" for source in taken}}


def _smallest_batch(options: Spec) -> int:
    """The smallest batch that divides into the mini- and micro-batches of ``options``."""
    parts = (options.get("ppo.num_mini_batches"), options.get("engine.micro_batch_size"))
    return math.prod(part for part in parts if isinstance(part, int) and part > 0)


def _try_case(
    method: str, model: str, length: tuple[int, int], batch_size: int, shared: Spec, options: Spec
) -> tuple[Case | None, list[str]]:
    """(case, no problems) or (``None``, problems)."""
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
    problems += [f"{where}{key} has {shown(v)}: it must be a name." for v in values if not isinstance(v, str) or not v]
    return [v for v in values if isinstance(v, str) and v]


def _integers(where: str, spec: Spec, key: str, minimum: int, problems: list[str]) -> list[int]:
    values = _values(where, spec, key, problems)
    good = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and minimum <= v <= MAX_COUNT]
    for value in values:
        if isinstance(value, int) and value > MAX_COUNT:
            problems.append(f"{where}{key} has {shown(value)}: it must be at most {MAX_COUNT}.")
        elif value not in good:
            problems.append(f"{where}{key} has {shown(value)}: it must be a whole number of at least {minimum}.")
    return good


def _lengths(where: str, spec: Spec, problems: list[str]) -> list[tuple[int, int]]:
    """(prompt, completion) tokens of each length."""
    fraction = spec.get("prompt_fraction", 0.5)
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        problems.append(f"{where}prompt_fraction is {fraction!r}: it must be a number between 0 and 1.")
        fraction = 0.5
    if "seq_lens" in spec:
        if "prompt_lens" in spec or "completion_lens" in spec:
            problems.append(f"{where}seq_lens is given with prompt_lens or completion_lens: give one or the other.")
        seq_lens = _integers(where, spec, "seq_lens", 2, problems)
        return list(dict.fromkeys(split_length(seq_len, fraction) for seq_len in seq_lens))
    prompts = _integers(where, spec, "prompt_lens", 1, problems)
    completions = _integers(where, spec, "completion_lens", 1, problems)
    if len(prompts) != len(completions) and 1 not in (len(prompts), len(completions)):
        problems.append(
            f"{where}prompt_lens has {len(prompts)} values and completion_lens {len(completions)}: "
            "they are taken in pairs, so both must have as many values, or one of them a single value."
        )
        return []
    if len(prompts) == 1:
        prompts *= len(completions)
    elif len(completions) == 1:
        completions *= len(prompts)
    return list(zip(prompts, completions, strict=True))


def _options(where: str, table: object, problems: list[str]) -> dict[str, Any]:
    """The options of a spec by dotted name, with "none" as ``None``. The case checks their values."""
    if not isinstance(table, Mapping):
        problems.append(f"{where}options is {shown(table)}: it must be a table.")
        return {}
    annotations = option_annotations()
    options: dict[str, Any] = {}
    for name, value in _dotted(table).items():
        if name not in annotations:
            problems.append(f"{where}{unknown_option(name)}")
        elif value == []:
            problems.append(f"{where}option {name!r} is []: it must have at least one value.")
        elif accepts(annotations[name], type(None)):
            options[name] = [_or_none(item) for item in value] if isinstance(value, list) else _or_none(value)
        else:
            options[name] = value
    return options


def _or_none(value: Any) -> Any:
    return None if value == _NONE else value


def _case_table(case: Case, shared: Spec) -> dict[str, Any]:
    """The ``[[cases]]`` table of ``case``, without the values in ``shared``."""
    table = {key: getattr(case, key) for key in ("method", "model", "prompt_len", "completion_len", "batch_size")}
    table |= {key: getattr(case, key) for key in FIELD_KEYS if getattr(case, key) != shared[key]}
    values = {name: _NONE if value is None else value for name, value in case.options.flat().items()}
    inherited = _dotted(shared["options"])
    differing = {name: value for name, value in values.items() if value != inherited.get(name, _NONE)}
    return {**table, **({"options": _nested(differing)} if differing else {})}


def differences(new_cases: Iterable[Case], old_cases: Iterable[Case]) -> str:
    """A phrase that names the fields in which two sets of cases differ, with their values."""
    rows = [[_flat(case) for case in cases] for cases in (new_cases, old_cases)]
    phrases = []
    for field in rows[0][0] if rows[0] else ():
        new, old = (sorted({str(row[field]) for row in side}) for side in rows)
        if new != old:
            phrases.append(f"{field} {', '.join(new)} instead of {', '.join(old)}")
    return "; ".join(phrases) or "other combinations of the same values"


def _flat(case: Case) -> dict[str, Any]:
    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case) if field.name != "options"}
    return {**fields, **case.options.flat()}
