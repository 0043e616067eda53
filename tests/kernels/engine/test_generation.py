from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Case, NumericalError, Observer, build_step
from rlhfkernels.data.batch import Batch
from rlhfkernels.engine import generation
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.program import WeightSet
from rlhfkernels.ops.sample import sample
from rlhfkernels.training.step import TrainingStep

Generated = Callable[[TrainingStep], Batch]
ARCHITECTURES = ["llama", "opt", "gpt_neox", "gpt2", "qwen2"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kv_cache", ["static", "dynamic"])
def test_log_probabilities_kept_while_sampling_are_those_of_a_full_forward(
    make_case: Callable[..., Case],
    generated: Generated,
    architecture: str,
    kv_cache: str,
    shake: Callable[[Engine], None],
) -> None:
    step = build_step(make_case(architecture=architecture, engine__cache_implementation=kv_cache))
    shake(step.engine)
    rollout = generated(step)
    with torch.no_grad():
        hidden = step.engine.hidden(WeightSet("hydra", "actor"), rollout.tokens, None)
        expected, _ = step.engine.logprobs("actor", hidden, rollout.completions)
    torch.testing.assert_close(rollout["old_logprobs"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_from_padded_prompts_equals_generation_without_padding(
    make_case: Callable[..., Case], architecture: str, shake: Callable[[Engine], None]
) -> None:
    engine = Engine(make_case(architecture=architecture))
    shake(engine)
    decode = engine.trunks["hydra"].decoder
    torch.manual_seed(5)
    tokens = torch.randint(48, (1, 3))
    following = torch.randint(48, (1, 2))
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), tokens], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone, together = decode("actor", 5, Observer()), decode("actor", 7, Observer())
    torch.testing.assert_close(together.advance(padded, mask[:, :5]), alone.advance(tokens, None))
    for t in range(2):
        token = following[:, t : t + 1]
        torch.testing.assert_close(together.advance(token, mask[:, : 6 + t]), alone.advance(token, None))


def test_a_completion_stops_at_the_stop_token_and_is_masked_after_it(
    make_case: Callable[..., Case], generated: Generated
) -> None:
    step = build_step(make_case(batch_size=16, completion_len=12, rollout__stop_token_id=7))
    rollout = generated(step)
    stopped = 0
    for tokens, mask, logprobs in zip(rollout.completions, rollout.mask, rollout["old_logprobs"], strict=True):
        length = int(mask.sum())
        assert torch.equal(mask, (torch.arange(12) < length).float())
        assert not (tokens[: length - 1] == 7).any()
        assert (logprobs[length:] == 0).all()
        assert (tokens[length:] == 0).all()
        if length < 12:
            stopped += 1
            assert tokens[length - 1] == 7
    assert stopped > 0


@pytest.mark.parametrize(
    ("trunk", "backend", "dtype"),
    [("plain", "torch", "float64"), ("fast", "torch", "float32"), ("fast", "auto", "float32")],
)
@pytest.mark.parametrize("stop", [None, 7])
def test_sampling_from_logits_that_are_not_finite_is_one_error(
    make_case: Callable[..., Case], trunk: str, backend: str, dtype: str, stop: int | None
) -> None:
    options = {"engine__trunk": trunk, "engine__backend": backend, "rollout__stop_token_id": stop}
    step = build_step(make_case(dtype=dtype, **options))
    step.engine.lm_head("actor").weight.data[5, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^actor sampled from logits that are not finite"):
        step.run()


@pytest.mark.parametrize("trunk", ["plain", "fast"])
def test_generation_ends_at_a_look_after_all_have_ended_and_looking_seldom_changes_no_batch(
    make_case: Callable[..., Case],
    generated: Callable[[TrainingStep], Batch],
    monkeypatch: pytest.MonkeyPatch,
    trunk: str,
) -> None:
    case = make_case(completion_len=40, batch_size=1, engine__trunk=trunk)
    stop = int(generated(build_step(case)).completions[0, 3])
    case = dataclasses.replace(case, options=case.options.replace({"rollout.stop_token_id": stop}))
    sampled: list[int] = []

    def noted(logits: torch.Tensor, *arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        sampled.append(len(logits))
        return sample(logits, *arguments, **options)

    monkeypatch.setattr(generation, "sample", noted)
    every = generated(build_step(case))
    length = int(every.mask.sum())
    assert 1 <= length <= 4
    assert len(sampled) == length + 1  # the look comes after sampling
    sampled.clear()
    monkeypatch.setattr(generation, "_tokens_between_looks", lambda device: 16)
    seldom = generated(build_step(case))
    assert len(sampled) == 16 + 1
    for name in ("tokens", "mask"):
        assert torch.equal(getattr(seldom, name), getattr(every, name))
    assert torch.equal(seldom["old_logprobs"], every["old_logprobs"])
