import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhfbench.cases import preflight
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError
from rlhfkernels.data.files import Demonstration
from rlhfkernels.errors import DataError

GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}


def problems(**spec):
    with pytest.raises(SweepError) as caught:
        preflight.check(Sweep.from_spec({**GRID, **spec}))
    return caught.value.problems


def test_broken_weights_are_found_once_a_model_and_not_by_a_plan(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    grid = {"models": [str(checkpoint)], "batch_sizes": [1, 2], "methods": ["hydra", "sft"]}
    assert problems(**grid) == (f"model '{checkpoint}' is invalid: its model.safetensors is empty.",)
    preflight.check_models(Sweep.from_spec({**GRID, **grid}))


def test_a_length_beyond_the_positions(checkpoint):
    assert preflight.check(Sweep.from_spec({**GRID, "models": [str(checkpoint)], "seq_lens": [16]}))
    (problem,) = problems(models=[str(checkpoint)], seq_lens=[8, 17])
    assert problem.startswith("a length of 17 (8 + 9) is too long for model")
    assert "it has 16 positions" in problem


def test_a_reward_model_is_checked_too(checkpoint):
    def told(reward, **config):
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 16, **config}))
        return problems(methods=["lora"], options={"rollout.reward_model": reward}, seq_lens=[18])

    assert "model 'tinny' is unknown" in told("tinny")[0]
    assert told(str(checkpoint), vocab_size=50) == (
        f"a length of 18 (9 + 9) is too long for model '{checkpoint}': it has 16 positions.",
        f"rollout.reward_model is '{checkpoint}' with a vocabulary of 50: it must have as many tokens as model 'tiny', "
        "which has 8192.",
    )
    assert len(told(str(checkpoint))) == 1  # a vocabulary that only the loader knows
    assert set(preflight.check(Sweep.from_spec({**GRID, "methods": ["lora"]}))) == {"tiny"}


def test_cuda_without_a_cuda_device(monkeypatch):
    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 0)
    assert problems(device="cuda") == ("device 'cuda': this machine has no CUDA device.",)


def test_a_cuda_index_out_of_range(monkeypatch):
    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 2)
    assert problems(device="cuda:2") == ("device 'cuda:2': this machine has 2 CUDA devices, counted from 0.",)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cpu")
    assert problems(device="cuda:1") == ("device 'cuda:1': the installed torch is built for the CPU only.",)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu128")
    assert preflight.check(Sweep.from_spec({**GRID, "device": "cuda:1"}))


def test_an_optimizer_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    assert problems(options={"optimizer.name": "adamw8bit"}) == (
        "optimizer.name is 'adamw8bit': it needs bitsandbytes, which is not installed "
        "(pip install bitsandbytes; planning does not need it).",
    )
    preflight.check_models(Sweep.from_spec({**GRID, "options": {"optimizer.name": "adamw8bit"}}))


def test_a_backend_whose_package_is_not_installed(monkeypatch):
    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.11.0+cu128")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    spec = {"device": "cuda", "options": {"engine.backend": "triton"}}
    assert problems(**spec) == (
        "engine.backend is 'triton': it needs triton, which is not installed "
        "(pip install triton; planning does not need it).",
    )
    preflight.check_models(Sweep.from_spec({**GRID, **spec}))
    assert preflight.check(Sweep.from_spec({**GRID, "device": "cuda"}))  # ``auto`` asks for nothing


def test_the_native_backend_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/nonexistent")
    assert problems(options={"engine.backend": "native"}) == (
        "engine.backend is 'native': its C code cannot be compiled here (CC is '/nonexistent', not a command).",
    )
    preflight.check_models(Sweep.from_spec({**GRID, "options": {"engine.backend": "native"}}))
    assert preflight.check(Sweep.from_spec(GRID))  # ``auto`` asks for nothing
    assert preflight.notices(Sweep.from_spec(GRID)) == [
        "engine.backend is 'auto': torch runs in place of the ops in C (CC is '/nonexistent', not a command)."
    ]
    assert preflight.notices(Sweep.from_spec({**GRID, "options": {"engine.backend": "torch"}})) == []


def test_an_option_that_no_method_of_the_sweep_reads_is_noticed():
    options = {"engine.backend": "torch", "dpo.beta": 0.2, "ppo.gamma": 0.9, "lora.r": 4}
    sweep = Sweep.from_spec({**GRID, "options": options})
    assert preflight.notices(sweep) == ["dpo.beta is 0.2: no method of this sweep reads it."]
    with_dpo = Sweep.from_spec({**GRID, "methods": ["hydra", "dpo"], "options": options})
    assert preflight.notices(with_dpo) == []
    options = {"engine.backend": "torch", "rollout.temperature": 0.7, "lora.alpha": 8.0}
    unread = {
        "sft": ["rollout.temperature is 0.7", "lora.alpha is 8.0"],
        "dpo-lora": ["rollout.temperature is 0.7"],
        "best-of-n": ["lora.alpha is 8.0"],
        "hydra": [],
    }
    for method, names in unread.items():
        sweep = Sweep.from_spec({**GRID, "methods": [method], "options": options})
        found = preflight.notices(sweep)
        assert sorted(found) == sorted(f"{name}: no method of this sweep reads it." for name in names)
    for setting in ("modern", "paper"):
        spec = {
            **GRID,
            "methods": ["sft"],
            "settings": [setting],
            "dtype": "float32",
            "options": {"engine.backend": "torch"},
        }
        assert preflight.notices(Sweep.from_spec(spec)) == []


def test_a_stop_token_is_that_of_methods_that_sample():
    spec = {**GRID, "options": {"rollout.stop_token_id": 8192}}
    sentence = "rollout.stop_token_id is 8192: it must be below 8192, the vocabulary of model 'tiny'."
    preflight.check_models(Sweep.from_spec({**spec, "methods": ["sft", "dpo"]}))
    with pytest.raises(SweepError) as caught:
        preflight.check_models(Sweep.from_spec({**spec, "methods": ["sft", "best-of-n"]}))
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"])
def test_a_checkpoint_without_a_tokenizer_reads_no_data(tmp_path, name, checkpoint):
    (tmp_path / "p.jsonl").write_text('{"prompt": "hello"}\n')
    data = {"options": {"data.prompts": str(tmp_path / "p.jsonl")}}
    (problem,) = problems(models=str(checkpoint), **data)
    assert problem.startswith(f"model '{checkpoint}' is a folder without a tokenizer (tokenizer*, vocab*, ")
    assert preflight.check(Sweep.from_spec({**GRID, "models": str(checkpoint)}))
    (checkpoint / name).touch()
    assert preflight.check(Sweep.from_spec({**GRID, "models": str(checkpoint), **data}))


def test_prompts_are_read_before_anything_runs(tmp_path):
    (problem,) = problems(options={"data.prompts": str(tmp_path / "absent.jsonl")})
    assert "cannot be read: No such file" in problem


def test_every_problem_is_reported_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "num_cuda_devices", lambda: 0)
    found = problems(models=["tinny", "gpt2"], seq_lens=[1025], device="cuda", options={"data.prompts": str(tmp_path)})
    assert len(found) == 4


def test_preflight_imports_no_torch():
    code = (
        "import sys\nfrom rlhfbench.cases import preflight\nfrom rlhfbench.cli import main\n"
        "from rlhfbench.runs import runner\n"
        "from rlhfbench.cases.sweep import Sweep\n"
        "preflight.check(Sweep.from_spec({}))\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dtype_that_the_cpu_emulates_gives_one_warning(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    sweep = Sweep.from_spec({**GRID, "batch_sizes": [1, 2], "dtype": "bfloat16"})
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f\n")
    (notice,) = preflight.notices(sweep, cpuinfo)
    assert notice.startswith("dtype bfloat16 on cpu: this CPU has no instructions for it and emulates it")
    assert preflight.notices(Sweep.from_spec(GRID), cpuinfo) == []
    assert preflight.notices(Sweep.from_spec({**GRID, "dtype": "bfloat16", "device": "cuda"}), cpuinfo) == []
    assert preflight.notices(sweep, tmp_path / "absent") == []
    for words in ("fpu avx512_bf16", "Features\t: fp asimd bf16"):
        cpuinfo.write_text(words)
        assert preflight.notices(sweep, cpuinfo) == []


def test_a_tokenizer_config_that_cannot_be_read_is_one_sentence(monkeypatch, checkpoint):
    config = checkpoint / "tokenizer_config.json"
    config.write_text("{}")

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)  # root may read every file
    row = Demonstration(prompt=[{"role": "user", "content": "a"}], completion="b")
    with pytest.raises(DataError) as caught:
        preflight.check_chat_template(str(checkpoint), [row])
    assert str(caught.value) == f"model '{checkpoint}': its tokenizer_config.json cannot be read: Permission denied."
