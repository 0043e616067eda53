import pytest

from rlhfbench.cases.option_grid import combinations
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError

GRID = {"methods": "dpo-lora", "models": "tiny", "seq_lens": 8, "batch_sizes": 1}


def test_without_a_list_there_is_one_combination():
    assert combinations({}) == [{}]
    assert combinations({"lora.r": 2}) == [{"lora.r": 2}]


def test_every_combination_of_lists_comes_once():
    found = combinations({"lora.r": [2, 4], "ppo.gamma": 0.5, "dpo.beta": [1, 2, 2]})
    assert found == [{"ppo.gamma": 0.5, "lora.r": r, "dpo.beta": beta} for r in (2, 4) for beta in (1, 2)]


def test_stages_are_of_the_strategy_that_has_them():
    ranks = {"parallel.strategy": ["ddp", "deepspeed"], "parallel.zero_stage": [0, 3]}
    assert combinations(ranks) == [
        {"parallel.strategy": "ddp"},
        {"parallel.strategy": "deepspeed", "parallel.zero_stage": 0},
        {"parallel.strategy": "deepspeed", "parallel.zero_stage": 3},
    ]


def test_a_stage_that_no_strategy_has_stays_and_is_refused():
    with pytest.raises(SweepError, match=r"^parallel\.zero_stage is 1: ZeRO is DeepSpeed's, so .* must be 'deepspeed'"):
        Sweep.from_spec({**GRID, "options": {"parallel": {"strategy": ["ddp", "fsdp"], "zero_stage": [0, 1]}}})


def test_options_of_a_sweep_may_be_lists(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        'methods = ["dpo-lora", "hydra"]\nmodel = "tiny"\nseq_lens = [8]\nbatch_sizes = [1]\n'
        '[options]\nlora.r = [2, 4]\nlora.alpha = ["none", 3.0]\n'
    )
    sweep = Sweep.from_file(file)
    found = [(case.method, case.options.lora.r, case.options.lora.alpha) for case in sweep.cases]
    assert found == [(m, r, alpha) for m in ("dpo-lora", "hydra") for r in (2, 4) for alpha in (None, 3.0)]
    assert len({case.id for case in sweep.cases}) == 8
    file.write_text(sweep.to_toml())
    assert Sweep.from_file(file) == sweep


def test_a_list_is_checked_value_by_value():
    with pytest.raises(SweepError) as error:
        Sweep.from_spec({**GRID, "options": {"lora.r": [2, 0, "x"], "dpo.beta": []}})
    assert error.value.problems == (
        "option 'dpo.beta' is []: it must have at least one value.",
        "lora.r is 0: it must be an integer from 1 to 2147483647.",
        "lora.r is 'x': it must be an integer from 1 to 2147483647.",
    )
