"""The maths of every method as functions of tensors: losses, advantages, rewards, selection and log-probabilities.

Shapes: b or n = sequences, c = completion length, k = predicted tokens of a sequence. In ``dpo_loss`` b = pairs; in
``best_index`` b = prompts and n = samples of a prompt; in ``expected_best`` m = scores of a prompt; in
``LogitTransform`` and ``token_logprobs`` n = positions, d = hidden size, v = vocabulary.

Log-probabilities are in nats. Masks are 1.0 on real completion tokens and 0.0 on padding. Losses are sums divided by a
count that the caller gives, so that they do not depend on how a batch is split.
"""

from __future__ import annotations

from rlhfkernels.algorithms.advantages import gae, shaped_rewards, whiten
from rlhfkernels.algorithms.best_of_n import best_index, expected_best, kl_bound
from rlhfkernels.algorithms.common import masked_mean, sequence_logprobs
from rlhfkernels.algorithms.dpo import dpo_loss
from rlhfkernels.algorithms.ppo import policy_loss, value_loss
from rlhfkernels.algorithms.sft import nll_loss
from rlhfkernels.ops.logit_transform import LogitTransform
from rlhfkernels.ops.token_logprobs import token_logprobs

__all__ = [
    "LogitTransform",
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
