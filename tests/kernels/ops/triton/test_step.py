"""A whole step with the Triton forms in place of torch's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Case, build_step, engine
from rlhfkernels.engine.fast import trunk


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_with_the_kernels_is_the_step_without(
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
    for kernels in ("torch", "triton"):
        for module in (engine, trunk):
            monkeypatch.setattr(module, "kernels_of", lambda case, kernels=kernels: kernels)
        with monkeypatch.context() as patch:
            if kernels == "triton":
                _note_launches(patch, launched)
            step = build_step(case)
            stats = step.run()
        found.append([stats.score, stats.kl, *stats.losses.values(), *stats.grad_norms.values()])
    assert launched == {"rms_norm", "swiglu", "rotary", "logprobs"}
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def _note_launches(patch: pytest.MonkeyPatch, launched: set[str]) -> None:
    """Has every op that starts a kernel put its name into ``launched``."""
    from rlhfkernels.ops.triton import launch, logprobs, rms_norm, rotary, swiglu

    for form in (logprobs, rms_norm, rotary, swiglu):
        name = Path(str(form.__file__)).stem

        def note(x: torch.Tensor, name: str = name) -> object:
            launched.add(name)
            return launch.on_device_of(x)

        patch.setattr(form, "on_device_of", note)
