"""The batch of a step: tokens, masks, and the columns that its stages fill.

Shapes: n = sequences, b = data rows, p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

Rows = slice | Sequence[int]


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
        columns: named tensors: ``old_logprobs`` [n, c], ``scores`` [n] and so on, as the method's program names them.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    mask: torch.Tensor
    prompt_len: int
    num_rows: int
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
        """The given data rows of every tensor: views for a slice, copies for a list."""
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
            columns={name: self._rows_of(column, rows, indices) for name, column in self.columns.items()},
        )

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
