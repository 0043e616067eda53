"""The maths of every method as functions of tensors: losses, advantages, rewards, selection and log-probabilities."""

from __future__ import annotations

from rlhfkernels.algorithms.advantages import gae, shaped_rewards, whiten
from rlhfkernels.algorithms.best_of_n import best_index, expected_best, kl_bound
from rlhfkernels.algorithms.common import masked_mean, sequence_logprobs
from rlhfkernels.algorithms.dpo import dpo_loss
from rlhfkernels.algorithms.ppo import policy_loss, value_loss
from rlhfkernels.algorithms.sft import nll_loss
from rlhfkernels.ops.token_logprobs import token_logprobs

__all__ = [
    "best_index",
    "dpo_loss",
    "expected_best",
    "gae",
    "kl_bound",
    "masked_mean",
    "nll_loss",
    "policy_loss",
    "sequence_logprobs",
    "shaped_rewards",
    "token_logprobs",
    "value_loss",
    "whiten",
]
