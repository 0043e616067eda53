"""Where queries, keys and values lie in the outputs of the product that makes them.

Shapes: m = positions, b = rows, n = outputs, h = query heads, k = key-value heads, e = head size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch


class RotaryPart(NamedTuple):
    """Which part of a product's n outputs is rotated: they are blocks of groups of e numbers, n = blocks · groups · e.

    Attributes:
        blocks: 1 where queries, keys and values lie one after the other; the heads where each head has all three.
        groups: of one block.
        rotated: so many first groups of a block are rotated, of each the first s numbers.
    """

    blocks: int
    groups: int
    rotated: int


@dataclasses.dataclass(frozen=True)
class Heads:
    """How the outputs of the query, key and value projection are heads.

    Attributes:
        num_queries: h, query heads.
        num_keys: k, key heads, and as many value heads.
        size: e, numbers of a head.
        interleaved: head by head its query, key and value (GPT-NeoX); else queries, then keys, then values.
    """

    num_queries: int
    num_keys: int
    size: int
    interleaved: bool = False

    @property
    def head_stride(self) -> int:
        """Numbers from a query head to the next, and from a key head to the next."""
        return 3 * self.size if self.interleaved else self.size

    @property
    def key_start(self) -> int:
        """Where the first key head begins."""
        return self.size if self.interleaved else self.num_queries * self.size

    @property
    def value_start(self) -> int:
        """Where the first value head begins."""
        return 2 * self.size if self.interleaved else (self.num_queries + self.num_keys) * self.size

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[m, n] to queries [m, h, e], keys and values [m, k, e]; views."""
        if self.interleaved:
            q, k, v = y.view(y.shape[0], self.num_queries, 3, self.size).unbind(2)
        else:
            sizes = [self.num_queries, self.num_keys, self.num_keys]
            q, k, v = torch.split(y.view(y.shape[0], -1, self.size), sizes, dim=1)
        return q, k, v

    def grouped(self, y: torch.Tensor) -> torch.Tensor:
        """[n, b] to [blocks, groups, e, b] as ``rotary_part`` counts them; a view."""
        part = self.rotary_part
        return y.view(part.blocks, part.groups, self.size, -1)

    def queries_and_kept(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of ``grouped`` the queries [h, e, b], and keys and values [2, k, e, b]; views."""
        if self.interleaved:
            return grouped[:, 0], grouped[:, 1:].transpose(0, 1)
        queries, kept = torch.split(grouped[0], [self.num_queries, 2 * self.num_keys])
        return queries, kept.view(2, self.num_keys, *kept.shape[1:])

    @functools.cached_property
    def rotary_part(self) -> RotaryPart:
        """The queries and the keys."""
        if self.interleaved:
            return RotaryPart(self.num_queries, 3, 2)
        rotated = self.num_queries + self.num_keys
        return RotaryPart(1, rotated + self.num_keys, rotated)
