import dataclasses
import math
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfbench.cases.settings import setting_of
from rlhfbench.cases.sweep import Sweep, differences
from rlhfbench.errors import SweepError
from rlhfkernels.config.case import Case, option_annotations
from rlhfkernels.config.options import Options
from rlhfkernels.methods.table import METHODS

GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}


def problems(spec):
    with pytest.raises(SweepError) as caught:
        Sweep.from_spec(spec)
    return caught.value.problems


PPO_METHODS = ["full", "lora", "dynamic-lora", "joined-hydra", "hydra"]


def test_the_default_sweep_is_ppo_at_three_lengths_and_two_batch_sizes():
    cases = Sweep.from_spec({}).cases
    assert {case.method for case in cases} == set(PPO_METHODS)
    assert {case.model for case in cases} == {"tiny"}
    assert len({case.seq_len for case in cases}) >= 3
    assert len({case.batch_size for case in cases}) >= 2
    assert len(cases) == len(PPO_METHODS) * len({c.seq_len for c in cases}) * len({c.batch_size for c in cases})


def test_methods_are_selected_by_row_family_and_all():
    def methods_of(*names):
        return [case.method for case in Sweep.from_spec({**GRID, "methods": list(names)}).cases]

    assert methods_of("ppo") == PPO_METHODS
    assert methods_of("all") == list(METHODS)
    assert methods_of("hydra", "ppo", "lora") == ["hydra", "full", "lora", "dynamic-lora", "joined-hydra"]
    table = {"method": "ppo", "model": "tiny", "seq_len": 8, "batch_size": 1}
    assert [case.method for case in Sweep.from_spec({"cases": [table]}).cases] == PPO_METHODS
    assert "method 'dp' is unknown" in problems({**GRID, "methods": ["ppo", "dp"]})[0]


def test_singular_keys_and_single_values():
    spec = {"method": "hydra", "model": "tiny", "seq_len": 8, "batch_size": 1}
    assert Sweep.from_spec(spec) == Sweep.from_spec(GRID)


@pytest.mark.parametrize("cases", ["hydra", [{"method": "hydra"}]])
def test_what_is_no_case_is_one_sentence(cases):
    with pytest.raises(SweepError, match=r"^cases has .*: it must be a Case\.$"):
        Sweep(cases=tuple(cases))


def test_a_repeated_case_is_kept_once():
    assert len(Sweep.from_spec({**GRID, "seq_lens": [8, 8], "batch_sizes": [1, 1]}).cases) == 1


def test_a_share_of_the_prompt_beside_its_length_is_refused_and_an_inherited_one_left_out():
    lengths = {"prompt_lens": 4, "completion_lens": 6}
    said = "prompt_fraction is given beside prompt_lens and completion_lens: it is of seq_lens."
    assert problems({"methods": ["lora"], **lengths, "prompt_fraction": 0.2}) == (said,)
    table = {"method": "lora", "model": "tiny", "batch_size": 1}
    with_both = {**table, **lengths, "prompt_fraction": 0.2}
    assert problems({"cases": [with_both]}) == (f"cases[1]: {said}",)
    tables = [{**table, **lengths}, {**table, "seq_len": 10}]
    cases = Sweep.from_spec({"prompt_fraction": 0.2, "cases": tables}).cases
    assert [(case.prompt_len, case.completion_len) for case in cases] == [(4, 6), (2, 8)]


def test_explicit_cases_come_after_the_grid_and_inherit_what_is_shared():
    table = {"method": "lora", "model": "gpt2", "seq_len": 4, "batch_size": 2, "options": {"ppo.kl_coef": 1}}
    spec = {"dtype": "bfloat16", "options": {"ppo": {"gamma": 0.5, "kl_coef": 0.5}}, "cases": [table]}
    (case,) = Sweep.from_spec(spec).cases
    assert (case.method, case.model, case.dtype, case.seq_len) == ("lora", "gpt2", "bfloat16", 4)
    assert (case.options.ppo.gamma, case.options.ppo.kl_coef) == (0.5, 1.0)
    assert [c.method for c in Sweep.from_spec({**spec, **GRID}).cases] == ["hydra", "lora"]


def test_every_problem_is_reported_at_once_with_the_nearest_names():
    found = "\n".join(
        problems(
            {
                "methods": ["hydr", "full"],
                "models": ["tiny"],
                "seq_lens": [0, 8, "x"],
                "batch_sizes": [-1],
                "devcie": "cpu",
                "device": "gpu",
                "dtype": "float23",
                "options": {"lora": {"r": 0}, "ppo.gama": 1.0},
            }
        )
    )
    for text in (
        "method 'hydr' is unknown: did you mean 'hydra'",
        "seq_lens has 0: it must be an integer of at least 2.",
        "seq_lens has 'x': it must be an integer of at least 2.",
        "batch_sizes has -1: it must be an integer of at least 1.",
        "sweep key 'devcie' is unknown: did you mean 'device'",
        "device 'gpu' is unknown",
        "dtype 'float23' is unknown: did you mean 'float32'",
        "option 'ppo.gama' is unknown: did you mean 'ppo.gamma'",
    ):
        assert text in found
    assert len(found.splitlines()) == len(set(found.splitlines()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": []}, "methods is empty: it must have at least one value."),
        ({"methods": [3]}, "methods has 3: it must be a name."),
        ({"models": [""]}, "models has '': it must be a name."),
        ({"batch_sizes": [True]}, "batch_sizes has True: it must be an integer of at least 1."),
        ({"batch_sizes": [1.5]}, "batch_sizes has 1.5: it must be an integer of at least 1."),
        ({"batch_sizes": [1, True]}, "batch_sizes has True: it must be an integer of at least 1."),
        ({"seq_lens": [64, 64.0]}, "seq_lens has 64.0: it must be an integer of at least 2."),
        ({"seq_lens": [1]}, "seq_lens has 1: it must be an integer of at least 2."),
        ({"prompt_lens": [4]}, "seq_lens is given with prompt_lens or completion_lens: give one or the other."),
        ({"prompt_fraction": 1}, "prompt_fraction is 1: it must be a number between 0 and 1."),
        ({"prompt_fraction": "half"}, "prompt_fraction is 'half': it must be a number between 0 and 1."),
        ({"options": 3}, "options is 3: it must be a table."),
        ({"options": {"lora.target_modules": 3}}, "lora.target_modules is 3: it must be a non-empty string."),
        (
            {"options": {"engine": {"gradient_checkpointing": 1}}},
            "engine.gradient_checkpointing is 1: it must be true or false.",
        ),
        ({"options": {"ppo.gamma": "x"}}, "ppo.gamma is 'x': it must be a finite number from 0 to 1."),
        ({"options": {"ppo.num_mini_batches": 3}, "batch_sizes": [2]}, "it must divide batch_size 2."),
        ({"cases": 3}, "cases must be tables: write each below a line [[cases]]."),
        ({"cases": []}, "cases is empty: it must have at least one table."),
        ({"model": "gpt2"}, "sweep key 'model' is given beside 'models': give one of the two."),
        (
            {"cases": [{"method": "lora", "methods": []}]},
            "cases[1]: sweep key 'method' is given beside 'methods': give",
        ),
        ({"cases": [{"method": "hydra"}]}, "cases[1] lacks model, batch_size, prompt_len and completion_len."),
        ({"cases": [{"metod": "hydra"}]}, "cases[1]: sweep key 'metod' is unknown: did you mean 'methods'"),
    ],
)
def test_a_wrong_spec_is_reported_in_one_sentence(change, says):
    assert any(says in problem for problem in problems({**GRID, **change}))


def settings_of(cases):
    return [(setting_of(dataclasses.asdict(case.options)), case.method, case.batch_size) for case in cases]


def test_every_case_is_made_under_every_setting_and_loads_back(tmp_path):
    spec = {**GRID, "methods": ["lora", "hydra"], "batch_sizes": [1, 2], "settings": ["paper", "modern", "paper"]}
    sweep = Sweep.from_spec(spec)
    assert settings_of(sweep.cases) == [
        (setting, method, batch_size)
        for batch_size in (1, 2)
        for method in ("lora", "hydra")
        for setting in ("paper", "modern")
    ]
    assert {(case.dtype, case.options.lora.r) for case in sweep.cases} == {("float32", 16), ("bfloat16", 128)}
    (tmp_path / "sweep.toml").write_text(sweep.to_toml())
    assert Sweep.from_file(tmp_path / "sweep.toml") == sweep


def test_keys_of_a_spec_win_over_its_settings():
    table = {"method": "full", "model": "tiny", "seq_len": 4, "batch_size": 1, "options": {"lora.r": 3}}
    spec = {**GRID, "setting": "paper", "dtype": "float32", "options": {"optimizer.warmup_steps": 7}, "cases": [table]}
    one, two = Sweep.from_spec(spec).cases
    for case in (one, two):
        assert (case.dtype, case.options.engine.attn_implementation, case.options.optimizer.warmup_steps) == (
            "float32",
            "eager",
            7,
        )
    assert (one.options.lora.r, two.options.lora.r) == (128, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": ["papr", "modern"]}, "setting 'papr' is unknown: did you mean 'paper'? Valid: modern, paper."),
        ({"settings": []}, "settings is empty: it must have at least one value."),
        ({"settings": 3}, "settings has 3: it must be a name."),
        (
            {"setting": "paper", "settings": ["modern"]},
            "sweep key 'setting' is given beside 'settings': give one of the",
        ),
        ({"setings": ["paper"]}, "sweep key 'setings' is unknown: did you mean 'settings'"),
    ],
)
def test_a_wrong_setting_is_reported_once_beside_other_problems(change, says):
    found = problems({**GRID, **change, "dtype": "float23"})
    assert sum(says in problem for problem in found) == 1
    assert sum("float23" in problem for problem in found) == 1


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


def is_storable(value):
    """True if a sweep file can hold the value: infinity breaks a rule, and "none" stands for ``None``."""
    return value != "none" and not (isinstance(value, float) and not math.isfinite(value))


def is_allowed(options):
    """False for 8-bit states of float64 adapters, which bitsandbytes does not have."""
    return (options.get("optimizer.name"), options.get("lora.dtype")) != ("adamw8bit", "float64")


ANY_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        name: st.from_type(kind).filter(is_storable) for name, kind in option_annotations().items() if name not in TIED
    },
)
CASES = st.builds(
    Case,
    method=st.sampled_from(sorted(METHODS)),
    model=st.sampled_from(["tiny", "./a folder", 'odd"name']),
    prompt_len=st.integers(1, 99),
    completion_len=st.integers(1, 99),
    batch_size=st.integers(1, 9),
    device=st.sampled_from(["cpu", "cuda:1"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 9),
    options=ANY_OPTIONS.filter(is_allowed).map(Options.of),
)


@settings(max_examples=60)
@given(st.lists(CASES, min_size=1, max_size=5, unique_by=lambda case: case.id))
def test_a_resolved_sweep_loads_back_to_the_identical_cases(cases):
    sweep = Sweep(cases=tuple(cases))
    again = Sweep.from_spec(tomllib.loads(sweep.to_toml()))
    assert again == sweep
    assert [case.id for case in again.cases] == [case.id for case in cases]


def test_a_sweep_file(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(
        'methods = ["hydra", "lora"]\nmodel = "tiny"\nseq_lens = [8]\nbatch_sizes = [1]\n'
        '[options.ppo]\nreward_clip = "none"\nkl_coef = 1\n'
        '[[cases]]\nmethod = "full"\nmodel = "tiny"\nseq_len = 4\nbatch_size = 1\n'
    )
    cases = Sweep.from_file(path).cases
    assert [case.method for case in cases] == ["hydra", "lora", "full"]
    assert all(case.options.ppo.reward_clip is None and repr(case.options.ppo.kl_coef) == "1.0" for case in cases)


def test_differences_between_two_sweeps():
    asked = Sweep.from_spec({**GRID, "batch_sizes": [1, 8]}).cases
    there = Sweep.from_spec({**GRID, "options": {"ppo.gamma": 0.5}}).cases
    assert differences(asked, there) == "batch_size 1, 8 instead of 1; ppo.gamma 1.0 instead of 0.5"
    pair = [
        dataclasses.replace(asked[0], options=Options.of({"lora.r": rank}), batch_size=size)
        for rank, size in ((1, 1), (2, 2))
    ]
    other = [
        dataclasses.replace(asked[0], options=Options.of({"lora.r": rank}), batch_size=size)
        for rank, size in ((1, 2), (2, 1))
    ]
    assert differences(pair, other) == "other combinations of the same values"


def test_methods_are_rows_families_and_all():
    def methods(*names):
        return [case.method for case in Sweep.from_spec({**GRID, "methods": list(names)}).cases]

    assert methods("PPO", "hydra") == methods("ppo") == ["full", "lora", "dynamic-lora", "joined-hydra", "hydra"]
    assert methods("sft") == ["sft"]
    assert methods("SFT") == ["sft", "sft-lora"]
    assert methods("all") == list(METHODS)
    (sentence,) = problems({**GRID, "methods": ["hydr"]})
    assert sentence.startswith("method 'hydr' is unknown: did you mean 'hydra'")


def test_the_paths_of_data_files_and_local_models_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tiny", "m", "org/name"):
        (tmp_path / name).mkdir(parents=True)

    def models(*names):
        return [case.model for case in Sweep.from_spec({**GRID, "models": list(names)}).absolute().cases]

    assert models("tiny", "gpt2", "absent", "org/other") == ["tiny", "gpt2", "absent", "org/other"]
    assert models("./m") == models("~/m") == [str(tmp_path / "m")]
    assert models("org/name") == [str(tmp_path / "org" / "name")]
    options = {"rollout.reward_model": "./m", "data.prompts": "p.jsonl"}
    (case,) = Sweep.from_spec({**GRID, "methods": ["lora"], "options": options}).absolute().cases
    assert (case.options.rollout.reward_model, case.options.data.prompts) == (
        str(tmp_path / "m"), str(tmp_path / "p.jsonl"),
    )  # fmt: skip
    assert Sweep.from_spec(GRID).absolute() == Sweep.from_spec(GRID)
