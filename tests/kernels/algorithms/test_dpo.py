"""DPO against a float64 loop over pairs, and the identities that it must fulfil."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhfkernels import Case, Options, TrainingStep, build_step
from rlhfkernels.algorithms.common import Counts
from rlhfkernels.algorithms.dpo import dpo_loss, pairs
from rlhfkernels.data.batch import Batch

MakeStep = Callable[..., TrainingStep]
ROWS = [("ab", "cdef", "gh"), ("a", "b", "cdefgh"), ("abcdefgh", "cd", "ef"), ("xyz", "uvwxyz12", "q")]


def sums(seed: int = 0, num_pairs: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(num_pairs, dtype=torch.float64, requires_grad=i < 2) for i in range(4)]


def test_the_loss_and_its_gradient_by_a_loop() -> None:
    chosen, rejected, reference_chosen, reference_rejected = sums()
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.3, num_pairs=7)
    loss.backward()
    expected = 0.0
    rows = zip(*(t.tolist() for t in (chosen, rejected, reference_chosen, reference_rejected)), strict=True)
    for i, (won, lost, ref_won, ref_lost) in enumerate(rows):
        z = 0.3 * ((won - ref_won) - (lost - ref_lost))
        expected += math.log(1 + math.exp(-z)) / 7
        assert float(chosen.grad[i]) == pytest.approx(-0.3 / (1 + math.exp(z)) / 7, rel=1e-12)
        assert float(rejected.grad[i]) == pytest.approx(0.3 / (1 + math.exp(z)) / 7, rel=1e-12)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)


def test_swapping_the_pair_changes_the_loss_by_the_margin() -> None:
    """L(w, l) − L(l, w) = −β (Δ_w − Δ_l)."""
    won, lost, ref_won, ref_lost = (t.detach() for t in sums())
    there = dpo_loss(won, lost, ref_won, ref_lost, beta=0.4, num_pairs=5)
    back = dpo_loss(lost, won, ref_lost, ref_won, beta=0.4, num_pairs=5)
    torch.testing.assert_close(there - back, -0.4 * ((won - ref_won) - (lost - ref_lost)).mean())


def test_a_constant_on_both_references_changes_nothing() -> None:
    won, lost, ref_won, ref_lost = (t.detach() for t in sums())
    shifted = dpo_loss(won, lost, ref_won + 3.5, ref_lost + 3.5, beta=0.4, num_pairs=5)
    torch.testing.assert_close(shifted, dpo_loss(won, lost, ref_won, ref_lost, beta=0.4, num_pairs=5))


def test_it_is_bradley_terry_with_the_implicit_rewards() -> None:
    """−log σ(r_w − r_l) with r = β Δ (Aligning LLMs without RL, equation 7)."""
    won, lost, ref_won, ref_lost = (t.detach() for t in sums())
    rewards = [0.4 * (won - ref_won), 0.4 * (lost - ref_lost)]
    bradley_terry = -torch.log(torch.sigmoid(rewards[0] - rewards[1])).mean()
    torch.testing.assert_close(dpo_loss(won, lost, ref_won, ref_lost, beta=0.4, num_pairs=5), bradley_terry)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": p, "chosen": won, "rejected": lost} for p, won, lost in [*ROWS, ("same", "same", "same")]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small(small_step: MakeStep, file: str) -> MakeStep:
    """Builds small steps over the rows of the file."""
    return functools.partial(small_step, **{"data.pairs": file})


def gradients(step: TrainingStep) -> list[torch.Tensor]:
    step.optimizers = {}
    step.run()
    return [p.grad for p in step.trained_parameters()]


def test_a_pair_is_two_sequences_with_one_prompt_and_equal_ones_are_dropped(small: MakeStep, file: str) -> None:
    step = small("dpo-lora")
    batch, _ = step.infer()
    assert (batch.num_rows, batch.num_sequences) == (4, 8)
    assert torch.equal(batch.tokens[::2, :5], batch.tokens[1::2, :5])
    assert batch.completions[:2].tolist() == [[*b"cdef", 0, 0], [*b"gh", 0, 0, 0, 0]]
    assert batch.mask.sum(1).tolist() == [4, 2, 1, 6, 2, 2, 6, 1]
    assert step.data_summary() == {"source": file, "num_prompts": 4, "num_truncated": 2, "num_dropped": 1}


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_at_step_0_the_loss_is_ln_2_and_the_gradient_half_beta_of_the_difference(small: MakeStep, method: str) -> None:
    """L = ln 2, ∇L = −(β/2) Σ (∇ℓ_w − ∇ℓ_l) / b."""
    step = small(method, **{"dpo.beta": 0.5})
    batch, _ = step.infer()
    role = step.method.roles["policy"]
    hidden = step.engine.hidden(role.weights, batch.tokens, batch.attention_mask, start=4, train=True)
    logprobs, _ = step.engine.logprobs("policy", hidden, batch.completions)
    chosen, rejected = (logprobs * batch.mask).sum(1).view(-1, 2).unbind(1)
    (-0.25 * (chosen - rejected).mean()).backward()
    expected = [p.grad for p in step.trained_parameters()]
    other = small(method, **{"dpo.beta": 0.5})
    for found, by_hand in zip(gradients(other), expected, strict=True):
        # The reference's column is float32: its rounding is all that is left of the margin.
        assert (found - by_hand).norm() <= 1e-5 * by_hand.norm()
    stats = small(method).run()
    assert float(stats["policy_loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert abs(float(stats["margin"])) < 1e-5


def test_the_reference_reads_what_the_policy_reads_at_step_0(small: MakeStep) -> None:
    for method in ("dpo", "dpo-lora"):
        step = small(method)
        batch, stats = step.infer()
        step.optimizers = {}
        step.update(batch, stats=stats)
        reference = batch["reference_logprobs"].view(-1, 2).mean(0)
        assert float(stats["chosen_logprob"]) == pytest.approx(float(reference[0]), rel=1e-6)
        assert float(stats["rejected_logprob"]) == pytest.approx(float(reference[1]), rel=1e-6)


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_micro_batches_change_no_gradient(small: MakeStep, method: str) -> None:
    whole = gradients(small(method))
    parts = gradients(small(method, **{"engine.micro_batch_size": 1}))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_the_layouts_give_one_loss_at_equal_weights(small: MakeStep) -> None:
    """LoRA and whole models read the same pairs; at step 0 their references and policies are equal."""
    found = []
    for method in ("dpo", "dpo-lora"):
        batch, _ = small(method).infer()
        found.append(batch["reference_logprobs"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_the_loss_falls_and_the_pairs_are_ranked_on_memorised_rows(file: str, method: str) -> None:
    options = {"data.pairs": file, "optimizer.learning_rate": 1e-3, "lora.r": 8}
    sizes = {"prompt_len": 5, "completion_len": 6, "batch_size": 4}
    step = build_step(Case(method=method, model="tiny", dtype="float32", **sizes, options=Options.of(options)))
    stats = [step.run() for _ in range(12)]
    assert float(stats[-1]["policy_loss"]) < 0.5 * float(stats[0]["policy_loss"])
    assert float(stats[-1]["accuracy"]) == 1.0


def test_random_pairs_share_their_prompts(make_case: Callable[..., Case]) -> None:
    batch, _ = build_step(make_case("dpo-lora")).infer()
    assert batch.tokens.shape == (8, 11)
    assert torch.equal(batch.tokens[::2, :5], batch.tokens[1::2, :5])
    assert not torch.equal(batch.completions[::2], batch.completions[1::2])


@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("trunk", ["fast", "plain"])
@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_two_passes_give_the_loss_and_the_gradients_of_one_graph(
    small: MakeStep, method: str, trunk: str, micro: int | None, shake: Callable[..., None]
) -> None:
    """With a policy that is not the reference, so that pairs weigh differently."""
    found = []
    for options in ({"dpo.forward": "two-pass", "engine.micro_batch_size": micro}, {}):
        step = small(method, **{"engine.trunk": trunk, "dpo.beta": 0.5, **options})
        batch, stats = step.infer()
        shake(step.engine)
        batch["reference_logprobs"] += torch.arange(8) / 4
        step.optimizers = {}
        step.update(batch, stats=stats)
        found.append((stats.to_dict(), [p.grad for p in step.trained_parameters()]))
    rel = 1e-9 if trunk == "fast" else 1e-5  # transformers' Llama rotates in float32 in every dtype
    assert found[0][0] == pytest.approx(found[1][0], rel=rel)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert (a - b).norm() <= rel * b.norm()


def test_two_passes_hold_the_graph_of_one_sequence_of_each_pair(small: MakeStep) -> None:
    step = small("dpo-lora", **{"dpo.forward": "two-pass", "engine.micro_batch_size": 2})
    rows: list[tuple[int, bool]] = []
    hidden = step.engine.hidden

    def noted(*arguments: object, train: bool = False, **options: object) -> torch.Tensor:
        states = hidden(*arguments, train=train, **options)
        rows.append((len(states), states.requires_grad))
        return states

    batch, _ = step.infer()
    step.engine.hidden = noted
    step.update(batch)
    assert rows == 2 * [(4, False), (2, True), (2, True)]


@pytest.mark.parametrize("form", ["joint", "two-pass"])
def test_lora_equals_the_whole_model_at_equal_effective_weights(
    make_case: Callable[..., Case], shake: Callable[..., None], form: str
) -> None:
    """W' = W + s B A, the reference W: one loss, and B's gradient is s ∇W' Aᵀ."""
    lora, whole = (build_step(make_case(name, dpo__forward=form)) for name in ("dpo-lora", "dpo"))
    batches = [step.infer() for step in (lora, whole)]
    shake(lora.engine)
    weights = dict(whole.engine.models["policy"].trunk.named_parameters())
    named = lora.engine.adapters["policy"].named_parameters("policy")
    layers = [name.removesuffix(".lora_A") for name in named if name.endswith("lora_A")]
    with torch.no_grad():
        for layer in layers:
            weights[f"{layer}.weight"] += named[f"{layer}.lora_B"] @ named[f"{layer}.lora_A"]
    for step, (batch, stats) in zip((lora, whole), batches, strict=True):
        step.optimizers = {}
        step.update(batch, stats=stats)
    assert float(batches[0][1]["policy_loss"]) != pytest.approx(math.log(2), rel=1e-3)
    assert batches[0][1].to_dict() == pytest.approx(
        {**batches[1][1].to_dict(), "policy_loss": float(batches[1][1]["policy_loss"])}, rel=1e-9
    )
    for layer in layers:
        gradient = weights[f"{layer}.weight"].grad @ named[f"{layer}.lora_A"].t()
        torch.testing.assert_close(named[f"{layer}.lora_B"].grad, gradient, rtol=1e-9, atol=1e-12)


def test_a_step_reports_accuracy_margin_and_both_log_probabilities(small: MakeStep) -> None:
    stats = small("dpo-lora").run().to_dict()
    names = {"accuracy", "margin", "chosen_logprob", "rejected_logprob", "reference_error"}
    assert set(stats) == {*names, "policy_loss", "policy_grad_norm"}
    assert stats["reference_error"] < 1e-6


def test_the_margin_is_that_of_the_implicit_rewards() -> None:
    """Two pairs: Δ_w = 1 and 0.5, Δ_l = -1 and 2; the last token of the first sequence is padding."""
    logprobs = torch.tensor([[-1.0, -1.0, -7.0], [-2.0, -1.0, -1.0], [-1.0, -0.5, -1.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    columns = {"reference_logprobs": torch.tensor([-3.0, -3.0, -3.0, -3.0])}
    tokens = torch.zeros(4, 4, dtype=torch.long)
    batch = Batch(tokens=tokens, attention_mask=None, mask=mask, prompt_len=1, num_rows=2, columns=columns)
    reader: Any = SimpleNamespace(logprobs=lambda: (logprobs, None))
    loss = pairs(reader, batch, Options.of({"dpo.beta": 0.2}), Counts(tokens=mask.sum(), rows=2))
    assert float(loss.sums["margin"]) == pytest.approx(0.2 * ((1 + 1) + (0.5 - 2)) / 2)
    assert float(loss.sums["accuracy"]) == 0.5
    assert float(loss.maxima["reference_error"]) == pytest.approx(2 / 3)  # of the last sequence, a token
    batch["reference_logprobs"] = (logprobs * mask).sum(1)
    tied = pairs(reader, batch, Options.of({"dpo.beta": 0.2}), Counts(tokens=mask.sum(), rows=2))
    assert float(tied.sums["accuracy"]) == 0.0
