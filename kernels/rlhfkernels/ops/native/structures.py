"""The structs of the C files, declared field by field for ctypes."""

from __future__ import annotations

import ctypes

Pointer, Integer, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float

# Pointers to int64 elements; all others point to float32.
INT64_FIELDS = frozenset({"positions", "mask", "targets", "tokens"})


class Operands(ctypes.Structure):
    """A struct of the C files: pointers, then 64-bit integers, then floats."""


# By name in C, under which the library exports the size: ``size_of_<name>()``.
STRUCTURES: dict[str, type[Operands]] = {}


def _structure(name: str, pointers: str, integers: str, floats: str = "") -> type[Operands]:
    """Declares the struct ``name`` with its fields in order."""
    kinds = ((pointers, Pointer), (integers, Integer), (floats, Float))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    STRUCTURES[name] = type(name, (Operands,), {"_fields_": fields})
    return STRUCTURES[name]


Step = _structure("step", "positions mask", "cache_len mask_stride")
Command = _structure("command", "run operands", "")
Segment = _structure("segment", "up", "start stop low_offset rank", "scale")
SkinnyLinear = _structure(
    "skinny_linear",
    "x weight bias out low segments",
    "num_segments rows inputs outputs low_stride accumulate",
)
Norm = _structure("norm", "x weight bias inverse out grad grad_x", "rows size centered", "eps")
Activation = _structure("activation", "x out grad grad_x", "rows size gated kind")
DecodeAttention = _structure(
    "decode_attention",
    "qkv out keys values cos signed_sin scores",
    "rows heads kv_heads size capacity rotary_size stride head_stride key_start value_start window",
    "scale",
)
CausalAttention = _structure(
    "causal_attention",
    "qkv out logsumexp grad_out grad_qkv mask scratch",
    "batch length stride heads kv_heads size start window head_stride key_start value_start scratch_size",
    "scale",
)
Matmul = _structure(
    "matmul",
    "a b low_a low_b out scratch",
    "rows columns inner a_row a_column b_row b_column "
    "rank low_a_row low_a_column low_b_row low_b_column out_row accumulate",
    "scale low_scale",
)
Rotary = _structure(
    "rotary", "x cos signed_sin", "rows table_rows blocks groups rotated_groups size rotary_size", "direction"
)
TokenLogprobs = _structure("token_logprobs", "raw targets out weights", "rows size with_gradient", "factor")
Sample = _structure("sample", "logits uniform tokens logprobs", "rows size")
