"""Sweeps: ordered lists of cases, made from a spec or a TOML file, and written back to a file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, get_args

from rlhfbench.cases.grid import cases_of_grid, read_names
from rlhfbench.cases.spec import (
    FIELD_KEYS,
    GRID_KEYS,
    LENGTH_KEYS,
    NONE,
    SETTING_KEYS,
    SHARED_KEYS,
    Spec,
    check_keys,
    dotted,
    merge_specs,
    plural,
    read_spec,
)
from rlhfbench.errors import SweepError
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.config.rules import shown
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.program import SourceName
from rlhfkernels.models.presets import PRESETS
from rlhfkernels.naming import unknown

# The sweep of `rlhfbench run` without options: about three minutes on two cores.
DEFAULT_GRID: dict[str, Any] = {
    "methods": ["ppo"],
    "models": ["tiny"],
    "seq_lens": [32, 64, 128],
    "batch_sizes": [1, 4],
}
_REQUIRED_KEYS = ("methods", "models", "batch_sizes")


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
        spec = plural(spec)
        problems = check_keys("", spec, (*GRID_KEYS, *SHARED_KEYS, "settings", "cases"))
        tables = spec.get("cases", [])
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
            raise SweepError([*problems, "cases must be tables: write each below a line [[cases]]."])
        if "cases" in spec and not tables:
            problems.append("cases is empty: it must have at least one table.")
        cases: list[Case] = []
        if not tables or any(key in spec for key in GRID_KEYS):
            cases += cases_of_grid("", {**_default_lengths(spec), **spec}, problems)
        shared = {key: spec[key] for key in SHARED_KEYS if key in spec}
        for number, table in enumerate(tables, start=1):
            where = f"cases[{number}]: "
            table = plural(table, where)
            problems += check_keys(where, table, (*GRID_KEYS, *SHARED_KEYS))
            missing = [key.removesuffix("s") for key in _REQUIRED_KEYS if key not in table]
            missing += [] if any(key in table for key in LENGTH_KEYS) else ["prompt_len and completion_len"]
            if missing:
                problems.append(f"cases[{number}] lacks {', '.join(missing)}.")
                continue
            # A share that all tables have is for those whose lengths are of whole sequences.
            inherited = {key: value for key, value in shared.items() if key != "prompt_fraction" or "seq_lens" in table}
            cases += cases_of_grid(where, merge_specs(inherited, table), problems)
        if problems:
            raise SweepError(problems)
        return cls(cases=tuple({case.id: case for case in cases}.values()))

    @classmethod
    def _under_settings(cls, spec: Spec) -> Self:
        """The sweep of a spec that names settings."""
        rest = {key: value for key, value in spec.items() if key not in SETTING_KEYS}
        problems: list[str] = []
        if all(key in spec for key in SETTING_KEYS):
            problems.append("sweep key 'setting' is given beside 'settings': give one of the two.")
        named = {"settings": next(spec[key] for key in SETTING_KEYS if key in spec)}
        names = list(dict.fromkeys(read_names("", named, "settings", problems)))
        problems += [unknown("setting", name, SETTINGS) for name in names if name not in SETTINGS]
        sweeps = []
        for name in [name for name in names if name in SETTINGS] or list(SETTINGS)[:1]:
            try:
                sweeps.append(cls.from_spec(merge_specs(SETTINGS[name], rest)))
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
    try:
        path = Path(model).expanduser()
        return str(path.absolute()) if model not in PRESETS and path.exists() else model
    except (OSError, RuntimeError):  # of a user's folder, or a name that is too long: ``inspect_model`` says why
        return model


def _default_lengths(spec: Spec) -> dict[str, Any]:
    """The default grid, without its lengths if ``spec`` has any."""
    has_lengths = any(key in spec for key in LENGTH_KEYS)
    return {key: value for key, value in DEFAULT_GRID.items() if not (has_lengths and key in LENGTH_KEYS)}


def _case_table(case: Case, shared: Spec) -> dict[str, Any]:
    """The ``[[cases]]`` table of ``case``, without the values in ``shared``."""
    table = {key: getattr(case, key) for key in ("method", "model", "prompt_len", "completion_len", "batch_size")}
    table |= {key: getattr(case, key) for key in FIELD_KEYS if getattr(case, key) != shared[key]}
    values = {name: NONE if value is None else value for name, value in case.options.flat().items()}
    inherited = dotted(shared["options"])
    differing = {name: value for name, value in values.items() if value != inherited.get(name, NONE)}
    return {**table, **({"options": _nested(differing)} if differing else {})}


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
        name: NONE if value is None else value
        for name, value in values.items()
        if value is not None or defaults[name] is not None
    }


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
