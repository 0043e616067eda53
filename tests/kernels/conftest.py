"""Shared fixtures of the kernels' tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.ops.native import build, causal_attention, matmul
from rlhfkernels.training import step as training_step


@pytest.fixture
def shake() -> Callable[[Engine], None]:
    """Gives every adapter weight a value, so that an adapter that is on shows."""

    def shake(engine: Engine) -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            for adapters in engine.adapters.values():
                for parameter in adapters.parameters():
                    parameter.normal_(std=0.2)

    return shake


@pytest.fixture
def small_step(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingStep]:
    """Builds the step of a small float64 case that reads text as bytes, as a preset does; options have their names."""
    monkeypatch.setattr(training_step, "load_tokenizer", lambda model: None)

    def build(method: str, *, batch_size: int = 4, **options: object) -> TrainingStep:
        named = {name.replace(".", "__"): value for name, value in options.items()}
        return build_step(make_case(method, "bytes", batch_size=batch_size, **named))

    return build


@pytest.fixture
def generated() -> Callable[[TrainingStep], Batch]:
    """Runs the generate phase of a step alone."""

    def generate(step: TrainingStep) -> Batch:
        stage = step.method.generate
        assert stage is not None
        prompts = step._source.next_batch(step._generator)
        return step.engine.generate(stage.role, prompts, step._generator, Observer())

    return generate


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The compiled ops."""
    reason = build.unavailable_reason()
    if reason is not None:
        pytest.skip(f"the C cannot be compiled here: {reason}")
    return build.library()


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> list[str]:
    """Runs every matmul in C, however small; lists the calls of it and of causal attention by name."""
    calls: list[str] = []

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def record(*arguments: object, **options: object) -> object:
            calls.append(name)
            return function(*arguments, **options)

        return record

    for module, name in ((matmul, "matmul"), (causal_attention, "forward"), (causal_attention, "backward")):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    monkeypatch.setattr(matmul, "beats_torch", lambda: True)
    monkeypatch.setattr(matmul, "_MIN_MULTIPLY_ADDS", 0)
    monkeypatch.setattr(matmul, "_MIN_ROWS", 0)
    return calls
