"""It learns: with a reward that counts a token, every method raises the mean reward by a stated margin."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhfkernels import Case, build_step
from rlhfkernels.data.batch import Batch
from rlhfkernels.methods.table import families

TOKEN = 7
STEPS = 60
# By chance a token is 1 of 48. The mean of the last five steps must stand this far above the first step's.
MARGIN = 0.5


def share_of_token(batch: Batch) -> object:
    return (batch.completions == TOKEN).float().mean(1)


@pytest.mark.parametrize("method", families()["PPO"])
def test_the_mean_reward_rises_by_the_margin(make_case: Callable[..., Case], method: str) -> None:
    case = make_case(
        method,
        dtype="float32",
        prompt_len=4,
        completion_len=8,
        batch_size=32,
        lora__r=8,
        optimizer__learning_rate=3e-3,
        ppo__critic_learning_rate=3e-3,
        ppo__num_mini_batches=2,
        ppo__num_ppo_epochs=2,
        ppo__kl_coef=0.0,
    )
    step = build_step(case, reward_fn=share_of_token)
    scores = [float(step.run()["score"]) for _ in range(STEPS)]
    print(f"{method}: first {scores[0]:.3f}, last five {sum(scores[-5:]) / 5:.3f}")
    assert scores[0] < 0.1
    assert sum(scores[-5:]) / 5 > scores[0] + MARGIN
