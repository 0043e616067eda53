"""The C files' structures, field by field: what tapes and calls fill in with addresses and numbers."""

from __future__ import annotations

import ctypes

Pointer, Integer, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Operands(ctypes.Structure):
    """A structure of the C files: addresses, then 64-bit integers, then floats, as ``_structure`` declares it."""


# By the name under which the C file exports the size of its own: ``size_of_<name>()``.
STRUCTURES: dict[str, type[Operands]] = {}


def _structure(name: str, addresses: str, integers: str, floats: str = "") -> type[Operands]:
    """The structure called ``name`` in C, from its fields' names in their order."""
    kinds = ((addresses, Pointer), (integers, Integer), (floats, Float))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    STRUCTURES[name] = type(name, (Operands,), {"_fields_": fields})
    return STRUCTURES[name]


# Of a tape: what differs from call to call, and the ops, each of which begins with the function that runs it.
Call = _structure("call", "positions mask", "written mask_stride")
Segment = _structure("segment", "up", "start stop low_offset rank", "scale")
SkinnyLinear = _structure(
    "skinny_linear",
    "run x weight bias out low segments",
    "num_segments rows inputs outputs low_stride adds",
)
Norm = _structure("norm", "run x weight bias out", "rows size centred", "eps")
Activation = _structure("activation", "run x out", "rows size gated kind")
DecodeAttention = _structure(
    "decode_attention",
    "run qkv out keys values cos sin scores",
    "rows heads kv_heads size capacity rotated stride head_stride key_start value_start window",
    "scale",
)

# Of a call.
CausalAttention = _structure(
    "causal_attention",
    "qkv out sums grad_out grad_qkv mask scratch",
    "batch length stride heads kv_heads size start window head_stride key_start value_start scratch_size",
    "scale",
)
Product = _structure(
    "product",
    "a b also_a also_b out scratch",
    "rows columns inner a_row a_column b_row b_column "
    "also_inner also_a_row also_a_column also_b_row also_b_column out_row adds",
    "scale also_scale",
)
RmsNorm = _structure("rms_norm", "x weight inverse out grad grad_x", "rows size", "eps")
Swiglu = _structure("swiglu", "gate_up out grad grad_gate_up", "rows size")
Rotary = _structure("rotary", "x cos sin", "rows table_rows blocks groups rotated size turned", "way")
Logprobs = _structure("logprobs", "raw targets out weights", "rows size slope", "factor")
Sample = _structure("sample", "logits uniform tokens logprobs", "rows size")
