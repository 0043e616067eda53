"""What tests of the kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Batch, Observer, TrainingStep
from rlhfkernels.engine.engine import Engine
from rlhfkernels.ops.native import build, causal_attention, product


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
    failure = build.why_not()
    if failure is not None:
        pytest.skip(f"the C cannot be compiled here: {failure}")
    return build.library()


@pytest.fixture
def run_in_c(monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL) -> list[str]:
    """Has every product in C, of however few numbers; notes each, and each attention over whole sequences."""
    run: list[str] = []

    def noted(name: str, form: Callable[..., object]) -> Callable[..., object]:
        def note(*arguments: object, **options: object) -> object:
            run.append(name)
            return form(*arguments, **options)

        return note

    for module, name in ((product, "multiply"), (causal_attention, "forward"), (causal_attention, "backward")):
        monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
    monkeypatch.setattr(product, "beats_library", lambda: True)
    monkeypatch.setattr(product, "_LEAST_WORK", 0)
    monkeypatch.setattr(product, "_FEWEST_ROWS", 0)
    return run
