"""Ops in C on memory that stays where it is, written down once and replayed in one call.

Every operand is a contiguous float32 tensor of a processor, and is kept alive by the tape.

Shapes: b = rows, i = inputs, o = outputs, d = size of a row, h = query heads, k = key-value heads, e = head size,
n = positions that a cache can hold, s = rotated part of a head, r = rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhfkernels.ops.heads import Heads
from rlhfkernels.ops.native import structures
from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.structures import Integer, Operands, Pointer

_LEAST_BYTES = 2**15
# Activations by their number in activation.c.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


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
        self._call = structures.Call()
        self._num_weight_bytes = 0
        self._capacity = sys.maxsize

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
        (b, o), i = out.shape, x.shape[1]
        assert x.shape[0] == b, x.shape
        assert weight is None or weight.shape == ((i, o) if transposed else (o, i)), weight.shape
        table = segments or (Segment(start=0, stop=o),)
        array = (structures.Segment * len(table))(*map(self._segment, table))
        self._kept.append(array)
        self._num_weight_bytes += 0 if weight is None else weight.nbytes
        self._add(
            "skinny_linear_transposed" if transposed else "skinny_linear",
            structures.SkinnyLinear(
                x=self._of(x),
                weight=self._of(weight),
                bias=self._of(bias),
                out=self._of(out),
                low=self._of(low),
                segments=ctypes.addressof(array),
                num_segments=len(table),
                rows=b,
                inputs=i,
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
        self._add("norm", structures.Norm(**pointers, rows=b, size=d, centred=centred, eps=eps))

    def activation(self, x: torch.Tensor, out: torch.Tensor, *, kind: str, gated: bool) -> None:
        """``out = act(x)`` over [b, d]; or, where ``gated``, of [b, 2 d] the first half activated times the second."""
        b, d = out.shape
        number = ACTIVATIONS.index(kind)
        self._add(
            "activation",
            structures.Activation(x=self._of(x), out=self._of(out), rows=b, size=d, gated=gated, kind=number),
        )

    def decode_attention(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor,
        *,
        heads: Heads,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        scale: float,
    ) -> None:
        """Turns queries and keys, writes keys and values into the cache at the position of the call, and attends.

        Args:
            qkv: [b, (h + 2 k) e]; its queries and keys are turned in place.
            out: [b, h e].
            keys: [b, k, n, e].
            values: [b, k, n, e].
            scores: [b, h, n], overwritten.
            heads: where queries, keys and values lie in ``qkv``.
            turns: rotary cosines and signed sines, [n, s] each.
            window: positions that are seen, this one included; ``None`` is all.
            scale: multiplies the scores.
        """
        b, k, n, e = keys.shape
        h = heads.num_queries
        cos, sin = turns or (None, None)
        assert (heads.num_keys, heads.size) == (k, e), keys.shape
        assert qkv.shape == (b, (h + 2 * k) * e), qkv.shape
        assert scores.shape == (b, h, n), scores.shape
        assert values.shape == keys.shape, values.shape
        assert cos is None or cos.shape[0] >= n, cos.shape
        self._capacity = min(self._capacity, n)
        self._add(
            "decode_attention",
            structures.DecodeAttention(
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
                head_stride=heads.head_stride,
                key_start=heads.key_start,
                value_start=heads.value_start,
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
        assert written < self._capacity, f"{written} positions fill the cache"
        if self._table is None:
            self._table = (Pointer * len(self._ops))(*map(ctypes.addressof, self._ops))
        call = self._call
        call.written = written
        call.positions = _integers(positions)
        call.mask, call.mask_stride = _integers(mask), 0 if mask is None else mask.stride(0)
        count, threads = Integer(len(self._ops)), Integer(self._num_threads())
        self._library.run_tape(self._table, count, ctypes.byref(call), threads)

    def _num_threads(self) -> int:
        """A thread that has less than ``_LEAST_BYTES`` to read from op to op is waited for as long."""
        useful = self._num_weight_bytes // max(1, len(self._ops)) // _LEAST_BYTES
        return max(1, min(torch.get_num_threads(), useful))

    def _segment(self, segment: Segment) -> Operands:
        up = segment.up
        assert up is None or up.shape[0] == segment.stop - segment.start, up.shape
        return structures.Segment(
            start=segment.start,
            stop=segment.stop,
            up=self._of(up),
            low_offset=segment.low_offset,
            rank=0 if up is None else up.shape[1],
            scale=segment.scale,
        )

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
        op.run = ctypes.cast(getattr(self._library, f"run_{name}"), Pointer).value
        self._ops.append(op)
        self._table = None


def _integers(tensor: torch.Tensor | None) -> int | None:
    """The address of int64 numbers that lie side by side, row by row."""
    if tensor is None:
        return None
    assert tensor.is_cpu, tensor.device
    assert tensor.dtype == torch.int64, tensor.dtype
    assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1, tensor.stride()
    return tensor.data_ptr()
