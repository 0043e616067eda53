"""All ops: name, reference, function and backends. Code, tests and benchmarks read the list from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rlhfkernels.ops.causal_attention import causal_attention, causal_attention_reference
from rlhfkernels.ops.decode_attention import decode_attention, decode_attention_reference
from rlhfkernels.ops.lora_linear import lora_linear, lora_linear_reference
from rlhfkernels.ops.matmul import matmul, matmul_reference
from rlhfkernels.ops.rms_norm import rms_norm, rms_norm_reference
from rlhfkernels.ops.rotary import rotary_, rotary_reference
from rlhfkernels.ops.sample import sample, sample_reference
from rlhfkernels.ops.skinny_linear import skinny_linear, skinny_linear_reference
from rlhfkernels.ops.swiglu import swiglu, swiglu_reference
from rlhfkernels.ops.token_logprobs import token_logprobs, token_logprobs_reference


class Op(NamedTuple):
    """An op.

    Attributes:
        reference: computes the op by its formula, with the arguments of ``function`` except ``backend``.
        function: computes it on the backend that fits the tensors.
        backends: those that exist. In C, ``decode_attention`` is a method of ``Program`` only, and ``lora_linear`` runs
            ``matmul``.
    """

    reference: Callable[..., Any]
    function: Callable[..., Any]
    backends: tuple[str, ...]


_ALL = ("torch", "triton", "native")
_CPU = ("torch", "native")

OPS: dict[str, Op] = {
    "causal_attention": Op(causal_attention_reference, causal_attention, _CPU),
    "decode_attention": Op(decode_attention_reference, decode_attention, _CPU),
    "lora_linear": Op(lora_linear_reference, lora_linear, _CPU),
    "matmul": Op(matmul_reference, matmul, _CPU),
    "rms_norm": Op(rms_norm_reference, rms_norm, _ALL),
    "rotary": Op(rotary_reference, rotary_, _ALL),
    "sample": Op(sample_reference, sample, _CPU),
    "skinny_linear": Op(skinny_linear_reference, skinny_linear, _CPU),
    "swiglu": Op(swiglu_reference, swiglu, _ALL),
    "token_logprobs": Op(token_logprobs_reference, token_logprobs, _ALL),
}
