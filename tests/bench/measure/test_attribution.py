import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.gpt_neox import GPTNeoXForCausalLM

from rlhfbench.measure.attribution import state_tensors, weights_by_part

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def names_by_part(model):
    """The names of the parameters by part, in the order of the first declaration."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for part, tensor in weights_by_part(model):
        if id(tensor) in names:
            found.setdefault(part, []).append(names.pop(id(tensor)))
    assert not names, "every parameter has a part"
    return found


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **changes))


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (llama, ["lm_head.weight"]),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)), None),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)), ["score.weight"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), []),
    ],
)
def test_heads_are_found_and_the_rest_is_base(model, heads):
    model = model()
    if heads is None:
        output = model.get_output_embeddings().weight
        heads = [name for name, parameter in model.named_parameters() if parameter is output]
    found = names_by_part(model)
    assert found.get("heads", []) == heads
    assert set(found) <= {"base", "heads"}
    assert len(found["base"]) == len(list(model.parameters())) - len(heads)


def test_a_tied_head_is_base():
    found = names_by_part(llama(tie_word_embeddings=True))
    assert set(found) == {"base"}
    assert "model.embed_tokens.weight" in found["base"]


def test_peft_weights_are_adapters_also_on_the_head():
    targets = ["q_proj", "embed_tokens", "lm_head"]
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=targets, use_dora=True))
    found = names_by_part(model)
    assert sorted(found["adapters"]) == sorted(name for name, _ in model.named_parameters() if "lora_" in name)
    assert found["heads"] == ["base_model.model.lm_head.base_layer.weight"]
    assert len(found["base"]) == len(list(llama().parameters())) - 1


def test_a_head_that_peft_copies_to_train_it_is_a_head():
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    found = names_by_part(get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, target_modules=["q_proj"])))
    assert [name.split(".")[3] for name in found["heads"]] == ["original_module", "modules_to_save"]


def test_a_value_head_and_buffers():
    model = nn.Module()
    model.v_head, model.norm = nn.Linear(4, 1), nn.BatchNorm1d(4)
    found = [(part, tuple(tensor.shape)) for part, tensor in weights_by_part(model)]
    assert found == [("base", (4,))] * 4 + [("base", ()), ("heads", (1, 4)), ("heads", (1,))]


def test_states_in_mappings_and_lists():
    first, second, third = torch.ones(1), torch.ones(2), torch.ones(3)
    state = {0: {"step": 3, "moment": first, "old": [second, None]}, 1: {"inner": {"pair": (third,)}}}
    assert [id(tensor) for tensor in state_tensors(state)] == [id(first), id(second), id(third)]
