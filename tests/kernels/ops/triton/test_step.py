"""A training step with Triton kernels against the same step with torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Case, build_step
from rlhfkernels.engine import engine
from rlhfkernels.engine.fast import trunk


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_triton_equals_a_step_with_torch(
    device: str, make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    case = make_case(
        dtype="float32",
        device=device,
        prompt_len=3,
        completion_len=2,
        batch_size=2,
        engine__gradient_checkpointing=checkpointing,
    )
    launched: set[str] = set()
    found = []
    for backend in ("torch", "triton"):
        for module in (engine, trunk):
            monkeypatch.setattr(module, "select_backend", lambda *_, backend=backend: backend)
        with monkeypatch.context() as patch:
            if backend == "triton":
                _record_launches(patch, launched)
            step = build_step(case)
            stats = step.run()
        found.append([value for name, value in stats.items() if name != "ratio_error"])
    assert launched == {"rms_norm", "swiglu", "rotary", "token_logprobs"}
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def _record_launches(patch: pytest.MonkeyPatch, launched: set[str]) -> None:
    """Adds the names of ops that launch a kernel to ``launched``."""
    from rlhfkernels.ops.triton import launch, rms_norm, rotary, swiglu, token_logprobs

    for module in (rms_norm, rotary, swiglu, token_logprobs):
        name = Path(str(module.__file__)).stem

        def record(x: torch.Tensor, name: str = name) -> object:
            launched.add(name)
            return launch.on_device_of(x)

        patch.setattr(module, "on_device_of", record)
