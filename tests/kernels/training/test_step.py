from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import METHODS, Case, CaseError, DataError, NumericalError, Observer, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.table import families
from rlhfkernels.observer import PARTS
from rlhfkernels.parallel.world import World
from rlhfkernels.training.stats import StepStats
from rlhfkernels.training.step import TrainingStep

PPO = families()["PPO"]
ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2"]


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.parts: set[str] = set()

    def enter_phase(self, name: str) -> None:
        self.events.append(f"+{name}")

    def exit_phase(self, name: str) -> None:
        self.events.append(f"-{name}")

    def tag(self, part: str, tensors: object) -> None:
        self.parts.add(part)


def snapshot(step: TrainingStep) -> dict[int, torch.Tensor]:
    return {id(tensor): tensor.detach().clone() for part, tensor in step.persistent_tensors() if part != "optimizer"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", PPO)
def test_at_step_0_the_ratio_is_1_and_the_kl_0(make_case: Callable[..., Case], method: str, architecture: str) -> None:
    stats = build_step(make_case(method, architecture)).run()
    stats.check_finite()
    assert abs(float(stats["kl"])) < 1e-6
    assert float(stats["ratio_error"]) < 1e-5


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("method", ["full", "lora", "dynamic-lora"])
def test_a_reward_model_of_another_size_is_what_critic_and_reward_read(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str], method: str, engine: str
) -> None:
    step = build_step(make_case(method, rollout__reward_model=checkpoint("small-reward"), engine__trunk=engine))
    declared = declared_weights(step)
    before = snapshot(step)
    for _ in range(2):
        stats = step.run()
        stats.check_finite()
        assert float(stats["ratio_error"]) < 1e-5
    after = {id(tensor): tensor for part, tensor in step.persistent_tensors() if part != "optimizer"}
    assert {key for key, tensor in after.items() if not torch.equal(tensor, before[key])} == declared
    widths = {role: step.engine.models[spec.base].hidden_size for role, spec in step.engine.method.roles.items()}
    assert widths == {"actor": 32, "reference": 32, "critic": 16, "reward": 16}
    assert {head.weight.shape[1] for head in step.engine.scalar_heads.values()} == {16}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_after_steps_exactly_the_declared_weights_have_changed(
    make_case: Callable[..., Case], method: str, checkpointing: bool
) -> None:
    step = build_step(make_case(method, engine__gradient_checkpointing=checkpointing))
    declared = declared_weights(step)
    before = snapshot(step)
    for _ in range(2):  # B starts at 0: A moves from the second step on
        step.run()
    after = {id(tensor): tensor for part, tensor in step.persistent_tensors() if part != "optimizer"}
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
    assert changed == declared


def declared_weights(step: TrainingStep) -> set[int]:
    """Ids of the weights that the role table trains, found without the engine's own list."""
    found: set[int] = set()
    for name, role in step.engine.method.roles.items():
        model = step.engine.models[role.base]
        if "base" in role.trains:
            found |= {id(p) for key, p in model.trunk.named_parameters() if "lora_" not in key}
        if "adapter" in role.trains:
            needle = f".{role.adapter}."
            found |= {id(p) for key, p in model.trunk.named_parameters() if "lora_" in key and needle in key}
        if "head" in role.trains:
            head = step.engine.scalar_heads.get(name) or model.lm_head
            assert head is not None
            found |= {id(p) for p in head.parameters()}
    return found


@pytest.mark.parametrize(("dtype", "asked"), [("float64", "float32"), ("float32", "bfloat16")])
def test_gradients_are_never_narrower_than_their_weights(
    make_case: Callable[..., Case], dtype: str, asked: str
) -> None:
    step = build_step(make_case(dtype=dtype, engine__micro_batch_size=1, optimizer__grad_accum_dtype=asked))
    step.optimizers = {}
    step.run()
    assert {p.grad.dtype for p in step.trained_parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("method", METHODS)
def test_every_phase_runs_in_order_and_everything_is_in_one(make_case: Callable[..., Case], method: str) -> None:
    recorder = Recorder()
    step = build_step(make_case(method))
    step.run(recorder)
    names = [name for name, _ in itertools.groupby(event[1:] for event in recorder.events)]
    assert names == [phase.name for phase in METHODS[method].phases]
    assert [event[0] for event in recorder.events] == ["+", "-"] * (len(recorder.events) // 2)
    assert recorder.parts == ({"rollout", "kv_cache"} if METHODS[method].generate else {"rollout"})
    assert {part for part, _ in step.persistent_tensors()} | recorder.parts < set(PARTS)


def test_the_same_seed_gives_the_same_step(make_case: Callable[..., Case]) -> None:
    first, second = build_step(make_case()), build_step(make_case())
    other = build_step(make_case(seed=1))
    for step in (first, second, other):
        step.run()
    weights = [[p.detach() for p in step.trained_parameters()] for step in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_no_rank_samples_what_a_rank_of_another_seed_samples(make_case: Callable[..., Case]) -> None:
    seeds: set[int] = set()
    for seed in (0, 1, 2**63 - 1):
        for rank in (0, 1):
            generator = build_step(make_case("sft-lora", seed=seed), world=World(rank, 4))._generator
            assert generator is not None
            seeds.add(generator.initial_seed())
    assert len(seeds) == 6


def test_building_does_not_move_the_callers_random_state(make_case: Callable[..., Case]) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    build_step(make_case())
    assert torch.equal(torch.rand(3), expected)


def test_a_truncated_completion_may_be_bootstrapped(make_case: Callable[..., Case]) -> None:
    plain = build_step(make_case(rollout__stop_token_id=7, batch_size=16, completion_len=8))
    boot = build_step(
        make_case(rollout__stop_token_id=7, batch_size=16, completion_len=8, ppo__bootstrap_truncated=True)
    )
    rollouts = []
    for step in (plain, boot):
        rollouts.append(step.infer()[0])
    a, b = rollouts
    assert torch.equal(a.tokens, b.tokens)
    stopped = ((a.completions == 7) & a.mask.bool()).any(1)
    assert stopped.any()
    assert not stopped.all()
    torch.testing.assert_close(a["returns"][stopped], b["returns"][stopped])
    # With γ = 1 the last token's return gains exactly the terminal value.
    gain = (b["returns"] - a["returns"])[~stopped][:, -1]
    torch.testing.assert_close(gain, b["terminal_values"][~stopped])
    assert (b["terminal_values"][~stopped] != 0).all()


def test_scores_are_clamped(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(ppo__reward_clip=0.25))
    rollout, _ = step.infer()
    assert rollout["scores"].abs().max() <= 0.25


def test_scores_of_a_reward_function_are_not_clamped(make_case: Callable[..., Case]) -> None:
    scores = torch.tensor([-7.0, 0.5, 3.0, 12.0])
    step = build_step(
        make_case(ppo__reward_clip=1.0, ppo__kl_coef=0.0, ppo__gamma=1.0, ppo__lam=1.0),
        reward_fn=lambda rollout: scores,
    )
    rollout, stats = step.infer()
    assert torch.equal(rollout["scores"], scores)
    assert float(stats["score"]) == pytest.approx(float(scores.mean()))
    # With γ = λ = 1 and no penalty, every return is the score.
    torch.testing.assert_close(rollout["returns"], scores[:, None].expand(-1, 6))


def test_a_reward_function_replaces_the_reward_model(make_case: Callable[..., Case]) -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.4])
    step = build_step(make_case("lora"), reward_fn=lambda rollout: scores)
    read: list[str] = []
    hidden = step.engine.hidden
    step.engine.hidden = lambda weights, *rest, **more: read.append(weights.base) or hidden(weights, *rest, **more)
    assert float(step.run()["score"]) == pytest.approx(0.25)
    assert read == ["reference", "value", "policy", "value"]


@pytest.mark.parametrize(
    ("scores", "found"),
    [
        (torch.tensor(1.0), "a tensor of shape []"),
        (torch.ones(1), "a tensor of shape [1]"),
        (torch.ones(4, 1), "a tensor of shape [4, 1]"),
        (torch.ones(2), "a tensor of shape [2]"),
        ([1.0] * 4, "an object of type list"),
    ],
)
def test_scores_of_another_shape_are_refused(make_case: Callable[..., Case], scores: object, found: str) -> None:
    step = build_step(make_case("lora"), reward_fn=lambda rollout: scores)
    with pytest.raises(DataError) as caught:
        step.run()
    assert str(caught.value) == (
        f"reward_fn returned {found}: it must be a tensor of shape [4], one score for each sequence."
    )


@pytest.mark.parametrize("method", [*families()["SFT"], *families()["DPO"]])
def test_a_reward_function_that_nothing_calls_is_refused(make_case: Callable[..., Case], method: str) -> None:
    with pytest.raises(CaseError, match=rf"^reward_fn is given: method '{method}' reads no scores, so it must be none"):
        build_step(make_case(method), reward_fn=lambda batch: batch.mask.sum(1))


def test_numbers_that_are_not_finite_are_said(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case(), reward_fn=lambda rollout: torch.full((4,), float("nan")))
    with pytest.raises(NumericalError, match="score is nan: the step's numbers must be finite"):
        step.run().check_finite()


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_steps(make_case: Callable[..., Case], method: str) -> None:
    step = build_step(make_case(method, dtype="bfloat16"))
    for _ in range(2):
        step.run().check_finite()
    masters = [t for part, t in step.persistent_tensors() if part == "optimizer" and t.dim() > 0]
    assert {t.dtype for t in masters} == ({torch.float32} if step.method.trained_roles else set())


def test_eager_attention_and_full_logits_give_the_same_step(make_case: Callable[..., Case]) -> None:
    modern = build_step(make_case())
    paper = build_step(
        make_case(
            engine__attn_implementation="eager", engine__logprob_chunk_size=0, engine__cache_implementation="dynamic"
        )
    )
    stats = [step.run() for step in (modern, paper)]
    for name in ("score", "kl"):
        torch.testing.assert_close(stats[0][name], stats[1][name], rtol=1e-5, atol=1e-6)
    for role, loss in stats[0].losses.items():
        torch.testing.assert_close(loss, stats[1].losses[role], rtol=1e-5, atol=1e-6)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trunk", ["fast", "plain"])
@pytest.mark.parametrize("method", [*PPO, "best-of-n"])
def test_rows_of_mixed_lengths_are_scored_as_each_is_alone(
    small_step: Callable[..., TrainingStep], shake: Callable[[Engine], None], tmp_path: Path, method: str, trunk: str
) -> None:
    """Log-probabilities and V of token t are read at t - 1, the score and the terminal V at the last real token."""
    texts = ("ab", "a", "abcdefgh", "xyz")
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = {"data.prompts": str(path), "ppo.reward_clip": None, "ppo.bootstrap_truncated": True}
    step = small_step(method, **options, **{"engine.trunk": trunk})
    engine, roles, sampler = step.engine, step.method.roles, step.method.generate.role
    shake(engine)
    num_samples = step.case.sequences_per_row
    prompts = step._source.next_batch(step._generator)
    batch = engine.generate(sampler, prompts, step._generator, Observer(), samples=num_samples)
    batch.mask[1, 3:] = 0
    batch.mask[-1, 1:] = 0
    step._score(step.phases[1], batch, StepStats(), Observer())
    prompt_len = step.case.prompt_len
    for row in range(len(texts) * num_samples):
        prompt = batch.tokens[row, :prompt_len][batch.attention_mask[row, :prompt_len].bool()]
        completion = batch.completions[row, : int(batch.mask[row].sum())]
        tokens = torch.cat([prompt, completion])[None]
        at = slice(len(prompt) - 1, -1)
        with torch.no_grad():
            states = {name: engine.hidden(role.weights, tokens, None)[0] for name, role in roles.items()}
            for name, column in ((sampler, "old_logprobs"), ("reference", "reference_logprobs")):
                if name in roles:
                    logprobs = torch.log_softmax(engine.lm_head(name)(states[name][at]), -1)
                    near(batch[column][row, : len(completion)], logprobs.gather(-1, completion[:, None]).squeeze(-1))
            if "critic" in roles:
                values = states["critic"] @ engine.scalar_heads["critic"].weight[0]
                near(batch["old_values"][row, : len(completion)], values[at])
                near(batch["terminal_values"][row], values[-1])
            near(batch["scores"][row], states["reward"][-1] @ engine.scalar_heads["reward"].weight[0])
    lengths = {len(text[-prompt_len:]) for text in texts}
    assert len(lengths) > 2  # padded and whole prompts
