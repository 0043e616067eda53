"""SFT against a float64 loop over tokens, and what its gradient must equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Batch, Case, TrainingStep, build_step
from rlhfkernels.algorithms.sft import nll_loss

ROWS = [("ab", "cdef"), ("a", "b"), ("abcdefgh", "cd"), ("xyz", "uvwxyz12")]


def test_the_loss_is_the_mean_over_real_tokens_by_a_loop() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets, lengths = torch.randint(5, (2, 3)), (3, 1)
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    logprobs = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    loss = nll_loss(logprobs, mask, num_tokens=4)
    expected, gradient = 0.0, torch.zeros_like(logits)
    for row, length in enumerate(lengths):
        for t in range(length):
            scores = [math.exp(x) for x in logits[row, t].tolist()]
            expected -= math.log(scores[targets[row, t]] / sum(scores)) / 4
            for v, score in enumerate(scores):
                gradient[row, t, v] = (score / sum(scores) - float(v == targets[row, t])) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return str(path)


def gradients(step: TrainingStep) -> list[torch.Tensor]:
    step.optimizers = {}
    step.run()
    return [p.grad for p in step.trained_parameters()]


def tiny(method: str, file: str, **options: object) -> TrainingStep:
    from rlhfkernels import Options

    case = Case(
        method=method,
        model="tiny",
        prompt_len=5,
        completion_len=6,
        batch_size=4,
        dtype="float64",
        options=Options.of({"data.demonstrations": file, "lora.r": 2, **options}),
    )
    return build_step(case)


def test_demonstrations_are_padded_and_cut_at_both_ends(file: str) -> None:
    step = tiny("sft-lora", file)
    batch, _ = step.infer()
    assert batch.tokens[:, :5].tolist() == [[0, 0, 0, *b"ab"], [0, 0, 0, 0, *b"a"], [*b"defgh"], [0, 0, *b"xyz"]]
    assert batch.completions.tolist() == [[*b"cdef", 0, 0], [*b"b", 0, 0, 0, 0, 0], [*b"cd", 0, 0, 0, 0], [*b"uvwxyz"]]
    assert batch.mask.sum(1).tolist() == [4, 1, 2, 6]
    assert step.data_summary() == {"source": file, "num_prompts": 4, "num_truncated": 2, "num_dropped": 0}


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_loss_of_a_step_is_that_of_each_sequence_alone(file: str, completion_only: bool) -> None:
    step = tiny("sft", file, **{"sft.completion_only_loss": completion_only})
    batch, stats = step.infer()
    total, count = 0.0, 0
    model, head = step.engine.models["policy"].trunk, step.engine.lm_head("policy")
    with torch.no_grad():
        for prompt, completion in ROWS:
            tokens = torch.tensor([[*prompt.encode()[-5:], *completion.encode()[:6]]])
            start = min(len(prompt), 5) if completion_only else 1
            logprobs = torch.log_softmax(head(model(input_ids=tokens).last_hidden_state), -1)[0, :-1]
            picked = logprobs.gather(-1, tokens[0, 1:, None]).squeeze(-1)[start - 1 :]
            total, count = total - float(picked.sum()), count + len(picked)
    step.optimizers = {}
    step.update(batch, stats=stats)
    assert float(stats["policy_loss"]) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("method", ["sft", "sft-lora"])
def test_micro_batches_change_no_gradient(file: str, method: str, completion_only: bool) -> None:
    options = {"sft.completion_only_loss": completion_only}
    whole = gradients(tiny(method, file, **options))
    parts = gradients(tiny(method, file, **options, **{"engine.micro_batch_size": 1}))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_reinforces_with_every_advantage_1(file: str) -> None:
    """−(1/B) Σ A ℓ with A ≡ 1, times B / N (RLHF Deciphered, section 6.3)."""
    step = tiny("sft-lora", file)
    batch, _ = step.infer()
    role = step.method.roles["policy"]
    hidden = step.engine.hidden(role.weights, batch.tokens, batch.attention_mask, start=4, train=True)
    logprobs, _ = step.engine.logprobs("policy", hidden, batch.completions)
    sequence = (logprobs * batch.mask).sum(1)
    (-(sequence * torch.ones(4)).mean() * 4 / batch.mask.sum()).backward()
    expected = [p.grad for p in step.trained_parameters()]
    for found, by_hand in zip(gradients(tiny("sft-lora", file)), expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-12)


def test_lora_equals_the_whole_model_at_equal_weights(file: str) -> None:
    """At step 0, B is 0: both losses are those of the base, and A gets no gradient."""
    lora, whole = (tiny(method, file) for method in ("sft-lora", "sft"))
    for step in (lora, whole):
        step.optimizers = {}
    assert float(lora.run()["policy_loss"]) == pytest.approx(float(whole.run()["policy_loss"]), rel=1e-9)
    for name, parameter in lora.engine.models["policy"].trunk.named_parameters():
        if "lora_A" in name:
            assert not parameter.grad.any()
        elif "lora_B" in name:
            assert parameter.grad.any()


@pytest.mark.parametrize("method", ["sft", "sft-lora"])
def test_the_loss_falls_on_memorised_rows(file: str, method: str) -> None:
    step = tiny(method, file, **{"optimizer.learning_rate": 3e-3, "lora.r": 8})
    losses = [float(step.run()["policy_loss"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_random_demonstrations_have_exactly_the_lengths_of_the_case(make_case: Callable[..., Case]) -> None:
    batch, _ = build_step(make_case("sft")).infer()
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == (4, 11)
    assert batch.attention_mask is None
    assert batch.mask.all()
