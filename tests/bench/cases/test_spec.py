import pytest

from rlhfbench.cases.spec import override, parse_option, plural, read_spec
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError
from rlhfkernels.config.options import RENAMED_OPTIONS

GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}


def problems(spec):
    with pytest.raises(SweepError) as caught:
        Sweep.from_spec(spec)
    return caught.value.problems


def test_a_sweep_file_that_is_absent_or_not_toml(tmp_path):
    with pytest.raises(SweepError, match="cannot be read: No such file"):
        read_spec(tmp_path / "absent.toml")
    (tmp_path / "sweep.toml").write_text("methods = [")
    with pytest.raises(SweepError, match="is not TOML"):
        read_spec(tmp_path / "sweep.toml")


def test_flags_win_over_keys_of_a_file():
    spec = {**GRID, "prompt_lens": [4], "completion_lens": [4], "options": {"ppo": {"gamma": 0.5, "lam": 0.5}}}
    merged = override(spec, {"seq_lens": [16], "device": "cuda", "options": {"ppo.lam": 0.9}})
    assert merged["seq_lens"] == [16]
    assert "prompt_lens" not in merged
    assert merged["options"] == {"ppo.gamma": 0.5, "ppo.lam": 0.9}
    assert merged["device"] == "cuda"


@pytest.mark.parametrize("malformed", [3, "lora.r=64"])
def test_options_that_are_no_table_are_reported_beside_others(malformed):
    sentence = f"options is {malformed!r}: it must be a table."
    assert problems(override({**GRID, "options": malformed}, {"options": {"ppo.lam": 0.9}})) == (sentence,)
    assert problems(override({"options": {"ppo.lam": 0.9}}, {**GRID, "options": malformed})) == (sentence,)
    table = {"method": "hydra", "model": "tiny", "seq_len": 8, "batch_size": 1, "options": {"ppo.lam": 0.9}}
    assert problems({"options": malformed, "cases": [table]}) == (f"cases[1]: {sentence}",)


def test_flags_win_over_listed_cases_but_add_no_grid():
    spec = Sweep.from_spec({**GRID, "methods": ["hydra", "lora"]}).to_spec()
    merged = Sweep.from_spec(override(spec, {"device": "cuda", "options": {"ppo.gamma": 0.5}}))
    assert {(case.device, case.options.ppo.gamma) for case in merged.cases} == {("cuda", 0.5)}
    assert len(merged.cases) == 2
    with pytest.raises(SweepError, match="methods cannot be given for a sweep file that lists its"):
        override(spec, {"methods": ["full"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ppo.gamma=1", ("ppo.gamma", 1.0)),
        ("engine.logprob_chunk_size=64", ("engine.logprob_chunk_size", 64)),
        ("engine.logprob_chunk_size=6.5", ("engine.logprob_chunk_size", "6.5")),
        ("engine.gradient_checkpointing=True", ("engine.gradient_checkpointing", True)),
        ("ppo.reward_clip=none", ("ppo.reward_clip", None)),
        ("rollout.stop_token_id=5", ("rollout.stop_token_id", 5)),
        ("lora.target_modules=q_proj,v_proj", ("lora.target_modules", "q_proj,v_proj")),
        ("lora.target_modules=none", ("lora.target_modules", "none")),
        ("data.prompts=a=b", ("data.prompts", "a=b")),
    ],
)
def test_an_option_of_the_command_line_has_the_type_of_its_field(text, expected):
    name, value = parse_option(text)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


def test_malformed_options():
    with pytest.raises(SweepError, match="write it as KEY=VALUE"):
        parse_option("ppo.gamma")
    with pytest.raises(SweepError, match=r"did you mean 'ppo\.gamma'"):
        parse_option("ppo.gama=1")


@pytest.mark.parametrize(("old", "new"), RENAMED_OPTIONS.items())
def test_an_old_name_of_an_option_reports_the_new_name(old, new, tmp_path):
    sentence = f"option {old!r} is now called {new!r}."
    with pytest.raises(SweepError) as caught:
        parse_option(f"{old}=1")
    assert caught.value.problems == (sentence,)
    (tmp_path / "sweep.toml").write_text(f"[options]\n{old} = 1\n")
    assert problems(read_spec(tmp_path / "sweep.toml")) == (sentence,)
    table = {"method": "hydra", "model": "tiny", "seq_len": 8, "batch_size": 1, "options": {old: 1}}
    assert problems({"cases": [table]}) == (f"cases[1]: {sentence}",)


def test_a_sweep_key_that_became_an_option_reports_its_name():
    assert problems({**GRID, "lora_rank": 4}) == ("sweep key 'lora_rank' is now the option 'lora.r'.",)
    table = {"method": "hydra", "model": "tiny", "seq_len": 8, "batch_size": 1, "lora_rank": 4}
    assert problems({"cases": [table]}) == ("cases[1]: sweep key 'lora_rank' is now the option 'lora.r'.",)


@pytest.mark.parametrize("key", ["method", "model", "seq_len", "prompt_len", "completion_len", "batch_size"])
def test_a_key_in_both_forms_is_refused(key):
    spec = {key: 1, f"{key}s": [2]}
    with pytest.raises(SweepError) as error:
        plural(spec)
    assert error.value.problems == (f"sweep key '{key}' is given beside '{key}s': give one of the two.",)
