"""Positions of queries, keys and values in the output of the projection that computes them.

Shapes: m = positions, b = rows, n = outputs, h = query heads, k = key-value heads, e = head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch


class RotaryPart(NamedTuple):
    """Part of the n outputs that is rotated: n = blocks · groups · e.

    Attributes:
        blocks: 1 if queries, keys and values are consecutive; the number of heads if each head holds all three.
        groups: of e elements in a block.
        rotated: number of leading groups of a block that are rotated, in their first s elements.
    """

    blocks: int
    groups: int
    rotated: int


@dataclasses.dataclass(frozen=True)
class QkvLayout:
    """Layout of the heads in the output of the QKV projection.

    Attributes:
        num_heads: h, query heads.
        num_kv_heads: k, key heads, and as many value heads.
        head_size: e.
        interleaved: query, key and value head by head (GPT-NeoX); else all queries, all keys, all values.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    interleaved: bool = False

    @property
    def width(self) -> int:
        """n, all outputs."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    @property
    def head_stride(self) -> int:
        """Elements from a query head to the next, and from a key head to the next."""
        return 3 * self.head_size if self.interleaved else self.head_size

    @property
    def key_start(self) -> int:
        """Start of the first key head."""
        return self.head_size if self.interleaved else self.num_heads * self.head_size

    @property
    def value_start(self) -> int:
        """Start of the first value head."""
        return 2 * self.head_size if self.interleaved else (self.num_heads + self.num_kv_heads) * self.head_size

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits [m, n] into views: queries [m, h, e], keys and values [m, k, e]."""
        if self.interleaved:
            q, k, v = y.view(y.shape[0], self.num_heads, 3, self.head_size).unbind(2)
        else:
            sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            q, k, v = torch.split(y.view(y.shape[0], -1, self.head_size), sizes, dim=1)
        return q, k, v

    def keys_values(self, y: torch.Tensor) -> torch.Tensor:
        """Views the keys and values of [b, n] as [2, b, k, e]."""
        if self.interleaved:
            return y.view(y.shape[0], self.num_heads, 3, self.head_size)[:, :, 1:].permute(2, 0, 1, 3)
        heads = y.view(y.shape[0], -1, self.head_size)[:, self.num_heads :]
        return heads.view(y.shape[0], 2, self.num_kv_heads, self.head_size).transpose(0, 1)

    def grouped(self, y: torch.Tensor) -> torch.Tensor:
        """Views [n, b] as [blocks, groups, e, b] of ``rotary_part``."""
        part = self.rotary_part
        return y.view(part.blocks, part.groups, self.head_size, -1)

    def split_grouped(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits ``grouped`` into views: queries [h, e, b], and keys and values [2, k, e, b]."""
        if self.interleaved:
            return grouped[:, 0], grouped[:, 1:].transpose(0, 1)
        queries, keys_values = torch.split(grouped[0], [self.num_heads, 2 * self.num_kv_heads])
        return queries, keys_values.view(2, self.num_kv_heads, *keys_values.shape[1:])

    @functools.cached_property
    def rotary_part(self) -> RotaryPart:
        """The queries and the keys."""
        if self.interleaved:
            return RotaryPart(self.num_heads, 3, 2)
        rotated = self.num_heads + self.num_kv_heads
        return RotaryPart(1, rotated + self.num_kv_heads, rotated)
