"""The steps of decoding in C against the same steps by torch, and against the plain path."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.engine.fast.native_steps import NativeSteps
from rlhfkernels.engine.fast.torch_steps import TorchSteps
from rlhfkernels.ops.native import build

pytestmark = pytest.mark.usefixtures("library")

Generated = Callable[[TrainingStep], Batch]
COVERED = ["llama", "mistral", "opt", "gpt_neox", "gpt2", "qwen2"]
NEAR = {"rtol": 1e-5, "atol": 1e-5}
PROMPT, WHOLE = 5, 14


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The form of every generation's steps, as they are made."""
    taken: list[type] = []
    for form in (NativeSteps, TorchSteps):
        make = form.__init__

        def note(self: object, *arguments: object, make: Callable[..., None] = make) -> None:
            taken.append(type(self))
            make(self, *arguments)

        monkeypatch.setattr(form, "__init__", note)
    return taken


def decoded(engine: Engine, adapter: str | None, batch_size: int, num_padding: list[int] | None) -> torch.Tensor:
    """[steps, b, d], of the prompt and of every step after it."""
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
def test_every_step_equals_torchs_and_the_plain_paths(
    make_case: Callable[..., Case],
    shake: Callable[[Engine], None],
    forms: list[type],
    architecture: str,
    adapter: str | None,
    batch_size: int,
    num_padding: list[int] | None,
) -> None:
    found = []
    for options in (
        {"engine__backend": "native"},
        {"engine__backend": "torch"},
        {"engine__backend": "torch", "engine__trunk": "plain"},
    ):
        size = {"architecture": architecture, "batch_size": batch_size, "lora__alpha": 2.1}
        engine = Engine(make_case(dtype="float32", **size, **options))
        shake(engine)
        found.append(decoded(engine, adapter, batch_size, num_padding))
    assert forms == [NativeSteps, TorchSteps]
    native, by_torch, plain = found
    torch.testing.assert_close(native, by_torch, **NEAR)
    torch.testing.assert_close(native, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_token", [None, 7])
@pytest.mark.parametrize("architecture", COVERED)
def test_the_same_seed_samples_the_same_tokens(
    make_case: Callable[..., Case],
    generated: Generated,
    forms: list[type],
    architecture: str,
    stop_token: int | None,
) -> None:
    rollouts = []
    for kernels in ("native", "torch"):
        case = make_case(
            architecture=architecture, dtype="float32", engine__backend=kernels, rollout__stop_token_id=stop_token
        )
        rollouts.append(generated(build_step(case)))
    assert forms == [NativeSteps, TorchSteps]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    torch.testing.assert_close(rollouts[0]["old_logprobs"], rollouts[1]["old_logprobs"], **NEAR)


def test_a_later_generation_reads_the_weights_of_its_time(
    make_case: Callable[..., Case], shake: Callable[[Engine], None]
) -> None:
    engines = [Engine(make_case(dtype="float32", engine__backend=kernels)) for kernels in ("native", "torch")]
    before = decoded(engines[0], "actor", 3, None)
    for engine in engines:
        shake(engine)
    after, expected = (decoded(engine, "actor", 3, None) for engine in engines)
    torch.testing.assert_close(after, expected, **NEAR)
    assert not torch.allclose(after, before, atol=1e-2)


def test_more_positions_than_a_cache_has_are_refused(make_case: Callable[..., Case]) -> None:
    decoder = Engine(make_case(dtype="float32")).trunks["hydra"].decoder("actor", 4, Observer())
    decoder.advance(torch.ones(2, 3, dtype=torch.int64), None)
    one = torch.ones(2, 1, dtype=torch.int64)
    decoder.advance(one, None)
    with pytest.raises(AssertionError, match="4 positions fill the cache"):
        decoder.advance(one, None)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({}, NativeSteps),
        ({"batch_size": 64}, NativeSteps),
        ({"batch_size": 65}, TorchSteps),
        ({"dtype": "float64"}, TorchSteps),
        ({"dtype": "bfloat16"}, TorchSteps),
        ({"lora__dtype": "float64"}, TorchSteps),
        ({"lora__dtype": "bfloat16"}, TorchSteps),
        ({"engine__backend": "torch"}, TorchSteps),
    ],
    ids=str,
)
def test_what_the_c_does_not_cover_takes_torchs_form(
    make_case: Callable[..., Case],
    generated: Generated,
    forms: list[type],
    changes: dict[str, object],
    form: type,
) -> None:
    case = make_case(**({"dtype": "float32"} | changes))
    rollout = generated(build_step(case))
    assert forms == [form]
    assert rollout["old_logprobs"].isfinite().all()


def test_an_activation_that_the_c_does_not_know(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, forms: list[type]
) -> None:
    engine = Engine(make_case(dtype="float32"))
    blocks = engine.trunks["hydra"]._blocks
    blocks.layers[1] = dataclasses.replace(blocks.layers[1], activation=torch.tanh)
    found = decoded(engine, "actor", 2, None)
    assert forms == [TorchSteps]
    assert found.isfinite().all()


def test_without_a_compiler_the_steps_are_torchs(
    make_case: Callable[..., Case],
    generated: Generated,
    monkeypatch: pytest.MonkeyPatch,
    forms: list[type],
) -> None:
    monkeypatch.setattr(build, "why_not", lambda: "no cc is installed")
    monkeypatch.setattr(build, "library", lambda: pytest.fail("there is none"))
    generated(build_step(make_case(dtype="float32")))
    assert forms == [TorchSteps]


class NotesSizes(TorchDispatchMode):
    """Sums the bytes that ``torch.empty`` and its kin make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        found = func(*args, **(kwargs or {}))
        if "empty" in str(func):
            self.made.append(found.numel() * found.element_size())
        return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fake_tensors_make_the_same_buffers_and_run_nothing(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, forms: list[type], architecture: str
) -> None:
    case = make_case(architecture=architecture, dtype="float32")
    sizes = []
    for fake in (False, True):
        if fake:
            monkeypatch.setattr("rlhfkernels.ops.native.tape.Tape.run", lambda *_, **__: pytest.fail("it ran"))
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad():
            engine = Engine(case, with_weights=not fake)
            decoder = engine.trunks["hydra"].decoder("actor", WHOLE, Observer())
            decoder.advance(torch.zeros(4, PROMPT, dtype=torch.int64), None)
            with NotesSizes() as notes:
                hidden = decoder.advance(torch.zeros(4, 1, dtype=torch.int64), None)
            assert hidden.shape == (4, 32)
        sizes.append(notes.made)
    assert forms == [NativeSteps, NativeSteps]
    assert sizes[0]
    assert sizes[0] == sizes[1]
