"""Programs: ops in C with the addresses of their operands, recorded once and run in one call.

Every operand is a contiguous float32 CPU tensor, which the program keeps alive. Shapes, dtypes and strides are checked
while the program is recorded.

Shapes: b = rows, i = inputs, o = outputs, d = row size, h = query heads, k = key-value heads, e = head size,
n = capacity of the KV cache in positions, s = rotated elements of a head, r = rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rlhfkernels.ops.native import structures
from rlhfkernels.ops.native.build import library
from rlhfkernels.ops.native.launch import check_operand, check_shape, op_address
from rlhfkernels.ops.native.structures import Command, Integer, Operands
from rlhfkernels.ops.qkv_layout import QkvLayout

# With fewer bytes of weights an op, a thread waits for the others as long as it works.
_MIN_BYTES_PER_THREAD = 2**15
# In the order of the enum in activation.c.
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Outputs of a ``skinny_linear`` that share a scale and an adapter.

    Attributes:
        start, stop: range of the outputs.
        scale: multiplies the sums, not the bias.
        up: B of the adapter, [stop − start, r], or ``None``.
        low_offset: first of its r columns of ``low``.
    """

    start: int
    stop: int
    scale: float = 1.0
    up: torch.Tensor | None = None
    low_offset: int = 0


def make_program(x: torch.Tensor) -> Program | None:
    """Returns an empty program, or ``None`` for fake tensors, as in a memory plan: they have no address."""
    return None if isinstance(x, FakeTensor) else Program()


class Program:
    """Ops in the order in which they run.

    Raises:
        BuildError: the library cannot be built on this machine.
    """

    def __init__(self) -> None:
        self._library = library()
        self._commands: list[Operands] = []
        self._keepalive: list[object] = []
        self._table: ctypes.Array[Operands] | None = None
        self._step = structures.Step()
        self._num_weight_bytes = 0
        # Rows and capacity of the KV caches: bounds of what a step may write.
        self._num_rows: int | None = None
        self._capacity = sys.maxsize
        self._needs_positions = False

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
        accumulate: bool = False,
    ) -> None:
        """Records ``out = scale · (x Wᵀ + low Bᵀ) + bias``.

        Args:
            x: [b, i].
            weight: [o, i], or [i, o] if ``transposed``; ``None`` leaves out x Wᵀ.
            out: [b, o].
            bias: [o].
            low: [b, Σ r].
            segments: ranges of outputs; default is one range of all outputs, which ``transposed`` requires.
            transposed: ``weight`` is stored as inputs by outputs.
            accumulate: add to ``out``.

        Raises:
            ValueError: a shape, dtype, device or stride does not fit.
        """
        (b, o), i = out.shape, x.shape[1]
        if transposed and (segments or weight is None):
            raise ValueError("transposed requires a weight and excludes segments.")
        check_shape("x", x, b, i)
        check_shape("weight", weight, *((i, o) if transposed else (o, i)))
        check_shape("bias", bias, o)
        rank = 0 if low is None else low.shape[1]
        check_shape("low", low, b, rank)
        table = segments or (Segment(start=0, stop=o),)
        array = (structures.Segment * len(table))(*(self._segment(segment, o, rank) for segment in table))
        self._keepalive.append(array)
        self._num_weight_bytes += 0 if weight is None else weight.nbytes
        self._add(
            "skinny_linear_transposed" if transposed else "skinny_linear",
            structures.SkinnyLinear(segments=ctypes.addressof(array)),
            {"x": x, "weight": weight, "bias": bias, "out": out, "low": low},
            num_segments=len(table),
            rows=b,
            inputs=i,
            outputs=o,
            low_stride=rank,
            accumulate=accumulate,
        )

    def norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        eps: float,
        centered: bool,
    ) -> None:
        """Records the RMS norm of [b, d], or its layer norm if ``centered``.

        Raises:
            ValueError: a shape, dtype, device or stride does not fit.
        """
        b, d = x.shape
        check_shape("weight", weight, d)
        check_shape("bias", bias, d)
        check_shape("out", out, b, d)
        tensors = {"x": x, "weight": weight, "bias": bias, "out": out}
        self._add("norm", structures.Norm(), tensors, rows=b, size=d, centered=centered, eps=eps)

    def activation(self, x: torch.Tensor, out: torch.Tensor, *, kind: str, gated: bool) -> None:
        """Records ``out = act(x)`` of [b, d], or act(gate) · up of [b, 2 d] if ``gated``.

        Args:
            x: [b, d], or [b, 2 d], gates first, if ``gated``.
            out: [b, d].
            kind: one of ``ACTIVATIONS``.
            gated: the first half of a row is the gate of the second.

        Raises:
            ValueError: a shape, dtype, device or stride does not fit.
        """
        b, d = out.shape
        check_shape("x", x, b, 2 * d if gated else d)
        number = ACTIVATIONS.index(kind)
        self._add("activation", structures.Activation(), {"x": x, "out": out}, rows=b, size=d, gated=gated, kind=number)

    def decode_attention(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: torch.Tensor,
        *,
        layout: QkvLayout,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        window: int | None,
        scale: float,
    ) -> None:
        """Records: rotate queries and keys, write the step's keys and values into the KV cache, attend over the cache.

        Args:
            qkv: [b, (h + 2 k) e]; its queries and keys are rotated in place.
            out: [b, h e].
            keys: [b, k, n, e].
            values: [b, k, n, e].
            scores: [b, h, n], scratch.
            layout: positions of queries, keys and values in ``qkv``.
            rotary: cosines and signed sines, [n, s] each.
            window: positions that a query sees, itself included; ``None`` is all.
            scale: multiplies the scores.

        Raises:
            ValueError: a shape, dtype, device or stride does not fit.
        """
        b, k, n, e = keys.shape
        cos, signed_sin = rotary or (None, None)
        rotary_size = 0 if cos is None else cos.shape[1]
        if rotary_size % 2 or rotary_size > e:
            raise ValueError(f"cos has {rotary_size} columns: it must be an even number of at most {e}.")
        check_shape("keys", keys, b, layout.num_kv_heads, n, layout.head_size)
        check_shape("values", values, *keys.shape)
        check_shape("qkv", qkv, b, layout.width)
        check_shape("out", out, b, layout.num_heads * e)
        check_shape("scores", scores, b, layout.num_heads, n)
        check_shape("cos", cos, n, rotary_size)
        check_shape("signed_sin", signed_sin, n, rotary_size)
        if self._num_rows not in (None, b):
            raise ValueError(f"keys have {b} rows: other ops of the program attend over {self._num_rows}.")
        self._num_rows, self._capacity = b, min(self._capacity, n)
        self._needs_positions |= cos is not None
        tensors = {"qkv": qkv, "out": out, "keys": keys, "values": values, "scores": scores}
        self._add(
            "decode_attention",
            structures.DecodeAttention(),
            {**tensors, "cos": cos, "signed_sin": signed_sin},
            rows=b,
            heads=layout.num_heads,
            kv_heads=k,
            size=e,
            capacity=n,
            rotary_size=rotary_size,
            stride=layout.width,
            head_stride=layout.head_stride,
            key_start=layout.key_start,
            value_start=layout.value_start,
            window=window or 0,
            scale=scale,
        )

    def run(
        self,
        *,
        cache_len: int = 0,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Runs every op.

        Args:
            cache_len: positions in the KV caches; this step writes one more.
            positions: [b] int64, of this step's tokens; required by rotary embeddings.
            mask: [b, cache_len + 1] int64, 0 on padding, column stride 1; ``None`` without padding.

        Raises:
            ValueError: the KV cache is full, or a tensor does not fit.
        """
        if cache_len >= self._capacity:
            raise ValueError(f"cache_len is {cache_len}: the KV cache holds {self._capacity} positions.")
        if self._needs_positions and positions is None:
            raise ValueError("positions is None: rotary embeddings need them.")
        if self._table is None:
            self._table = (Command * len(self._commands))(*self._commands)
        step = self._step
        step.cache_len = cache_len
        step.positions = step.mask = None
        if self._num_rows is not None:
            if positions is not None:
                check_shape("positions", positions, self._num_rows)
                check_operand("positions", positions)
                step.positions = positions.data_ptr()
            if mask is not None:
                check_shape("mask", mask, self._num_rows, cache_len + 1)
                check_operand("mask", mask, strided=True)
                if cache_len and mask.stride(1) != 1:
                    raise ValueError(f"mask has strides {mask.stride()}: its column stride must be 1.")
                step.mask, step.mask_stride = mask.data_ptr(), mask.stride(0)
        self._library.run_program(
            self._table, Integer(len(self._commands)), ctypes.byref(step), Integer(self._num_threads())
        )

    def _num_threads(self) -> int:
        """Returns the number of threads that the weights keep busy between two barriers."""
        useful = self._num_weight_bytes // max(1, len(self._commands)) // _MIN_BYTES_PER_THREAD
        return max(1, min(torch.get_num_threads(), useful))

    def _segment(self, segment: Segment, outputs: int, low_columns: int) -> Operands:
        up = segment.up
        if not 0 <= segment.start <= segment.stop <= outputs:
            raise ValueError(f"a segment is [{segment.start}, {segment.stop}): there are {outputs} outputs.")
        rank = 0 if up is None else up.shape[1]
        check_shape("up", up, segment.stop - segment.start, rank)
        if not 0 <= segment.low_offset <= low_columns - rank:
            raise ValueError(f"low_offset is {segment.low_offset}, rank {rank}: low has {low_columns} columns.")
        return structures.Segment(
            start=segment.start,
            stop=segment.stop,
            up=self._address("up", up),
            low_offset=segment.low_offset,
            rank=rank,
            scale=segment.scale,
        )

    def _address(self, name: str, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        check_operand(name, tensor)
        self._keepalive.append(tensor)
        return tensor.data_ptr()

    def _add(self, name: str, operands: Operands, tensors: dict[str, torch.Tensor | None], **numbers: float) -> None:
        for field, tensor in tensors.items():
            setattr(operands, field, self._address(field, tensor))
        for field, number in numbers.items():
            setattr(operands, field, number)
        self._keepalive.append(operands)
        self._commands.append(Command(run=op_address(name), operands=ctypes.addressof(operands)))
        self._table = None
