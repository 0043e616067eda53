"""The C files' structures, field by field: what a tape fills in with addresses and sizes."""

from __future__ import annotations

import ctypes

Pointer, Integer, Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class CallStruct(ctypes.Structure):
    """What differs from call to call: ``struct call`` of tape.h."""

    _fields_ = [("written", Integer), ("positions", Pointer), ("mask", Pointer), ("mask_stride", Integer)]


class SegmentStruct(ctypes.Structure):
    """``struct segment`` of skinny_linear.c."""

    _fields_ = [
        ("start", Integer),
        ("stop", Integer),
        ("up", Pointer),
        ("low_offset", Integer),
        ("rank", Integer),
        ("scale", Float),
    ]


class SkinnyLinearStruct(ctypes.Structure):
    """``struct skinny_linear`` of skinny_linear.c."""

    _fields_ = [
        ("run", Pointer),
        ("x", Pointer),
        ("weight", Pointer),
        ("bias", Pointer),
        ("out", Pointer),
        ("low", Pointer),
        ("segments", Pointer),
        ("num_segments", Integer),
        ("rows", Integer),
        ("inputs", Integer),
        ("outputs", Integer),
        ("low_stride", Integer),
        ("adds", Integer),
    ]


class NormStruct(ctypes.Structure):
    """``struct norm`` of norm.c."""

    _fields_ = [
        ("run", Pointer),
        ("x", Pointer),
        ("weight", Pointer),
        ("bias", Pointer),
        ("out", Pointer),
        ("rows", Integer),
        ("size", Integer),
        ("centred", Integer),
        ("eps", Float),
    ]


class ActivationStruct(ctypes.Structure):
    """``struct activation`` of activation.c."""

    _fields_ = [
        ("run", Pointer),
        ("x", Pointer),
        ("out", Pointer),
        ("rows", Integer),
        ("size", Integer),
        ("gated", Integer),
        ("kind", Integer),
    ]


class DecodeAttentionStruct(ctypes.Structure):
    """``struct decode_attention`` of decode_attention.c."""

    _fields_ = [
        ("run", Pointer),
        ("qkv", Pointer),
        ("out", Pointer),
        ("keys", Pointer),
        ("values", Pointer),
        ("cos", Pointer),
        ("sin", Pointer),
        ("scores", Pointer),
        ("rows", Integer),
        ("heads", Integer),
        ("kv_heads", Integer),
        ("size", Integer),
        ("capacity", Integer),
        ("rotated", Integer),
        ("stride", Integer),
        ("head_stride", Integer),
        ("key_start", Integer),
        ("value_start", Integer),
        ("window", Integer),
        ("scale", Float),
    ]


# By the name under which the C file exports the size of its own: ``size_of_<name>()``.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "segment": SegmentStruct,
    "skinny_linear": SkinnyLinearStruct,
    "norm": NormStruct,
    "activation": ActivationStruct,
    "decode_attention": DecodeAttentionStruct,
}
