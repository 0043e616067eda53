"""Decode steps in C against the same steps by torch and by the plain trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.engine.fast.native_decode import NativeDecodeSteps
from rlhfkernels.engine.fast.torch_decode import TorchDecodeSteps
from rlhfkernels.ops.native import build

Generated = Callable[[TrainingStep], Batch]
pytestmark = pytest.mark.usefixtures("library")

COVERED = ["llama", "mistral", "opt", "gpt_neox", "gpt2", "qwen2"]
NEAR = {"rtol": 1e-5, "atol": 1e-5}
PROMPT, WHOLE = 5, 14


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Lists the class of the decode steps of every generation. A loaded model is not checked, which generates too."""
    monkeypatch.setattr(Engine, "_check_models", lambda engine: None)
    taken: list[type] = []
    for steps in (NativeDecodeSteps, TorchDecodeSteps):
        make = steps.__init__

        def record(self: object, *arguments: object, make: Callable[..., None] = make) -> None:
            taken.append(type(self))
            make(self, *arguments)

        monkeypatch.setattr(steps, "__init__", record)
    return taken


def decoded(engine: Engine, adapter: str | None, batch_size: int, num_padding: list[int] | None) -> torch.Tensor:
    """Decodes [steps, b, d]: the last state of the prompt and of every step after it."""
    tokens = torch.randint(48, (batch_size, WHOLE), generator=torch.Generator().manual_seed(5))
    mask = None
    if num_padding is not None:
        mask = (torch.arange(WHOLE) >= torch.tensor(num_padding)[:, None]).long()
    decoder = engine.trunks["hydra"].decoder(adapter, WHOLE, Observer())
    hidden = []
    for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, WHOLE))):
        hidden.append(decoder.advance(tokens[:, start:end], None if mask is None else mask[:, :end]).clone())
    return torch.stack(hidden)


@pytest.mark.parametrize(
    ("batch_size", "num_padding"), [(1, None), (3, None), (5, None), (1, [2]), (3, [0, 3, 4]), (5, [4, 0, 1, 0, 2])]
)
@pytest.mark.parametrize("adapter", ["actor", None])
@pytest.mark.parametrize("architecture", COVERED)
def test_every_step_equals_torchs_and_the_plain_trunks(
    make_case: Callable[..., Case],
    shake: Callable[[Engine], None],
    steps_taken: list[type],
    architecture: str,
    adapter: str | None,
    batch_size: int,
    num_padding: list[int] | None,
) -> None:
    found = []
    torch_backend = {"engine__backend": "torch"}
    for options in ({"engine__backend": "native"}, torch_backend, {**torch_backend, "engine__trunk": "plain"}):
        size = {"architecture": architecture, "batch_size": batch_size, "lora__alpha": 2.1}
        engine = Engine(make_case(dtype="float32", **size, **options))
        shake(engine)
        found.append(decoded(engine, adapter, batch_size, num_padding))
    assert steps_taken == [NativeDecodeSteps, TorchDecodeSteps]
    native, by_torch, plain = found
    torch.testing.assert_close(native, by_torch, **NEAR)
    torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_token", [None, 7])
@pytest.mark.parametrize("architecture", COVERED)
def test_the_same_seed_samples_the_same_tokens(
    make_case: Callable[..., Case],
    generated: Generated,
    steps_taken: list[type],
    architecture: str,
    stop_token: int | None,
) -> None:
    rollouts = []
    for kernels in ("native", "torch"):
        case = make_case(
            architecture=architecture, dtype="float32", engine__backend=kernels, rollout__stop_token_id=stop_token
        )
        rollouts.append(generated(build_step(case)))
    assert steps_taken == [NativeDecodeSteps, TorchDecodeSteps]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    torch.testing.assert_close(rollouts[0]["old_logprobs"], rollouts[1]["old_logprobs"], **NEAR)


def test_a_later_generation_reads_updated_weights(
    make_case: Callable[..., Case], shake: Callable[[Engine], None]
) -> None:
    engines = [Engine(make_case(dtype="float32", engine__backend=kernels)) for kernels in ("native", "torch")]
    before = decoded(engines[0], "actor", 3, None)
    for engine in engines:
        shake(engine)
    after, expected = (decoded(engine, "actor", 3, None) for engine in engines)
    torch.testing.assert_close(after, expected, **NEAR)
    assert not torch.allclose(after, before, atol=1e-2)


def test_more_positions_than_the_cache_holds_are_refused(make_case: Callable[..., Case]) -> None:
    decoder = Engine(make_case(dtype="float32")).trunks["hydra"].decoder("actor", 4, Observer())
    decoder.advance(torch.ones(2, 3, dtype=torch.int64), None)
    one = torch.ones(2, 1, dtype=torch.int64)
    decoder.advance(one, None)
    with pytest.raises(ValueError, match="the KV cache holds 4 positions"):
        decoder.advance(one, None)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, NativeDecodeSteps),
        ({"batch_size": 64}, NativeDecodeSteps),
        ({"batch_size": 65}, TorchDecodeSteps),
        ({"dtype": "float64"}, TorchDecodeSteps),
        ({"dtype": "bfloat16"}, TorchDecodeSteps),
        ({"lora__dtype": "float64"}, TorchDecodeSteps),
        ({"lora__dtype": "bfloat16"}, TorchDecodeSteps),
        ({"engine__backend": "torch"}, TorchDecodeSteps),
    ],
    ids=str,
)
def test_unsupported_cases_take_torchs_steps(
    make_case: Callable[..., Case],
    generated: Generated,
    steps_taken: list[type],
    changes: dict[str, object],
    steps: type,
) -> None:
    case = make_case(**({"dtype": "float32"} | changes))
    rollout = generated(build_step(case))
    assert steps_taken == [steps]
    assert rollout["old_logprobs"].isfinite().all()


def test_an_unsupported_activation_takes_torchs_steps(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, steps_taken: list[type]
) -> None:
    engine = Engine(make_case(dtype="float32"))
    blocks = engine.trunks["hydra"]._blocks
    blocks.layers[1] = dataclasses.replace(blocks.layers[1], activation=torch.tanh)
    found = decoded(engine, "actor", 2, None)
    assert steps_taken == [TorchDecodeSteps]
    assert found.isfinite().all()


def test_without_a_compiler_torchs_steps_are_taken(
    make_case: Callable[..., Case], generated: Generated, monkeypatch: pytest.MonkeyPatch, steps_taken: list[type]
) -> None:
    monkeypatch.setattr(build, "unavailable_reason", lambda: "no cc is installed")
    monkeypatch.setattr(build, "library", lambda: pytest.fail("it was built"))
    generated(build_step(make_case(dtype="float32")))
    assert steps_taken == [TorchDecodeSteps]


class AllocatedSizes(TorchDispatchMode):
    """Lists the sizes in bytes of tensors that ``torch.empty`` and related functions allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func):
            self.sizes.append(result.numel() * result.element_size())
        return result


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fake_tensors_allocate_the_same_buffers_and_run_nothing(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, steps_taken: list[type], architecture: str
) -> None:
    case = make_case(architecture=architecture, dtype="float32")
    sizes = []
    for fake in (False, True):
        if fake:
            monkeypatch.setattr("rlhfkernels.ops.native.program.Program.run", lambda *_, **__: pytest.fail("it ran"))
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            engine = Engine(case, with_weights=not fake)
            decoder = engine.trunks["hydra"].decoder("actor", WHOLE, Observer())
            decoder.advance(torch.zeros(4, PROMPT, dtype=torch.int64), None)
            with AllocatedSizes() as allocated:
                hidden = decoder.advance(torch.zeros(4, 1, dtype=torch.int64), None)
            assert hidden.shape == (4, 32)
        sizes.append(allocated.sizes)
    assert steps_taken == [NativeDecodeSteps, NativeDecodeSteps]
    assert sizes[0]
    assert sizes[0] == sizes[1]
