import importlib.metadata
import json
import shutil
import subprocess
import sys

import pytest

from rlhfbench.cases import preflight
from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError
from rlhfkernels.errors import ModelError
from rlhfkernels.models.presets import PRESETS

# The smallest file with a tensor, of no elements.
_HEADER = b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER
GRID = {"methods": ["hydra"], "models": ["tiny"], "seq_lens": [8], "batch_sizes": [1]}


def sentence(model):
    with pytest.raises(ModelError) as caught:
        preflight.inspect_model(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def problems(**spec):
    with pytest.raises(SweepError) as caught:
        preflight.check(Sweep.from_spec({**GRID, **spec}))
    return caught.value.problems


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 16}))
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(name):
    facts = preflight.inspect_model(name)
    assert (facts.model_type, facts.max_positions) == (PRESETS[name].model_type, PRESETS[name].max_positions)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_sequence_length"])
def test_a_checkpoint_folder(checkpoint, key):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2", key: 16}))
    facts = preflight.inspect_model(str(checkpoint))
    assert (facts.model_type, facts.max_positions) == ("gpt2", 16)


def test_folders_without_a_model(tmp_path, checkpoint):
    assert "holds no model: it has no config.json" in sentence(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "adapters without their model" in sentence(tmp_path)
    (checkpoint / "model.safetensors").unlink()
    assert "it has no weights" in sentence(checkpoint)
    (checkpoint / "pytorch_model-00001-of-00002.bin").touch()
    assert preflight.inspect_model(str(checkpoint)).max_positions == 16


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    assert "its config.json is no" in sentence(checkpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers -1: it must be a whole number from 1 to 10000."),
        ({"n_layer": 10**9}, "n_layer 1000000000: it must be a whole number from 1 to 10000."),
        ({"hidden_size": 0}, "hidden_size 0: it must be a whole number from 1 to 16777216."),
        ({"hidden_size": "x"}, "hidden_size 'x': it must be a whole number from 1 to 16777216."),
        ({"num_attention_heads": 0}, "num_attention_heads 0: it must be a whole number from 1 to 16777216."),
        ({"n_embd": True}, "n_embd True: it must be a whole number from 1 to 16777216."),
        ({"vocab_size": -5}, "vocab_size -5: it must be a whole number from 1 to 2147483647."),
        ({"vocab_size": 64.0}, "vocab_size 64.0: it must be a whole number from 1 to 2147483647."),
        ({"num_attention_heads": 3, "hidden_size": 32}, "num_attention_heads 3: it must divide hidden_size 32."),
        ({"n_head": 3, "n_embd": 32}, "n_head 3: it must divide n_embd 32."),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_key_value_heads 3: it must divide num_attention_heads 4.",
        ),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 0},
            "num_key_value_heads 0: it must divide num_attention_heads 4.",
        ),
    ],
)
def test_sizes_that_no_model_has(checkpoint, change, says):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2", **change}))
    assert sentence(checkpoint) == f"model '{checkpoint}' is invalid: its config.json has {says}"


def test_a_size_may_be_absent_or_one_for_each_layer(checkpoint):
    config = {"model_type": "gpt2", "vocab_size": 8, "num_attention_heads": [2, 4], "hidden_size": None}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert preflight.inspect_model(str(checkpoint)).vocab_size == 8


def test_heads_with_a_width_of_their_own_need_not_divide_that_of_the_model(checkpoint):
    config = {"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 3, "head_dim": 16, "vocab_size": 8}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert preflight.inspect_model(str(checkpoint)).vocab_size == 8


def test_broken_weights_are_found_once_a_model_and_not_by_a_plan(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"")
    grid = {"models": [str(checkpoint)], "batch_sizes": [1, 2], "methods": ["hydra", "sft"]}
    assert problems(**grid) == (f"model '{checkpoint}' is invalid: its model.safetensors is empty.",)
    preflight.check_models(Sweep.from_spec({**GRID, **grid}))


def test_files_and_paths(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "its model.gguf is empty." in sentence(tmp_path / "model.gguf")
    (tmp_path / "model.bin").touch()
    assert "it must be a .gguf file" in sentence(tmp_path / "model.bin")
    assert "does not exist" in sentence(tmp_path / "absent")
    assert "does not exist" in sentence("./absent")


def test_an_unknown_model_suggests_the_nearest_preset():
    assert "model 'tinny' is unknown: did you mean 'tiny'?" in sentence("tinny")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("LocalEntryNotFoundError", "the hub cannot be reached"),
        ("EntryNotFoundError", "it holds no model"),
        ("OSError", "the hub does not answer (OSError)"),
    ],
)
def test_a_hub_id_that_cannot_be_downloaded(monkeypatch, error, says):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*_, **__):
        raise getattr(errors, error, OSError)("long\ntext")

    monkeypatch.setattr(preflight, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = sentence("some-org/some-model")
    assert says in text
    assert "model 'some-org/some-model'" in text


def test_a_hub_id_without_a_network(monkeypatch):
    def connect(address, timeout):
        assert timeout <= 5
        raise OSError("no route")

    monkeypatch.setattr(preflight.urllib.request, "getproxies", dict)
    monkeypatch.setattr(preflight.socket, "create_connection", connect)
    text = sentence("some-org/not-on-this-machine")
    assert text == (
        "model 'some-org/not-on-this-machine': it is not on this machine, and the hub cannot be reached: "
        "is there a network?"
    )


def test_behind_a_proxy_no_direct_connection_is_tried(monkeypatch):
    monkeypatch.setattr(preflight.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(preflight.socket, "create_connection", lambda *_, **__: pytest.fail("asked the hub"))
    assert preflight._is_hub_reachable()


def test_the_revision_of_a_hub_snapshot_is_known(monkeypatch, checkpoint, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    shutil.copytree(checkpoint, snapshot)
    monkeypatch.setattr(preflight, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))
    assert preflight.inspect_model("org/name").revision == "0123abc"
    assert preflight.inspect_model(str(snapshot)).revision == "0123abc"
    assert preflight.inspect_model(str(checkpoint)).revision is None
    assert preflight.inspect_model("tiny").revision is None


def test_a_hub_id(monkeypatch, checkpoint):
    import huggingface_hub

    monkeypatch.setattr(preflight, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(checkpoint / "config.json"))
    assert preflight.inspect_model("some-org/some-model").max_positions == 16


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


def test_devices_are_counted_by_nvml(monkeypatch):
    calls = []
    names = {"nvmlInit": None, "nvmlShutdown": None, "nvmlDeviceGetCount": 3}
    nvml = type("Nvml", (), {n: staticmethod(lambda n=n, v=v: calls.append(n) or v) for n, v in names.items()})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert preflight.num_cuda_devices() == 3
    assert calls == ["nvmlInit", "nvmlDeviceGetCount", "nvmlShutdown"]


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
        "engine.backend is 'native': its C code cannot be compiled here (CC is '/nonexistent', which is no command).",
    )
    preflight.check_models(Sweep.from_spec({**GRID, "options": {"engine.backend": "native"}}))
    assert preflight.check(Sweep.from_spec(GRID))  # ``auto`` asks for nothing
    assert preflight.notices(Sweep.from_spec(GRID)) == [
        "engine.backend is 'auto': torch runs in place of the ops in C (CC is '/nonexistent', which is no command)."
    ]
    assert preflight.notices(Sweep.from_spec({**GRID, "options": {"engine.backend": "torch"}})) == []


def test_an_option_of_a_family_without_a_method_in_the_sweep_is_noticed():
    options = {"engine.backend": "torch", "dpo.beta": 0.2, "ppo.gamma": 0.9, "lora.r": 4}
    sweep = Sweep.from_spec({**GRID, "options": options})
    assert preflight.notices(sweep) == ["dpo.beta is 0.2: no method of this sweep reads it."]
    with_dpo = Sweep.from_spec({**GRID, "methods": ["hydra", "dpo"], "options": options})
    assert preflight.notices(with_dpo) == []
    for setting in ("modern", "paper"):
        spec = {
            **GRID,
            "methods": ["sft"],
            "settings": [setting],
            "dtype": "float32",
            "options": {"engine.backend": "torch"},
        }
        assert preflight.notices(Sweep.from_spec(spec)) == []


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
