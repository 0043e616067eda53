"""The check of a first step: two readings of the initial weights must agree."""

from __future__ import annotations

from collections.abc import Mapping

from rlhfkernels.errors import ModelError

# Largest magnitude of a statistic of the first step that rounding explains, by dtype. ``ratio_error`` is a maximum over
# tokens, ``kl`` their mean, ``reference_error`` a maximum over the means of sequences. In bfloat16, over 16 models and
# 2 to 5 seeds, the largest of the first two are 0.25 and 0.007 with real weights (SmolLM2-135M, 192 tokens), and 0.88
# and 0.017 where rounding sends a token to another expert (Mixtral).
AGREEMENT = {
    "reference_error": {"float64": 1e-4, "float32": 1e-2, "bfloat16": 1.0},
    "ratio_error": {"float64": 1e-4, "float32": 1e-2, "bfloat16": 1.0},
    "kl": {"float64": 1e-5, "float32": 1e-3, "bfloat16": 0.05},
}


# What disagrees, where it is not decoding and the full forward.
_READINGS = {"reference_error": "the policy and the reference's log-probabilities"}


def check_agreement(stats: Mapping[str, float | None], dtype: str, temperature: float = 1.0) -> None:
    """Refuses a first step in which two readings of the initial weights give different log-probabilities.

    Decoding and the full forward pass: the probability ratio is 1 and KL is 0 but for rounding. The policy and the
    columns that were read from the reference, perhaps once for the data set: they differ by rounding alone.

    Args:
        stats: Of the first step. KL is checked only beside ``ratio_error``.
        dtype: Of the weights.
        temperature: Of the rollout. Logits are divided by it, and so is their rounding.

    Raises:
        ModelError: They disagree.
    """
    for name, limits in AGREEMENT.items():
        readings = _READINGS.get(name, "decoding and the full forward")
        value = stats.get(name) if name in _READINGS or "ratio_error" in stats else None
        limit = limits[dtype] / (1.0 if name in _READINGS else temperature)
        if value is not None and abs(value) > limit:
            raise ModelError(
                f"{readings} disagree by {abs(value):.2g} ({name} of the first step); the tolerance of {dtype} is "
                f"{limit:.2g}."
            )
