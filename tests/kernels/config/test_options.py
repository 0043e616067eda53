from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.config.meanings import option_meanings
from rlhfkernels.config.options import RENAMED_OPTIONS, Options, option_fields
from rlhfkernels.errors import CaseError

GOOD = {"method": "hydra", "model": "tiny", "prompt_len": 4, "completion_len": 4, "batch_size": 4}
# Options whose value must fit another field of the case.
TIED = (
    "optimizer.warmup_steps",
    "optimizer.max_steps",
    "ppo.num_mini_batches",
    "engine.micro_batch_size",
    "engine.backend",
    "engine.cuda_graphs",
    "rollout.reward_model",
    "data.prompts",
    "data.demonstrations",
    "data.pairs",
    *(name for name in Options().flat() if name.startswith("parallel.")),
)


def is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


ANY_OPTIONS = st.fixed_dictionaries(
    {}, optional={name: st.from_type(kind).filter(is_finite) for name, kind in option_annotations().items()}
)


@given(ANY_OPTIONS)
def test_options_are_read_back_by_dotted_name(values: dict[str, object]) -> None:
    options = Options.of(values)
    assert options.flat() == {**Options().flat(), **values}
    assert Options.of(options.flat()) == options
    assert Options().replace(values).replace(Options().flat()) == Options()


@given(ANY_OPTIONS)
def test_every_option_survives_a_record(values: dict[str, object]) -> None:
    free = {name: value for name, value in values.items() if name not in TIED}
    case = Case(**GOOD, options=Options.of(free))
    again = Case.from_dict(json.loads(json.dumps(case.to_dict())))
    assert again == case
    assert again.id == case.id
    assert (again.id == Case(**GOOD).id) == (case.options == Options())


def test_every_option_has_a_meaning_of_its_own() -> None:
    meanings = option_meanings()
    assert list(meanings) == list(Options().flat())
    assert all(meanings.values())
    assert len(set(meanings.values())) == len(meanings)
    assert meanings["lora.alpha"] == (
        "the low-rank product is multiplied by ``alpha / r``, as in PEFT. ``None`` is ``r``, a factor of 1. "
        "Hydra-RLHF's code used an alpha of 1."
    )
    assert meanings["ppo.num_mini_batches"] == "optimizer steps per epoch."


def test_every_option_has_a_rule() -> None:
    assert list(option_annotations()) == list(Options().flat()) == [name for name, _ in option_fields()]


@pytest.mark.parametrize(("old", "new"), RENAMED_OPTIONS.items())
def test_an_old_name_is_no_option_and_its_new_name_is_one(old: str, new: str) -> None:
    assert old not in option_annotations()
    assert new in option_annotations()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ppo.gama", "option 'ppo.gama' is unknown: did you mean 'ppo.gamma' or 'ppo.lam'?"),
        ("gamma", "option 'gamma' is now called 'ppo.gamma'."),
        ("pp.gamma", "option 'pp.gamma' is unknown: did you mean 'ppo.gamma'"),
    ],
)
def test_a_name_of_no_option_is_one_sentence_with_the_nearest_names(name: str, sentence: str) -> None:
    with pytest.raises(CaseError) as error:
        Options.of({"lora.r": 8, name: 1})
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lora.r": 8}, "options is {'lora.r': 8}: it must be Options, as from Options.of({'lora.r': 8})."),
        (None, "options is None: it must be Options, as from Options.of({'lora.r': 8})."),
        (Options(lora={"r": 8}), "lora is {'r': 8}: it must be LoraOptions."),  # type: ignore[arg-type]
    ],
)
def test_options_of_another_type_are_one_sentence(options: object, sentence: str) -> None:
    with pytest.raises(CaseError) as error:
        Case(**GOOD, options=options)  # type: ignore[arg-type]
    assert error.value.problems == (sentence,)
