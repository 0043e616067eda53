"""SFT against a float64 loop over tokens, and what its gradient must equal."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Batch, Case, CaseError, Options, TrainingStep, build_step
from rlhfkernels.algorithms.sft import nll_loss

MakeStep = Callable[..., TrainingStep]
ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "mistral", "qwen2"]
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


@pytest.fixture
def small(small_step: MakeStep, file: str) -> MakeStep:
    """Builds small steps over the rows of the file."""
    return functools.partial(small_step, **{"data.demonstrations": file})


def gradients(step: TrainingStep) -> list[torch.Tensor]:
    step.optimizers = {}
    step.run()
    return [p.grad for p in step.trained_parameters()]


def test_demonstrations_are_padded_and_cut_at_both_ends(small: MakeStep, file: str) -> None:
    step = small("sft-lora")
    batch, _ = step.infer()
    assert batch.tokens[:, :5].tolist() == [[0, 0, 0, *b"ab"], [0, 0, 0, 0, *b"a"], [*b"defgh"], [0, 0, *b"xyz"]]
    assert batch.completions.tolist() == [[*b"cdef", 0, 0], [*b"b", 0, 0, 0, 0, 0], [*b"cd", 0, 0, 0, 0], [*b"uvwxyz"]]
    assert batch.mask.sum(1).tolist() == [4, 1, 2, 6]
    assert step.data_summary() == {"source": file, "num_prompts": 4, "num_truncated": 2, "num_dropped": 0}


@pytest.mark.parametrize("completion_only", [True, False])
def test_the_loss_of_a_step_is_that_of_each_sequence_alone(small: MakeStep, completion_only: bool) -> None:
    step = small("sft", **{"sft.completion_only_loss": completion_only})
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
def test_micro_batches_change_no_gradient(small: MakeStep, method: str, completion_only: bool) -> None:
    options = {"sft.completion_only_loss": completion_only}
    whole = gradients(small(method, **options))
    parts = gradients(small(method, **options, **{"engine.micro_batch_size": 1}))
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_reinforces_with_every_advantage_1(small: MakeStep) -> None:
    """−(1/B) Σ A ℓ with A ≡ 1, times B / N (RLHF Deciphered, section 6.3)."""
    step = small("sft-lora")
    batch, _ = step.infer()
    role = step.method.roles["policy"]
    hidden = step.engine.hidden(role.weights, batch.tokens, batch.attention_mask, start=4, train=True)
    logprobs, _ = step.engine.logprobs("policy", hidden, batch.completions)
    sequence = (logprobs * batch.mask).sum(1)
    (-(sequence * torch.ones(4)).mean() * 4 / batch.mask.sum()).backward()
    expected = [p.grad for p in step.trained_parameters()]
    for found, by_hand in zip(gradients(small("sft-lora")), expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-12)


def test_lora_equals_the_whole_model_at_equal_weights(small: MakeStep) -> None:
    """At step 0, B is 0: both losses are those of the base, and A gets no gradient."""
    lora, whole = (small(method) for method in ("sft-lora", "sft"))
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
    options = {"data.demonstrations": file, "optimizer.learning_rate": 3e-3, "lora.r": 8}
    sizes = {"prompt_len": 5, "completion_len": 6, "batch_size": 4}
    step = build_step(Case(method=method, model="tiny", dtype="float32", **sizes, options=Options.of(options)))
    losses = [float(step.run()["policy_loss"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_random_demonstrations_have_exactly_the_lengths_of_the_case(make_case: Callable[..., Case]) -> None:
    batch, _ = build_step(make_case("sft")).infer()
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == (4, 11)
    assert batch.attention_mask is None
    assert batch.mask.all()


def assert_equal_steps(one: TrainingStep, other: TrainingStep, rel: float = 1e-9) -> None:
    """Both steps have one loss and equal gradients."""
    found = []
    for step in (one, other):
        step.optimizers = {}
        stats = step.run()
        found.append((float(stats["policy_loss"]), [p.grad for p in step.trained_parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=rel)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).norm() <= rel * b.norm() + 1e-14


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("micro", [None, 1, 2])
@pytest.mark.parametrize("trunk", ["fast", "plain"])
@pytest.mark.parametrize("method", ["sft", "sft-lora"])
def test_packed_rows_give_the_loss_and_the_gradients_of_padded_ones(
    small: MakeStep, method: str, trunk: str, micro: int | None, completion_only: bool
) -> None:
    options = {"sft.completion_only_loss": completion_only, "engine.trunk": trunk}
    packed = small(method, **options, **{"sft.packing": True, "engine.micro_batch_size": micro})
    # Transformers' Llama rotates in float32 in every dtype.
    assert_equal_steps(packed, small(method, **options), rel=1e-9 if trunk == "fast" else 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["sft", "sft-lora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_fits_every_architecture_of_the_fast_trunk(
    make_case: Callable[..., Case],
    shake: Callable[..., None],
    architecture: str,
    method: str,
    checkpointing: bool,
) -> None:
    """Mistral's window of 6 is shorter than its sequences; GPT-2 and OPT have learned positions."""
    steps = []
    for packing in (True, False):
        options = {"sft__packing": packing, "engine__gradient_checkpointing": checkpointing}
        case = make_case(method, architecture, **options)
        step = build_step(case)
        steps.append(step)
        shake(step.engine)
        batch = uneven(case, step.engine.vocab_size)
        step._source.next_batch = lambda generator, batch=batch: batch
        assert step.trunk_used == "fast"
    assert_equal_steps(*steps)


def uneven(case: Case, vocab_size: int) -> Batch:
    """Four demonstrations whose prompts and completions have all lengths from 1 to the case's."""
    p, c = case.prompt_len, case.completion_len
    torch.manual_seed(2)
    tokens = torch.randint(3, vocab_size, (4, p + c))
    extents = ((0, p + c), (p - 1, p + 1), (p - 3, p + 4), (1, p + 2))
    at = torch.arange(p + c)
    real = torch.stack([(at >= first) & (at < end) for first, end in extents])
    tokens[~real] = 0
    return Batch(
        tokens=tokens,
        attention_mask=torch.cat((real[:, :p], torch.ones(4, c, dtype=torch.bool)), 1).long(),
        mask=real[:, p:].float(),
        prompt_len=p,
        num_rows=4,
        extents=extents,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_lora_equals_the_whole_model_at_equal_effective_weights(
    make_case: Callable[..., Case], shake: Callable[..., None], packing: bool
) -> None:
    """W' = W + s B A: one loss, and B's gradient is s ∇W' Aᵀ."""
    lora = build_step(make_case("sft-lora", sft__packing=packing))
    whole = build_step(make_case("sft", sft__packing=packing))
    shake(lora.engine)
    adapters = lora.engine.adapters["policy"]
    weights = dict(whole.engine.models["policy"].trunk.named_parameters())
    named = adapters.named_parameters("policy")
    pairs = {name.removesuffix(".lora_A"): name for name in named if name.endswith("lora_A")}
    with torch.no_grad():
        for layer, name in pairs.items():
            weights[f"{layer}.weight"] += named[f"{layer}.lora_B"] @ named[name]
    batch = uneven(lora.case, lora.engine.vocab_size)
    losses = []
    for step in (lora, whole):
        step.optimizers = {}
        step._source.next_batch = lambda generator: batch
        losses.append(float(step.run()["policy_loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for layer, name in pairs.items():
        gradient = weights[f"{layer}.weight"].grad
        torch.testing.assert_close(named[f"{layer}.lora_B"].grad, gradient @ named[name].t(), rtol=1e-9, atol=1e-12)


def test_a_packed_row_has_no_padding_and_its_positions_begin_again(small: MakeStep) -> None:
    batch, _ = small("sft-lora", **{"sft.packing": True}).infer()
    row = batch.packed(reads_prompt=False)
    assert bytes(row.tokens.tolist()) == b"abcdef" + b"ab" + b"defghcd" + b"xyzuvwxyz"
    assert row.positions.tolist() == [*range(6), *range(2), *range(7), *range(9)]
    assert row.segments == ((6, 1), (2, 0), (7, 4), (9, 2))
    assert bytes(row.targets.tolist()) == b"cdef" + b"b" + b"cd" + b"uvwxyz"
    assert bytes(batch.packed(reads_prompt=True).targets.tolist()) == b"bcdef" + b"b" + b"efghcd" + b"yzuvwxyz"
    assert batch.select([2, 0]).packed(reads_prompt=False).segments == ((7, 4), (6, 1))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("architecture", ["opt", "bloom", "mpt"])
def test_an_architecture_whose_packed_sequences_see_each_other_is_refused(
    make_case: Callable[..., Case], architecture: str, dtype: str
) -> None:
    """Transformers' OPT masks no packed row, and Bloom and MPT take no positions."""
    sentence = r"packed rows \(plain trunk\): a sequence sees the one before it; sft\.packing must be false\."
    with pytest.raises(CaseError, match=sentence):
        build_step(make_case("sft-lora", architecture, sft__packing=True, engine__trunk="plain", dtype=dtype))


def test_a_rotary_embedding_that_depends_on_the_longest_sequence_of_a_batch_is_refused(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    """Its factors change beyond 16 positions."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "ab" * n, "completion": "cd"}) + "\n" for n in (1, 2, 3, 4)))
    case = functools.partial(make_case, "sft-lora", "longrope gpt_neox", data__demonstrations=str(path), prompt_len=8)
    sentence = r"^prompt_len \+ completion_len is 20: beyond 16 tokens the rotary embedding .* it must be at most 16\.$"
    for packing, with_weights in itertools.product((True, False), repeat=2):  # plans have no weights
        with pytest.raises(CaseError, match=sentence):
            build_step(case(completion_len=12, sft__packing=packing), with_weights=with_weights)
    assert build_step(case(completion_len=8, sft__packing=True))


def test_positions_that_do_not_begin_again_are_refused(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhfkernels.engine.fast import trunk

    run = trunk.run_packed

    def spoil(blocks: object, adapter: object, tokens: torch.Tensor, ids: torch.Tensor, *rest: object, **more: object):
        return run(blocks, adapter, tokens, torch.arange(len(tokens)), *rest, **more)

    monkeypatch.setattr(trunk, "run_packed", spoil)
    with pytest.raises(CaseError, match=r"\(fast trunk\): a packed sequence and the sequence alone disagree by"):
        build_step(make_case("sft-lora", "gpt2", sft__packing=True))


def test_a_position_that_rounds_otherwise_beside_other_sequences_sees_none(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one whose experts read another number of tokens."""
    from rlhfkernels.engine.fast import trunk

    run, calls = trunk.run_packed, itertools.count()

    def spoil(*arguments: object, **options: object) -> torch.Tensor:
        hidden = run(*arguments, **options)
        hidden[-1] += 5e-6 * next(calls)  # of the second row: within the tolerance, above a hundredth of it
        return hidden

    monkeypatch.setattr(trunk, "run_packed", spoil)
    assert build_step(make_case("sft-lora", "gpt2", sft__packing=True))
    assert next(calls) == 2
