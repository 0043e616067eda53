import contextlib

import pytest

from rlhfbench.measure.agreement import check_agreement
from rlhfkernels.errors import ModelError


@pytest.mark.parametrize(
    ("stats", "dtype", "sentence"),
    [
        (
            {"ratio_error": 0.02},
            "float32",
            r"disagree by 0\.02 \(ratio_error of the first step\); the tolerance of float32 is 0\.01",
        ),
        ({"ratio_error": 0.001, "kl": -0.5}, "float64", r"disagree by 0\.001 \(ratio_error"),
        (
            {"ratio_error": 0.5, "kl": -0.5},
            "bfloat16",
            r"disagree by 0\.5 \(kl of the first step\); the tolerance of bfloat16",
        ),
        ({"ratio_error": 0.009, "kl": 0.0009}, "float32", None),
        ({"ratio_error": 0.88, "kl": 0.017}, "bfloat16", None),
        ({"ratio_error": 0.88, "kl": 0.06}, "bfloat16", r"disagree by 0\.06 \(kl of the first step\)"),
        ({"ratio_error": None, "kl": None}, "float32", None),
        ({"kl": 9.0, "score": 5.0}, "float32", None),
        ({"reference_error": 0.009, "kl": 9.0}, "float32", None),
        (
            {"reference_error": 0.02},
            "float32",
            r"the policy and the reference's log-probabilities disagree by 0\.02 \(reference_error of the first step\)",
        ),
    ],
)
def test_decoding_and_the_full_forward_must_agree(stats, dtype, sentence):
    with pytest.raises(ModelError, match=sentence) if sentence else contextlib.nullcontext():
        check_agreement(stats, dtype)


@pytest.mark.parametrize(
    ("stats", "temperature", "agrees"),
    [
        ({"ratio_error": 1.9}, 0.5, True),
        ({"ratio_error": 0.6}, 2.0, False),
        ({"reference_error": 1.9}, 0.5, False),  # read without a temperature
    ],
)
def test_rounding_grows_as_the_temperature_falls(stats, temperature, agrees):
    with contextlib.nullcontext() if agrees else pytest.raises(ModelError, match="disagree by"):
        check_agreement(stats, "bfloat16", temperature)
