"""Direct preference optimization (arXiv:2305.18290; Aligning LLMs without RL, equations 10 to 12).

Shapes: b = pairs, n = 2 b sequences: chosen, then rejected, pair by pair.
"""

from __future__ import annotations

import torch

from rlhfkernels.algorithms.common import Counts, Loss, Reader, sequence_logprobs
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    *,
    beta: float,
    num_pairs: int,
) -> torch.Tensor:
    """−Σ log σ(β (Δ_w − Δ_l)) / num_pairs, Δ = ℓ − ℓ_ref, ℓ a sequence's summed log-probability.

    DPO (arXiv:2305.18290), equation 7.

    Args:
        chosen: [b], ℓ_w of the policy.
        rejected: [b], ℓ_l of the policy.
        reference_chosen: [b].
        reference_rejected: [b].
        beta: β.
        num_pairs: pairs of the whole mini-batch, of which these may be a part.

    Returns:
        A scalar; ln 2 where policy and reference are equal.

    Example:
        >>> logprobs = torch.tensor([-10.0, -12.0])
        >>> dpo_loss(logprobs, logprobs - 1, logprobs, logprobs - 1, beta=0.1, num_pairs=2)
        tensor(0.6931)
    """
    margins = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * margins).sum() / num_pairs


def pairs(read: Reader, batch: Batch, options: Options, counts: Counts) -> Loss:
    """The policy's objective over preference pairs.

    Statistics, means over the pairs: ``accuracy`` (share with Δ_w > Δ_l), ``margin`` (β (Δ_w − Δ_l)),
    ``chosen_logprob`` and ``rejected_logprob``; both log-probabilities may fall. ``reference_error`` is the largest
    |Δ| / |y|: 0 but for rounding in the first step, whose policy is a fresh pass of the reference's weights.
    """
    sums = sequence_logprobs(read.logprobs()[0], batch.mask)
    chosen, rejected = sums.view(-1, 2).unbind(1)
    reference_chosen, reference_rejected = batch["reference_logprobs"].view(-1, 2).unbind(1)
    beta = options.dpo.beta
    loss = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=beta, num_pairs=counts.rows)
    with torch.no_grad():
        margins = (chosen - reference_chosen) - (rejected - reference_rejected)
        statistics = {
            "accuracy": (margins > 0).float().sum() / counts.rows,
            "margin": beta * margins.sum() / counts.rows,
            "chosen_logprob": chosen.sum() / counts.rows,
            "rejected_logprob": rejected.sum() / counts.rows,
        }
        moved = (sums.detach() - batch["reference_logprobs"]).abs() / batch.mask.sum(1)
    return Loss(loss, sums=statistics, maxima={"reference_error": moved.max()})
