import builtins
import io
import json
import shutil

import pytest

from rlhfbench.cases import model_facts
from rlhfkernels.errors import ModelError
from rlhfkernels.models.presets import PRESETS


def sentence(model):
    with pytest.raises(ModelError) as caught:
        model_facts.inspect_model(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(name):
    facts = model_facts.inspect_model(name)
    assert (facts.model_type, facts.max_positions) == (PRESETS[name].model_type, PRESETS[name].max_positions)


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_sequence_length"])
def test_a_checkpoint_folder(checkpoint, key):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "gpt2", key: 16}))
    facts = model_facts.inspect_model(str(checkpoint))
    assert (facts.model_type, facts.max_positions) == ("gpt2", 16)


def test_a_number_below_0_is_no_limit_of_positions(checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "xlnet", "max_position_embeddings": -1}))
    assert model_facts.inspect_model(str(checkpoint)).max_positions is None


def test_folders_without_a_model(tmp_path, checkpoint):
    assert "holds no model: it has no config.json" in sentence(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert "adapters without their model" in sentence(tmp_path)
    (checkpoint / "model.safetensors").unlink()
    assert model_facts.inspect_model(str(checkpoint)).max_positions == 16  # a plan needs no weights


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config(checkpoint, text):
    (checkpoint / "config.json").write_text(text)
    assert "its config.json is no" in sentence(checkpoint)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers -1: it must be an integer from 1 to 10000."),
        ({"n_layer": 10**9}, "n_layer 1000000000: it must be an integer from 1 to 10000."),
        ({"hidden_size": 0}, "hidden_size 0: it must be an integer from 1 to 16777216."),
        ({"hidden_size": "x"}, "hidden_size 'x': it must be an integer from 1 to 16777216."),
        ({"num_attention_heads": 0}, "num_attention_heads 0: it must be an integer from 1 to 16777216."),
        ({"n_embd": True}, "n_embd True: it must be an integer from 1 to 16777216."),
        ({"vocab_size": -5}, "vocab_size -5: it must be an integer from 1 to 2147483647."),
        ({"vocab_size": 64.0}, "vocab_size 64.0: it must be an integer from 1 to 2147483647."),
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
    assert model_facts.inspect_model(str(checkpoint)).vocab_size == 8


def test_heads_with_a_width_of_their_own_need_not_divide_that_of_the_model(checkpoint):
    config = {"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 3, "head_dim": 16, "vocab_size": 8}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert model_facts.inspect_model(str(checkpoint)).vocab_size == 8


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
        ("HFValidationError", "a model on the hub cannot have this name"),
        ("OSError", "the hub does not answer (OSError)"),
        ("ValueError", "the hub does not answer (ValueError)"),
    ],
)
def test_a_hub_id_that_cannot_be_downloaded(monkeypatch, error, says):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*_, **__):
        raise (getattr(errors, error, None) or getattr(builtins, error))("long\ntext")

    monkeypatch.setattr(model_facts, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = sentence("some-org/some-model")
    assert says in text
    assert "model 'some-org/some-model'" in text


def test_a_hub_id_without_a_network(monkeypatch):
    def connect(address, timeout):
        assert timeout <= 5
        raise OSError("no route")

    monkeypatch.setattr(model_facts.urllib.request, "getproxies", dict)
    monkeypatch.setattr(model_facts.socket, "create_connection", connect)
    text = sentence("some-org/not-on-this-machine")
    assert text == (
        "model 'some-org/not-on-this-machine': it is not on this machine, and the hub cannot be reached: "
        "is there a network?"
    )


@pytest.mark.parametrize(
    ("endpoint", "asked"),
    [
        ("https://huggingface.co", ("huggingface.co", 443)),
        ("http://mirror", ("mirror", 80)),
        ("http://mirror:8080/hub", ("mirror", 8080)),
    ],
)
def test_the_hub_is_asked_at_the_port_of_its_address(monkeypatch, endpoint, asked):
    from huggingface_hub import constants

    addresses = []

    def connect(address, timeout):
        addresses.append(address)
        return io.BytesIO()  # can be closed

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(model_facts.urllib.request, "getproxies", dict)
    monkeypatch.setattr(model_facts.socket, "create_connection", connect)
    assert model_facts._is_hub_reachable()
    assert addresses == [asked]


def test_behind_a_proxy_no_direct_connection_is_tried(monkeypatch):
    monkeypatch.setattr(model_facts.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr(model_facts.socket, "create_connection", lambda *_, **__: pytest.fail("asked the hub"))
    assert model_facts._is_hub_reachable()


def test_the_revision_of_a_hub_snapshot_is_known(monkeypatch, checkpoint, tmp_path):
    import huggingface_hub

    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    shutil.copytree(checkpoint, snapshot)
    monkeypatch.setattr(model_facts, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(snapshot / "config.json"))
    assert model_facts.inspect_model("org/name").revision == "0123abc"
    assert model_facts.inspect_model(str(snapshot)).revision == "0123abc"
    assert model_facts.inspect_model(str(checkpoint)).revision is None
    assert model_facts.inspect_model("tiny").revision is None


def test_a_hub_id(monkeypatch, checkpoint):
    import huggingface_hub

    monkeypatch.setattr(model_facts, "_is_hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(checkpoint / "config.json"))
    assert model_facts.inspect_model("some-org/some-model").max_positions == 16
