import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import LlamaConfig, LlamaForCausalLM

import rlhfbench
from rlhfbench.measure.ledger import Ledger
from rlhfkernels.observer import PARTS

FLOAT = 4
WEIGHTS = (8 * 16 + 16 + 16 + 1) * FLOAT  # 8 -> 16 -> 1 with biases
STATES = 2 * WEIGHTS + 4 * FLOAT  # AdamW: two moments, and the step count of each of the 4 parameters
INPUT, HIDDEN, OUTPUT = 4 * 8 * FLOAT, 4 * 16 * FLOAT, 4 * FLOAT  # 4 rows


def parts(**some):
    return {part: some.get(part, 0) for part in PARTS}


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))


def llama():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, max_position_embeddings=32))


def num_bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_a_training_loop_by_hand(options):
    net, x = mlp(), torch.ones(4, 8)
    optimizer = torch.optim.AdamW(net.parameters(), **options)
    with Ledger("cpu") as ledger:
        ledger.track(net, optimizer)
        for step in range(2):
            states = 0 if step == 0 else STATES
            with ledger.phase("forward"):
                loss = net(x)
            live = parts(base=WEIGHTS, optimizer=states, activations=INPUT + HIDDEN, temporary=OUTPUT)
            assert ledger.parts == live
            with ledger.phase("backward"):
                loss.backward(torch.ones_like(loss))
            del loss
            assert ledger.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=states, temporary=INPUT)
            with ledger.phase("optimize"):
                optimizer.step()
            assert ledger.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=STATES, temporary=INPUT)
            optimizer.zero_grad()
    assert ledger.parts == parts(base=WEIGHTS, optimizer=STATES, temporary=INPUT)
    peak = ledger.peaks["optimize"]
    scratch = peak.total_bytes - 2 * WEIGHTS - STATES - INPUT
    assert peak.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=STATES, temporary=INPUT + scratch)


@pytest.mark.parametrize("fake", [False, True])
def test_states_made_in_the_step_that_has_the_peak_are_optimizer_in_it(fake):
    """AdamW's foreach form holds scratch tensors beside its new states: the peak comes before the step returns."""
    with FakeTensorMode() if fake else torch.device("cpu"):
        net, x = mlp(), torch.ones(4, 8)
        optimizer = torch.optim.AdamW(net.parameters(), foreach=True)
        with Ledger("cpu") as ledger:
            ledger.track(net)
            net(x).sum().backward()
            with ledger.phase("optimize"):
                optimizer.step()
            after = ledger.total_bytes
    assert ledger.peak.total_bytes > after
    scratch = ledger.peak.total_bytes - 2 * WEIGHTS - STATES
    assert ledger.peak.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=STATES, temporary=scratch)


def test_a_gradient_that_makes_the_peak_is_a_gradient_in_it():
    """The first layer's weight gradient is made while its output's gradient still lives."""
    net = nn.Sequential(nn.Linear(8, 1000, bias=False), nn.Linear(1000, 1, bias=False))
    with Ledger("cpu") as ledger:
        ledger.track(net)
        loss = net(torch.ones(4, 8)).sum()
        with ledger.phase("backward"):
            loss.backward()
    assert ledger.peak_phase == "backward"
    assert ledger.peak.parts["gradients"] == ledger.parts["gradients"] == (8 * 1000 + 1000) * FLOAT
    assert ledger.peak.parts["temporary"] >= 4 * 1000 * FLOAT


def test_a_peak_before_a_tensor_is_not_corrected_for_it():
    with Ledger("cpu") as ledger:
        with ledger.phase("large"):
            torch.ones(10_000)
        net = mlp()
        ledger.track(net)
        with ledger.phase("small"):
            net(torch.ones(4, 8))
    assert ledger.peaks["large"].parts == parts(temporary=10_000 * FLOAT)
    assert ledger.peaks["small"].parts["base"] == WEIGHTS


def test_states_that_exist_already_are_counted_at_once():
    net = mlp()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    with Ledger("cpu") as ledger:
        ledger.track(net, optimizer)
        assert ledger.parts == parts(base=WEIGHTS, gradients=WEIGHTS, optimizer=STATES)


def test_adapters_of_peft():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    head = model.get_output_embeddings().weight
    optimizer = torch.optim.AdamW(adapters)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with Ledger("cpu") as ledger:
        ledger.track(model, optimizer)
        with ledger.phase("forward"):
            loss = model(input_ids=tokens, labels=tokens).loss
        assert ledger.parts["activations"] > 0
        with ledger.phase("backward"):
            loss.backward()
        with ledger.phase("optimize"):
            optimizer.step()
        del loss
        live = ledger.parts
    assert live["adapters"] == live["gradients"] == num_bytes(adapters)
    assert live["optimizer"] == 2 * num_bytes(adapters) + FLOAT * len(adapters)
    assert live["heads"] == num_bytes([head])
    assert live["base"] == num_bytes(frozen) - num_bytes([head]) + num_bytes(model.buffers())
    assert live["activations"] == 0
    assert ledger.total_bytes == sum(ledger.parts.values())
    for snapshot in ledger.peaks.values():
        assert sum(snapshot.parts.values()) == snapshot.total_bytes


def test_a_trainer_of_transformers(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            seen.append(ledger.parts)

    seen = []
    model = llama()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (4, 16))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    with Ledger("cpu") as ledger:
        ledger.track(model)
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Look()]).train()
        gc.collect()
        assert ledger.parts["activations"] == 0
    parameters = list(model.parameters())
    head = num_bytes([model.lm_head.weight])
    states = 2 * num_bytes(parameters) + FLOAT * len(parameters)
    weights = {"base": num_bytes(parameters) - head + num_bytes(model.buffers()), "heads": head}
    for live, optimizer in zip(seen, [0, states], strict=True):
        expected = parts(**weights, gradients=num_bytes(parameters), optimizer=optimizer)
        assert live == expected | {"temporary": live["temporary"]}
    peak = ledger.peak
    assert {part: peak.parts[part] for part in ("base", "heads", "optimizer")} == {**weights, "optimizer": states}
    assert sum(peak.parts.values()) == peak.total_bytes


def test_the_summary_has_the_parts_that_are_there_at_the_peak_and_in_every_phase():
    with Ledger("cpu") as ledger:
        weight = torch.ones(512, 1024)
        ledger.tag("base", [weight])
        with ledger.phase("forward"):
            weight[:256] * 1
    lines = ledger.summary().splitlines()
    assert [line.split() for line in lines] == [
        ["MiB", "peak", "forward"],
        ["base", "2.00", "2.00"],
        ["temporary", "1.00", "1.00"],
        ["total", "3.00", "3.00"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_summary_of_nothing():
    with Ledger("cpu") as ledger:
        pass
    assert ledger.summary().splitlines()[-1].split() == ["total", "0.00"]


def test_a_ledger_is_used_once_and_leaves_no_hook():
    hooks = dict(_global_optimizer_post_hooks)
    net = mlp()
    ledger = Ledger("cpu")
    with ledger:
        ledger.track(net)
        ledger.track(net)
        assert len(_global_optimizer_post_hooks) == len(hooks) + 1
    assert _global_optimizer_post_hooks == hooks
    with pytest.raises(RuntimeError, match="make a new one"), ledger:
        pass


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_the_default_device(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with FakeTensorMode(), Ledger() as ledger:
        kept = torch.empty(4, 8, device=device), torch.empty(100, device="meta")
        assert ledger.total_bytes == INPUT
        del kept


def test_it_is_public():
    assert rlhfbench.Ledger is Ledger
