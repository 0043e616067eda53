"""Supervised fine-tuning: cross-entropy on demonstrations.

Shapes: n = sequences, k = predicted tokens of a sequence.
"""

from __future__ import annotations

import torch

from rlhfkernels.algorithms.common import Counts, Loss, Reader, masked_mean
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


def nll_loss(logprobs: torch.Tensor, mask: torch.Tensor, *, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """−Σ log π(y_t | x, y_<t) / num_tokens (Aligning LLMs without RL, equation 5; RLHF Deciphered, equation 2).

    Args:
        logprobs: [n, k].
        mask: [n, k], 1.0 on the tokens that count.
        num_tokens: such tokens of the whole mini-batch, of which these rows may be a part.

    Returns:
        A scalar.

    Example:
        >>> nll_loss(torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2), num_tokens=2)
        tensor(2.)
    """
    return -masked_mean(logprobs, mask, num_tokens)


def demonstrations(read: Reader, batch: Batch, options: Options, counts: Counts) -> Loss:
    """Negative log-likelihood of the completions, or of whole sequences; see ``SFTOptions``."""
    if options.sft.completion_only_loss:
        logprobs, mask = read.logprobs()[0], batch.mask
    else:
        logprobs, mask = read.all_logprobs()
    return Loss(nll_loss(logprobs, mask, num_tokens=counts.tokens))
