"""Ops in C on memory that stays where it is, written down once and replayed in one call.

Every operand is a contiguous float32 tensor of a processor, and is kept alive by the tape.

Shapes: b = rows, i = inputs, o = outputs, d = size of a row, h = query heads, k = key-value heads, e = head size,
n = positions that a cache can hold, s = rotated part of a head, r = rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhfkernels.ops.native.build import library

_Pointer, _Integer, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_LEAST_BYTES = 2**15
# Activations by their number in activation.c.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


class _Call(ctypes.Structure):
    _fields_ = [("written", _Integer), ("positions", _Pointer), ("mask", _Pointer), ("mask_stride", _Integer)]


class _Segment(ctypes.Structure):
    _fields_ = [
        ("start", _Integer),
        ("stop", _Integer),
        ("up", _Pointer),
        ("low_offset", _Integer),
        ("rank", _Integer),
        ("scale", _Float),
    ]


class _SkinnyLinear(ctypes.Structure):
    _fields_ = [
        ("run", _Pointer),
        ("x", _Pointer),
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("out", _Pointer),
        ("low", _Pointer),
        ("segments", _Pointer),
        ("num_segments", _Integer),
        ("rows", _Integer),
        ("inputs", _Integer),
        ("outputs", _Integer),
        ("low_stride", _Integer),
        ("adds", _Integer),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        ("run", _Pointer),
        ("x", _Pointer),
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("out", _Pointer),
        ("rows", _Integer),
        ("size", _Integer),
        ("centred", _Integer),
        ("eps", _Float),
    ]


class _Activation(ctypes.Structure):
    _fields_ = [
        ("run", _Pointer),
        ("x", _Pointer),
        ("out", _Pointer),
        ("rows", _Integer),
        ("size", _Integer),
        ("gated", _Integer),
        ("kind", _Integer),
    ]


class _DecodeAttention(ctypes.Structure):
    _fields_ = [
        ("run", _Pointer),
        ("qkv", _Pointer),
        ("out", _Pointer),
        ("keys", _Pointer),
        ("values", _Pointer),
        ("cos", _Pointer),
        ("sin", _Pointer),
        ("scores", _Pointer),
        ("rows", _Integer),
        ("heads", _Integer),
        ("kv_heads", _Integer),
        ("size", _Integer),
        ("capacity", _Integer),
        ("rotated", _Integer),
        ("stride", _Integer),
        ("head_stride", _Integer),
        ("key_start", _Integer),
        ("value_start", _Integer),
        ("window", _Integer),
        ("scale", _Float),
    ]


# The C files export the sizes of their own.
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "segment": _Segment,
    "skinny_linear": _SkinnyLinear,
    "norm": _Norm,
    "activation": _Activation,
    "decode_attention": _DecodeAttention,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Outputs of a ``skinny_linear`` that share a multiplier and a low-rank part.

    Attributes:
        start, stop: the outputs.
        scale: multiplies the products, not the bias.
        up: B, [stop − start, r], or ``None``.
        low_offset: the first of its r columns of ``low``.
    """

    start: int
    stop: int
    scale: float = 1.0
    up: torch.Tensor | None = None
    low_offset: int = 0


def tape_for(x: torch.Tensor) -> Tape | None:
    """An empty tape; none for fake tensors, which a plan is made of: they have memory that counts and no address."""
    return None if isinstance(x, FakeTensor) else Tape()


class Tape:
    """Ops in the order in which they run.

    Raises:
        BuildError: there is no library on this machine.
    """

    def __init__(self) -> None:
        self._library = library()
        self._ops: list[ctypes.Structure] = []
        self._kept: list[object] = []
        self._table: ctypes.Array[ctypes.c_void_p] | None = None
        self._call = _Call()
        self._num_weight_bytes = 0

    def skinny_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        out: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        low: torch.Tensor | None = None,
        segments: Sequence[Segment] = (),
        transposed: bool = False,
        adds: bool = False,
    ) -> None:
        """``out = scale · (x Wᵀ + low Bᵀ) + bias``.

        Args:
            x: [b, i].
            weight: [o, i]; [i, o] where ``transposed``; ``None`` leaves x Wᵀ out.
            out: [b, o].
            bias: [o].
            low: [b, Σ r].
            segments: cover the outputs; none is one over all of them, and all there is where ``transposed``.
            transposed: ``weight`` is stored as inputs by outputs.
            adds: to what ``out`` holds.
        """
        assert not (transposed and segments), "a transposed weight has no segments"
        b, o = out.shape
        table = segments or (Segment(start=0, stop=o),)
        array = (_Segment * len(table))(
            *(
                _Segment(s.start, s.stop, self._of(s.up), s.low_offset, 0 if s.up is None else s.up.shape[1], s.scale)
                for s in table
            )
        )
        self._kept.append(array)
        self._num_weight_bytes += 0 if weight is None else weight.nbytes
        self._add(
            "skinny_linear_transposed" if transposed else "skinny_linear",
            _SkinnyLinear(
                x=self._of(x),
                weight=self._of(weight),
                bias=self._of(bias),
                out=self._of(out),
                low=self._of(low),
                segments=ctypes.addressof(array),
                num_segments=len(table),
                rows=b,
                inputs=x.shape[1],
                outputs=o,
                low_stride=0 if low is None else low.shape[1],
                adds=adds,
            ),
        )

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        eps: float,
        centred: bool,
    ) -> None:
        """Layer normalisation of [b, d] where ``centred``, else root-mean-square normalisation."""
        b, d = x.shape
        fields = {"x": x, "weight": weight, "bias": bias, "out": out}
        pointers = {name: self._of(tensor) for name, tensor in fields.items()}
        self._add("norm", _Norm(**pointers, rows=b, size=d, centred=centred, eps=eps))

    def activation(self, x: torch.Tensor, out: torch.Tensor, *, kind: str, gated: bool) -> None:
        """``out = act(x)`` over [b, d]; or, where ``gated``, of [b, 2 d] the first half activated times the second."""
        b, d = out.shape
        number = ACTIVATIONS.index(kind)
        self._add("activation", _Activation(x=self._of(x), out=self._of(out), rows=b, size=d, gated=gated, kind=number))

    def decode_attention(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor,
        *,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        interleaved: bool,
        window: int | None,
        scale: float,
    ) -> None:
        """Turns queries and keys, writes keys and values into the cache at the position of the call, and attends.

        Args:
            qkv: [b, (h + 2 k) e]; queries, then keys, then values, or head by head (``interleaved``, h = k). Its
                queries and keys are turned in place.
            out: [b, h e].
            keys: [b, k, n, e].
            values: [b, k, n, e].
            scores: [b, h, n], overwritten.
            turns: rotary cosines and signed sines, [n, s] each.
            interleaved: see ``qkv``.
            window: positions that are seen, this one included; ``None`` is all.
            scale: multiplies the scores.
        """
        b, k, n, e = keys.shape
        h = scores.shape[1]
        cos, sin = turns or (None, None)
        self._add(
            "decode_attention",
            _DecodeAttention(
                qkv=self._of(qkv),
                out=self._of(out),
                keys=self._of(keys),
                values=self._of(values),
                cos=self._of(cos),
                sin=self._of(sin),
                scores=self._of(scores),
                rows=b,
                heads=h,
                kv_heads=k,
                size=e,
                capacity=n,
                rotated=0 if cos is None else cos.shape[1],
                stride=qkv.shape[1],
                head_stride=3 * e if interleaved else e,
                key_start=e if interleaved else h * e,
                value_start=2 * e if interleaved else (h + k) * e,
                window=window or 0,
                scale=scale,
            ),
        )

    def run(
        self,
        *,
        written: int = 0,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Runs every op.

        Args:
            written: positions that the caches hold; this call writes one more.
            positions: [b] int64, of the tokens of this call.
            mask: [b, written + 1] int64, 0 on padding, adjacent within a row; ``None`` where nothing is padded.
        """
        if self._table is None:
            self._table = (_Pointer * len(self._ops))(*map(ctypes.addressof, self._ops))
        call = self._call
        call.written = written
        call.positions = None if positions is None else positions.data_ptr()
        call.mask, call.mask_stride = (None, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
        count = len(self._ops)
        # A thread that has less than this to read, from op to op, is waited for as long.
        useful = max(1, self._num_weight_bytes // count // _LEAST_BYTES)
        threads = min(torch.get_num_threads(), useful)
        self._library.run_tape(self._table, _Integer(count), ctypes.byref(call), _Integer(threads))

    def _of(self, tensor: torch.Tensor | None) -> int | None:
        """The tensor's address."""
        if tensor is None:
            return None
        assert tensor.is_cpu, tensor.device
        assert tensor.dtype == torch.float32, tensor.dtype
        assert tensor.is_contiguous(), tensor.stride()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _add(self, name: str, op: Any) -> None:
        op.run = ctypes.cast(getattr(self._library, f"run_{name}"), _Pointer).value
        self._ops.append(op)
