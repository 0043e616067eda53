from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.engine.fast.trunk import make_fast_trunk
from rlhfkernels.errors import CaseError
from rlhfkernels.methods.table import families

Generated = Callable[[TrainingStep], Batch]
# Transformers' RMS norm rounds to float32 even in float64; the fast trunk's does not.
NEAR = {"rtol": 1e-5, "atol": 1e-5}
COVERED = ["llama", "mistral", "opt", "gpt_neox", "gpt2", "qwen2"]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("adapter", ["actor", None])
@pytest.mark.parametrize("architecture", COVERED)
def test_decoding_equals_the_plain_trunk(
    make_case: Callable[..., Case],
    architecture: str,
    adapter: str | None,
    batch_size: int,
    shake: Callable[[Engine], None],
) -> None:
    case = {"architecture": architecture, "batch_size": batch_size}
    engines = [Engine(make_case(**case)), Engine(make_case(**case, engine__trunk="plain"))]
    for engine in engines:
        shake(engine)
    fast, plain = (engine.trunks["hydra"] for engine in engines)
    assert (fast.name, plain.name) == ("fast", "plain")
    torch.manual_seed(5)
    tokens = torch.randint(48, (batch_size, 14))
    decoders = [trunk.decoder(adapter, 14, Observer()) for trunk in (fast, plain)]
    for start, end in ((0, 5), *((t, t + 1) for t in range(5, 14))):
        found, expected = (decoder.advance(tokens[:, start:end], None) for decoder in decoders)
        torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("architecture", COVERED)
def test_decoding_from_padded_prompts_equals_the_plain_trunk(
    make_case: Callable[..., Case], architecture: str, shake: Callable[[Engine], None]
) -> None:
    engines = [Engine(make_case(architecture=architecture, engine__trunk=engine)) for engine in ("fast", "plain")]
    for engine in engines:
        shake(engine)
    torch.manual_seed(5)
    tokens = torch.randint(48, (3, 14))
    mask = (torch.arange(14) >= torch.tensor([0, 3, 4])[:, None]).long()
    decoders = [engine.trunks["hydra"].decoder("actor", 14, Observer()) for engine in engines]
    for start, end in ((0, 5), *((t, t + 1) for t in range(5, 14))):
        found, expected = (decoder.advance(tokens[:, start:end], mask[:, :end]) for decoder in decoders)
        torch.testing.assert_close(found, expected, **NEAR)


@pytest.mark.parametrize("method", families()["PPO"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_seed_samples_the_same_tokens_and_trains_the_same_weights(
    make_case: Callable[..., Case], generated: Generated, method: str, dtype: str
) -> None:
    steps = [build_step(make_case(method, dtype=dtype, engine__trunk=engine)) for engine in ("fast", "plain")]
    rollouts = [generated(step) for step in steps]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    torch.testing.assert_close(rollouts[0]["old_logprobs"], rollouts[1]["old_logprobs"], rtol=1e-5, atol=1e-5)
    for step in steps:
        step.optimizers = {}
        step.run()
    gradients = [[p.grad for p in step.trained_parameters()] for step in steps]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", families()["PPO"])
def test_the_plain_trunk_recomputes_with_the_adapter_that_was_on(
    make_case: Callable[..., Case], shake: Callable[[Engine], None], method: str
) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor | None]:
        options = {"engine__trunk": "plain", "engine__gradient_checkpointing": checkpointing}
        step = build_step(make_case(method, dtype="float64", **options))
        shake(step.engine)
        step.optimizers = {}
        step.run()
        return [p.grad for p in step.trained_parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_bfloat16_decoding_is_as_near_to_float64_as_the_plain_trunk(
    make_case: Callable[..., Case], adapter_dtype: str | None
) -> None:
    def decoded(engine: str, dtype: str, adapters: str | None, seed: int) -> torch.Tensor:
        built = Engine(make_case(engine__trunk=engine, dtype=dtype, lora__dtype=adapters))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in built.adapters["hydra"].parameters():
                parameter.copy_(torch.randn(parameter.shape).mul_(0.2).bfloat16())
        tokens = torch.randint(48, (3, 9))
        decoder = built.trunks["hydra"].decoder("actor", 9, Observer())
        spans = ((0, 5), *((t, t + 1) for t in range(5, 9)))
        return torch.stack([decoder.advance(tokens[:, start:end], None).double() for start, end in spans])

    errors = {"fast": 0.0, "plain": 0.0}
    size = 0.0
    for seed in range(6):
        exact = decoded("plain", "float64", "float64", seed)
        size += float(exact.norm())
        for engine in errors:
            errors[engine] += float((decoded(engine, "bfloat16", adapter_dtype, seed) - exact).norm())
    assert errors["fast"] < 1.1 * errors["plain"]
    assert errors["plain"] < 0.1 * size


def test_fused_weights_take_no_more_memory(make_case: Callable[..., Case]) -> None:
    def weights(engine: str) -> int:
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for _, tensor in build_step(make_case(engine__trunk=engine)).persistent_tensors()
        }
        return sum(storages.values())

    assert weights("fast") == weights("plain")


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "granite"},
        {"engine__attn_implementation": "eager"},
        {"engine__cache_implementation": "dynamic"},
    ],
    ids=str,
)
def test_unsupported_cases_take_the_plain_trunk(make_case: Callable[..., Case], changes: dict[str, str]) -> None:
    assert Engine(make_case(**changes)).trunks["hydra"].name == "plain"


def test_graphs_that_the_plain_trunk_would_ignore_are_refused(make_case: Callable[..., Case]) -> None:
    """The case that asks names CUDA: only the choice of the trunk is made here."""
    case = make_case("hydra", "granite", engine__backend="torch")
    engine = Engine(case)
    asked = dataclasses.replace(case, device="cuda", options=case.options.replace({"engine.cuda_graphs": "on"}))
    with pytest.raises(CaseError, match="has no graphs, so it must be auto or off"):
        make_fast_trunk(asked, engine.models["hydra"], engine.adapters["hydra"])
