"""The cases of a grid: every combination of the methods, models, sizes and options of a spec."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from rlhfbench.cases.option_grid import combinations
from rlhfbench.cases.spec import FIELD_KEYS, NONE, Spec, dotted
from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.config.options import MAX_COUNT, Options, unknown_option
from rlhfkernels.config.rules import accepts, shown
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import METHODS, select


def cases_of_grid(where: str, spec: Spec, problems: list[str]) -> list[Case]:
    """Every combination in ``spec``, by model, batch size, length, method and options; appends to ``problems``."""
    found: list[str] = []
    methods = _select(read_names(where, spec, "methods", found), found)
    models = read_names(where, spec, "models", found)
    lengths = _lengths(where, spec, found)
    batch_sizes = _integers(where, spec, "batch_sizes", 1, found)
    grid = combinations(_options(where, spec.get("options", {}), found))
    shared = {key: spec[key] for key in FIELD_KEYS if key in spec}
    # A case of stand-in sizes: rules that need no size are checked even if the sizes are wrong.
    for method, options in itertools.product(methods or list(METHODS)[:1], grid):
        own = _data_of(method, options, methods or list(METHODS))  # a data file may be an unknown method's
        batch_size = _smallest_batch(options)
        if batch_size <= MAX_COUNT:  # else no batch is large enough, which the cases themselves say
            found += _try_case(method, "-", (1, 1), batch_size, shared, own)[1]
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
    return math.prod(part for part in parts if isinstance(part, int) and 0 < part <= MAX_COUNT)


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


def read_names(where: str, spec: Spec, key: str, problems: list[str]) -> list[str]:
    """The names under ``key`` of a spec, one or a list; appends to ``problems``."""
    values = _values(where, spec, key, problems)
    problems += [f"{where}{key} has {shown(v)}: it must be a name." for v in values if not isinstance(v, str) or not v]
    return [v for v in values if isinstance(v, str) and v]


def _integers(where: str, spec: Spec, key: str, minimum: int, problems: list[str]) -> list[int]:
    values = _values(where, spec, key, problems)
    good = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and minimum <= v <= MAX_COUNT]
    for value in values:
        if isinstance(value, int) and value > MAX_COUNT:
            problems.append(f"{where}{key} has {shown(value)}: it must be at most {MAX_COUNT}.")
        elif type(value) is not int or value < minimum:
            problems.append(f"{where}{key} has {shown(value)}: it must be an integer of at least {minimum}.")
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
    if "prompt_fraction" in spec:
        problems.append(f"{where}prompt_fraction is given beside prompt_lens and completion_lens: it is of seq_lens.")
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


def split_length(seq_len: int, prompt_fraction: float) -> tuple[int, int]:
    """(prompt, completion) tokens of a sequence. The completion gets the larger half of an odd length."""
    # 0.7 * 10 is 6.999… in binary and must give 7.
    prompt_len = min(max(math.floor(seq_len * prompt_fraction + 1e-9), 1), seq_len - 1)
    return prompt_len, seq_len - prompt_len


def _options(where: str, table: object, problems: list[str]) -> dict[str, Any]:
    """The options of a spec by dotted name, with "none" as ``None``. The case checks their values."""
    if not isinstance(table, Mapping):
        problems.append(f"{where}options is {shown(table)}: it must be a table.")
        return {}
    annotations = option_annotations()
    options: dict[str, Any] = {}
    for name, value in dotted(table).items():
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
    return None if value == NONE else value
