import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.cases.grid import split_length
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError

GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}


def problems(spec):
    with pytest.raises(SweepError) as caught:
        Sweep.from_spec(spec)
    return caught.value.problems


@pytest.mark.parametrize(
    ("seq_len", "fraction", "expected"),
    [
        (800, 0.5, (400, 400)),
        (7, 0.5, (3, 4)),
        (2, 0.5, (1, 1)),
        (10, 0.7, (7, 3)),
        (10, 0.01, (1, 9)),
        (10, 0.99, (9, 1)),
    ],
)
def test_a_length_is_split(seq_len, fraction, expected):
    assert split_length(seq_len, fraction) == expected


@given(st.integers(2, 10_000), st.floats(0.001, 0.999))
def test_both_parts_of_a_split_have_tokens_and_sum_to_the_length(seq_len, fraction):
    prompt_len, completion_len = split_length(seq_len, fraction)
    assert prompt_len + completion_len == seq_len
    assert min(prompt_len, completion_len) >= 1
    assert abs(prompt_len - seq_len * fraction) <= 1


def test_prompt_and_completion_lengths_are_taken_in_pairs():
    spec = {**GRID, "prompt_lens": [8, 4], "completion_lens": 6}
    del spec["seq_lens"]
    assert [(c.prompt_len, c.completion_len) for c in Sweep.from_spec(spec).cases] == [(4, 6), (8, 6)]
    spec["completion_lens"] = [6, 7]
    assert [(c.prompt_len, c.completion_len) for c in Sweep.from_spec(spec).cases] == [(4, 7), (8, 6)]


def test_pairs_of_different_lengths():
    spec = {"methods": "hydra", "prompt_lens": [1, 2, 3], "completion_lens": [1, 2]}
    assert "3 values and completion_lens 2" in problems(spec)[0]


def test_cases_are_ordered_by_batch_size_length_and_method():
    spec = {"methods": ["lora", "full"], "models": "tiny", "seq_lens": [16, 8], "batch_sizes": [4, 1]}
    rows = [(case.batch_size, case.seq_len, case.method) for case in Sweep.from_spec(spec).cases]
    assert rows == [(b, s, m) for b in (1, 4) for s in (8, 16) for m in ("lora", "full")]


def test_micro_batches_are_given_for_all_batch_sizes_that_they_divide():
    spec = {"methods": "hydra", "models": "tiny", "seq_lens": [8], "batch_sizes": [4, 8]}
    options = {"engine.micro_batch_size": 2, "ppo.num_mini_batches": 2}
    assert [case.micro_batch_size for case in Sweep.from_spec({**spec, "options": options}).cases] == [2, 2]
    with pytest.raises(SweepError, match=r"engine.micro_batch_size is 3: it must divide the mini-batch of 4"):
        Sweep.from_spec({**spec, "options": {"engine.micro_batch_size": 3}})


@pytest.mark.parametrize(
    ("mini", "micro", "sentence"),
    [
        (100_000, 100_000, "ppo.num_mini_batches is 100000: it must divide batch_size 4."),
        (2**31, 1, "ppo.num_mini_batches is 2147483648: it must be an integer from 1 to 2147483647."),
    ],
)
def test_a_division_of_no_batch_is_one_sentence_about_what_was_given(mini, micro, sentence):
    options = {"ppo.num_mini_batches": mini, "engine.micro_batch_size": micro}
    assert problems({**GRID, "batch_sizes": [4], "options": options}) == (sentence,)


DATA = {"data.prompts": "p.jsonl", "data.pairs": "x.jsonl"}


def test_each_method_of_a_grid_takes_its_own_data_file_and_loads_back():
    sweep = Sweep.from_spec({**GRID, "methods": ["hydra", "dpo-lora", "sft"], "options": DATA})
    files = [(case.method, case.data_file) for case in sweep.cases]
    assert files == [("hydra", "p.jsonl"), ("dpo-lora", "x.jsonl"), ("sft", None)]
    assert Sweep.from_spec(tomllib.loads(sweep.to_toml())) == sweep


def test_a_data_file_that_no_method_of_the_grid_takes_is_one_sentence():
    assert problems({**GRID, "methods": ["sft", "dpo"], "options": {"data.prompts": "p.jsonl"}}) == (
        "data.prompts is 'p.jsonl': method 'sft' takes demonstrations, so it must be none.",
        "data.prompts is 'p.jsonl': method 'dpo' takes pairs, so it must be none.",
    )


def test_a_data_file_of_a_misspelt_method_is_no_second_mistake():
    (problem,) = problems({**GRID, "methods": ["dpoo"], "options": DATA})
    assert problem.startswith("method 'dpoo' is unknown: did you mean 'dpo'")
