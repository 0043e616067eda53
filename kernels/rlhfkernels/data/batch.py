"""The batch of a step: tokens, masks, and the columns that its stages fill.

Shapes: n = sequences, b = data rows, p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from rlhfkernels.errors import DataError
from rlhfkernels.ops.attention_mask import Segment

Rows = slice | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """Sequences without their padding, one after the other in one row.

    Attributes:
        tokens: [m] int64.
        positions: [m] int64, from 0 in every sequence.
        segments: the sequences; a segment's ``start`` is the first position that predicts a token of the loss.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: tuple[Segment, ...]

    @property
    def targets(self) -> torch.Tensor:
        """[k], the predicted tokens: those after each segment's ``start``."""
        parts = self.tokens.split_with_sizes([segment.length for segment in self.segments])
        return torch.cat([part[segment.start + 1 :] for part, segment in zip(parts, self.segments, strict=True)])

    def predicting(self, hidden: torch.Tensor) -> torch.Tensor:
        """The states [k, d] that predict ``targets``: all of ``hidden``, [k + n, d], but each sequence's last."""
        parts = hidden.split_with_sizes([segment.length - segment.start for segment in self.segments])
        return torch.cat([part[:-1] for part in parts])


@dataclasses.dataclass(kw_only=True, slots=True)
class Batch:
    """Sequences of a prompt and a completion each.

    The sequences of one data row lie side by side: chosen before rejected for a preference pair, the samples of one
    prompt in a row. A column has one entry per sequence, or one per data row.

    Attributes:
        tokens: [n, p + c] int64, prompts padded on the left, completions padded on the right.
        attention_mask: [n, p + c] int64, 0 on left padding; ``None`` where nothing is padded on the left.
        mask: [n, c] float32, 1 on real completion tokens, the stop token included.
        prompt_len: p.
        num_rows: b.
        extents: of each sequence the positions of its first real token and after its last; ``None`` where only the
            masks know them.
        rows: of each data row its place in the data set; ``None`` where rows are made anew for every batch.
        columns: named tensors: ``old_logprobs`` [n, c], ``scores`` [n] and so on, as the method's program names them.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    mask: torch.Tensor
    prompt_len: int
    num_rows: int
    extents: tuple[tuple[int, int], ...] | None = None
    rows: tuple[int, ...] | None = None
    columns: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.columns[name]

    def __setitem__(self, name: str, column: torch.Tensor) -> None:
        self.columns[name] = column

    @property
    def completions(self) -> torch.Tensor:
        """Completion tokens [n, c]."""
        return self.tokens[:, self.prompt_len :]

    @property
    def num_sequences(self) -> int:
        """n."""
        return self.tokens.shape[0]

    @property
    def predicted_mask(self) -> torch.Tensor:
        """[n, p + c − 1] float32, 1 on real tokens that a real token precedes: all that a loss may cover."""
        prompt = self.mask.new_ones(self.num_sequences, self.prompt_len)
        if self.attention_mask is not None:
            prompt = self.attention_mask[:, : self.prompt_len].to(prompt.dtype)
        return torch.cat((prompt[:, :-1] * prompt[:, 1:], self.mask), 1)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that it holds now."""
        yield self.tokens
        if self.attention_mask is not None:
            yield self.attention_mask
        yield self.mask
        yield from self.columns.values()

    def select(self, rows: Rows) -> Batch:
        """The given data rows of every tensor: views for a slice or a range, copies for a list."""
        if isinstance(rows, range):
            rows = slice(rows.start, rows.stop)
        if isinstance(rows, slice) and rows == slice(0, self.num_rows):
            return self
        num_rows = len(range(*rows.indices(self.num_rows))) if isinstance(rows, slice) else len(rows)
        indices: dict[int, torch.Tensor] = {}
        return Batch(
            tokens=self._rows_of(self.tokens, rows, indices),
            attention_mask=None if self.attention_mask is None else self._rows_of(self.attention_mask, rows, indices),
            mask=self._rows_of(self.mask, rows, indices),
            prompt_len=self.prompt_len,
            num_rows=num_rows,
            extents=self._extents_of(rows),
            columns={name: self._rows_of(column, rows, indices) for name, column in self.columns.items()},
        )

    def packed(self, *, reads_prompt: bool) -> PackedRow:
        """The real tokens of all sequences in one row.

        Args:
            reads_prompt: read the positions that predict the prompt too; else those that predict the completion.

        Raises:
            DataError: a prompt has no token, so nothing predicts the first of its completion.
        """
        assert self.extents is not None, "only a source of given completions knows where they end"
        if any(first >= self.prompt_len for first, _ in self.extents):
            raise DataError("a prompt has no tokens: nothing in a packed row predicts the first of its completion.")
        tokens = torch.cat([row[first:end] for row, (first, end) in zip(self.tokens, self.extents, strict=True)])
        segments = tuple(
            Segment(end - first, 0 if reads_prompt else self.prompt_len - first - 1) for first, end in self.extents
        )
        counted = torch.arange(max(segment.length for segment in segments), device=tokens.device)
        positions = torch.cat([counted[: segment.length] for segment in segments])
        return PackedRow(tokens=tokens, positions=positions, segments=segments)

    def sequence_of_rows(self, i: int) -> Batch:
        """Sequence ``i`` of every data row, without the columns: views."""
        count = self.num_sequences // self.num_rows
        return Batch(
            tokens=self.tokens[i::count],
            attention_mask=None if self.attention_mask is None else self.attention_mask[i::count],
            mask=self.mask[i::count],
            prompt_len=self.prompt_len,
            num_rows=self.num_rows,
            extents=None if self.extents is None else self.extents[i::count],
        )

    def _extents_of(self, rows: Rows) -> tuple[tuple[int, int], ...] | None:
        if self.extents is None:
            return None
        count = len(self.extents) // self.num_rows
        chosen = range(self.num_rows)[rows] if isinstance(rows, slice) else rows
        return tuple(extent for row in chosen for extent in self.extents[row * count : (row + 1) * count])

    def _rows_of(self, tensor: torch.Tensor, rows: Rows, indices: dict[int, torch.Tensor]) -> torch.Tensor:
        """The entries of the data rows; a row has as many as the tensor's length has times the number of rows.

        ``indices`` keeps the entries of a list, by entries of a row: a list as index would be copied to the device for
        every tensor, and each copy waits for it.
        """
        count = len(tensor) // self.num_rows
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.num_rows)
            return tensor[start * count : stop * count]
        if count not in indices:
            index = torch.tensor([row * count + i for row in rows for i in range(count)])
            indices[count] = index.to(tensor.device, non_blocking=True)
        return tensor[indices[count]]


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """``rows`` in their order, ``size`` at a time; of a range, ranges."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def empty_completions(prompts: torch.Tensor, prompt_mask: torch.Tensor | None, c: int, num_rows: int) -> Batch:
    """The batch that a generation fills: prompts [n, p] with their mask, and room for ``c`` tokens each."""
    n, p = prompts.shape
    tokens = prompts.new_zeros(n, p + c)
    tokens[:, :p] = prompts
    attention_mask = None
    if prompt_mask is not None:
        attention_mask = prompt_mask.new_ones(n, p + c)
        attention_mask[:, :p] = prompt_mask
    mask = torch.ones(n, c, dtype=torch.float32, device=prompts.device)
    batch = Batch(tokens=tokens, attention_mask=attention_mask, mask=mask, prompt_len=p, num_rows=num_rows)
    batch["old_logprobs"] = torch.zeros(n, c, dtype=torch.float32, device=prompts.device)
    return batch
