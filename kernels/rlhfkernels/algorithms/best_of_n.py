"""Best-of-n sampling (RLHF Deciphered, arXiv:2404.08555, section 7.9.1): the sample with the highest reward is kept.

Shapes: b = prompts, n = samples of a prompt.
"""

from __future__ import annotations

import math

import torch

from rlhfkernels.algorithms.common import AllSum, alone
from rlhfkernels.config.options import Options
from rlhfkernels.data.batch import Batch


def best_index(scores: torch.Tensor) -> torch.Tensor:
    """The index of the highest score of each prompt, the first of equals.

    RLHF Deciphered (arXiv:2404.08555), section 7.9.1.

    Args:
        scores: [b, n], of n samples a prompt.

    Returns:
        [b], int64.

    Example:
        >>> best_index(torch.tensor([[0.1, 0.9], [0.5, 0.2]]))
        tensor([1, 0])
    """
    return scores.argmax(1)


def kl_bound(n: int) -> float:
    """ln n − (n − 1)/n: the largest KL divergence of best-of-n from the policy that it samples, in nats.

    Example:
        >>> round(kl_bound(4), 4)
        0.6363
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: torch.Tensor, n: int) -> torch.Tensor:
    """The expected highest of ``n`` scores drawn without replacement: Σ_i r_(i) C(i−1, n−1) / C(m, n), r ascending.

    It equals the mean, over all subsets of n scores, of the subset's highest, and needs no more samples than m.

    Args:
        scores: [..., m].
        n: from 1 to m.

    Returns:
        [...].

    Raises:
        ValueError: n is below 1 or above m.

    Example:
        >>> expected_best(torch.tensor([0.0, 1.0, 2.0]), 2)  # (1 + 2 + 2) / 3
        tensor(1.6667)
    """
    m = scores.shape[-1]
    if not 1 <= n <= m:
        raise ValueError(f"n is {n}: it must be from 1 to the {m} scores of a prompt.")
    scores = scores.to(torch.result_type(scores, 1.0))  # integers would round the weights to 0
    # The lowest n − 1 are the highest of no subset; a weight of 0 would make −∞ among them NaN.
    weights = [math.comb(i, n - 1) / math.comb(m, n) for i in range(n - 1, m)]
    highest = scores.sort(-1).values[..., n - 1 :]
    return (highest * torch.tensor(weights, dtype=scores.dtype, device=scores.device)).sum(-1)


def select(batch: Batch, options: Options, all_sum: AllSum = alone) -> dict[str, torch.Tensor]:
    """Fills the column ``best`` [b]: which of its samples each prompt keeps.

    Returns:
        ``score``, the mean over all samples; ``best_score``, the mean over those that are kept; ``kl_bound``.
    """
    scores = batch["scores"].view(batch.num_rows, -1)
    batch["best"] = best_index(scores)
    kept = scores.gather(1, batch["best"][:, None])
    bound = torch.full_like(kept[0, 0], kl_bound(scores.shape[1]))
    sums = all_sum(torch.stack([scores.mean(), kept.mean(), torch.ones_like(bound)]))
    return {"score": sums[0] / sums[2], "best_score": sums[1] / sums[2], "kl_bound": bound}
