"""Training steps in C against the same steps by torch: sampled tokens and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Batch, Case, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.methods.table import families

# Prompts of several lengths, and a stop token, so that completions differ in length too.
PADDED = [[7, 3, 9, 30, 2], [5, 6], [11, 12, 40]]
KINDS = {
    "whole": {},
    "checkpointed": {"engine__gradient_checkpointing": True},
    "padded, in parts": {"engine__micro_batch_size": 2, "rollout__stop_token_id": 7, "ppo__entropy_coef": 0.01},
}


def stepped(case: Case, shake: Callable[[Engine], None], padded: bool) -> tuple[Batch, list[torch.Tensor]]:
    """Returns the batch of a step and the gradients of all trained parameters."""
    step = build_step(case)
    shake(step.engine)
    if padded:
        step._source._prompts, step._source._has_mask = PADDED, True
    step.optimizers = {}
    batch, stats = step.infer()
    step.update(batch, stats=stats).check_finite()
    return batch, [parameter.grad for parameter in step.trained_parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", families()["PPO"])
def test_a_native_step_equals_torchs(
    make_case: Callable[..., Case], shake: Callable[[Engine], None], native_calls: list[str], method: str, kind: str
) -> None:
    found = []
    for kernels in ("torch", "native"):
        assert not native_calls
        case = make_case(method, dtype="float32", engine__backend=kernels, **KINDS[kind])
        found.append(stepped(case, shake, "padded" in kind))
    assert set(native_calls) == {"matmul", "forward", "backward"}
    (expected, gradients), (ours, our_gradients) = found
    assert (expected.attention_mask is not None) is ("padded" in kind)
    assert torch.equal(ours.tokens, expected.tokens)
    torch.testing.assert_close(ours["old_logprobs"], expected["old_logprobs"], rtol=1e-5, atol=1e-5)
    for ours_of, by_torch in zip(our_gradients, gradients, strict=True):
        assert by_torch.norm() > 0
        assert (ours_of - by_torch).norm() < 1e-4 * by_torch.norm()
