"""Data sources: batches of prompts, demonstrations or preference pairs, from a file or of random tokens.

Shapes: b = data rows, n = sequences (b, or 2 b for pairs), p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.data.batch import Batch
from rlhfkernels.data.encoding import encode_prompt, encode_row
from rlhfkernels.data.files import Demonstration, Pair, read_demonstrations, read_pairs, read_prompts
from rlhfkernels.errors import DataError
from rlhfkernels.methods.program import SEQUENCES_PER_ROW, SourceName
from rlhfkernels.parallel.world import ALONE, World


class Prompts(NamedTuple):
    """Prompts [b, p], padded on the left, and their mask [b, p]; ``None`` where no prompt is short."""

    tokens: torch.Tensor
    mask: torch.Tensor | None


class Source(Protocol):
    """Batches in turn and over again."""

    def summary(self) -> dict[str, Any]:
        """The ``prompts`` object of a record: source, rows, rows cut to length, rows dropped."""
        ...

    def next_batch(self, generator: torch.Generator | None) -> Prompts | Batch:
        """The next ``batch_size`` data rows on the case's device."""
        ...

    def rewind(self) -> None:
        """Has the next batch of a file begin with its first row again."""
        ...

    @property
    def num_rows(self) -> int:
        """Data rows of the data set: of the file, or of one batch of random rows."""
        ...

    def data_set(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """Every data row once, in batches. Random rows are made once, and are every later ``next_batch`` too."""
        ...

    def lengths(self) -> Counter[tuple[int, int]]:
        """Real tokens of prompt and completion of every sequence in the file, counted; empty without a file."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """Tensors that it keeps between batches."""
        ...


class _Rows:
    """Tokenised rows, handed out in turn and over again.

    Args:
        case: names the file and the lengths. Without a file, tokens are random.
        vocab_size: token ids are below it.
        tokenizer: of the model; ``None`` (a preset) encodes text as its UTF-8 bytes.
        with_rows: read the file. Without, a file stands for random tokens with a mask: the shapes that short prompts
            give, for a plan.
        world: the ranks, which take the rows of a file in turns of ``batch_size``.

    Raises:
        DataError: the file cannot be used.
        ModelError: the vocabulary is too small for bytes.
    """

    def __init__(
        self,
        case: Case,
        vocab_size: int,
        tokenizer: Any | None,
        *,
        with_rows: bool = True,
        world: World = ALONE,
    ) -> None:
        self._case, self._vocab_size, self._tokenizer = case, vocab_size, tokenizer
        self._path = case.data_file
        self._first, self._stride = world.rank * case.batch_size, world.size * case.batch_size
        self._next = self._first
        self._fixed: Batch | None = None
        self._prompts: list[list[int]] = []
        self._num_truncated = self._num_dropped = 0
        self._has_mask = self._path is not None
        if self._path is not None and with_rows:
            self._read(self._path)
            # Known once for the whole source, so that every step of a case does the same work.
            self._has_mask = any(len(row) < case.prompt_len for row in self._prompts)

    def _read(self, path: str) -> None:
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """See ``Source.summary``."""
        return {
            "source": self._path or "random",
            "num_prompts": len(self._prompts) or None,
            "num_truncated": self._num_truncated,
            "num_dropped": self._num_dropped,
        }

    @property
    def num_rows(self) -> int:
        """See ``Source.num_rows``."""
        return len(self._prompts) or self._case.batch_size

    def data_set(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """See ``Source.data_set``."""
        raise NotImplementedError

    def lengths(self) -> Counter[tuple[int, int]]:
        """See ``Source.lengths``."""
        return Counter()

    def tensors(self) -> Iterator[torch.Tensor]:
        """See ``Source.tensors``."""
        yield from () if self._fixed is None else self._fixed.tensors()

    def rewind(self) -> None:
        """See ``Source.rewind``."""
        self._next = self._first

    def _take(self) -> list[int]:
        """Indices of the next rows."""
        case, num_rows = self._case, len(self._prompts)
        rows = [(self._next + i) % num_rows for i in range(case.batch_size)]
        self._next = (self._next + self._stride) % num_rows
        return rows

    def _prompts_of(self, rows: Sequence[int]) -> Prompts:
        p, device = self._case.prompt_len, self._case.device
        found = [self._prompts[row] for row in rows]
        tokens = _on_device([[0] * (p - len(row)) + row for row in found], device)
        if not self._has_mask:
            return Prompts(tokens, None)
        masks = [[0] * (p - len(row)) + [1] * len(row) for row in found]
        return Prompts(tokens, _on_device(masks, device))

    def _random(self, shape: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
        return torch.randint(self._vocab_size, shape, generator=generator, device=self._case.device)


def _on_device(values: Sequence[int] | list[list[int]], device: str) -> torch.Tensor:
    """Returns int64 ``values`` on ``device``, in a copy that a phase does not wait for."""
    return torch.tensor(values).to(device, non_blocking=True)


class PromptSource(_Rows):
    """Prompts of exactly p tokens: longer ones lose their beginning, shorter ones are padded on the left.

    Arguments and errors are those of ``_Rows``.
    """

    def _read(self, path: str) -> None:
        p = self._case.prompt_len
        texts = read_prompts(path, self._case.options.data.prompt_field)
        prompts = [
            encode_prompt(f"prompts '{path}', row {number}", text, self._tokenizer, self._vocab_size)
            for number, text in enumerate(texts, start=1)
        ]
        self._num_truncated = sum(len(row) > p for row in prompts)
        self._prompts = [row[-p:] for row in prompts]

    def next_batch(self, generator: torch.Generator | None) -> Prompts:
        """See ``Source.next_batch``."""
        if self._prompts:
            return self._prompts_of(self._take())
        tokens = self._random((self._case.batch_size, self._case.prompt_len), generator)
        return Prompts(tokens, torch.ones_like(tokens) if self._has_mask else None)


class _CompletionSource(_Rows):
    """Prompts with given completions: longer completions lose their end, shorter ones are padded on the right."""

    _num_completions = 1
    _completions: Sequence[list[list[int]]] = ()

    def _rows(self, path: str) -> tuple[Sequence[Demonstration] | Sequence[Pair], int]:
        """The rows of the file, and the number of rows that it dropped."""
        raise NotImplementedError

    def _read(self, path: str) -> None:
        p, c = self._case.prompt_len, self._case.completion_len
        rows, self._num_dropped = self._rows(path)
        kept: list[list[list[int]]] = []
        for row in rows:
            where = f"{self._case.role_table.source} '{path}', line {row.line}"
            prompt, *completions = encode_row(where, row.texts, self._tokenizer, self._vocab_size)
            cut = [tokens[:c] for tokens in completions]
            if any(cut[0] == other for other in cut[1:]):
                self._num_dropped += 1  # equal up to the completion length: nothing to prefer
                continue
            self._num_truncated += len(prompt) > p or any(len(tokens) > c for tokens in completions)
            self._prompts.append(prompt[-p:])
            kept.append(cut)
        self._completions = kept
        if not self._prompts:
            raise DataError(f"'{path}': the completions of every row are equal within completion_len {c}.")

    def next_batch(self, generator: torch.Generator | None) -> Batch:
        """See ``Source.next_batch``."""
        if self._prompts:
            return self._batch_of(self._take())
        return self._random_batch(generator) if self._fixed is None else dataclasses.replace(self._fixed, columns={})

    def data_set(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """See ``Source.data_set``."""
        if not self._prompts:
            if self._fixed is None:
                batch = self._random_batch(generator)
                self._fixed = dataclasses.replace(batch, rows=tuple(range(batch.num_rows)))
            yield dataclasses.replace(self._fixed, columns={})
        for start in range(0, len(self._prompts), self._case.batch_size):
            yield self._batch_of(range(start, min(start + self._case.batch_size, len(self._prompts))))

    def lengths(self) -> Counter[tuple[int, int]]:
        """See ``Source.lengths``."""
        return Counter(
            (len(prompt), len(tokens))
            for prompt, completions in zip(self._prompts, self._completions, strict=True)
            for tokens in completions
        )

    def _random_batch(self, generator: torch.Generator | None) -> Batch:
        case, m = self._case, self._num_completions
        p, c, n = case.prompt_len, case.completion_len, case.batch_size * m
        tokens = self._random((n, p + c), generator)
        if m > 1:  # the completions of one row share its prompt
            tokens[:, :p] = tokens[::m, :p].repeat_interleave(m, 0)
        return Batch(
            tokens=tokens,
            attention_mask=torch.ones_like(tokens) if self._has_mask else None,
            mask=torch.ones(n, c, dtype=torch.float32, device=case.device),
            prompt_len=p,
            num_rows=case.batch_size,
            extents=((0, p + c),) * n,
        )

    def _batch_of(self, rows: Sequence[int]) -> Batch:
        """The batch of the given rows of the file."""
        case, m = self._case, self._num_completions
        p, c = case.prompt_len, case.completion_len
        prompts = self._prompts_of([row for row in rows for _ in range(m)])
        found = [tokens for row in rows for tokens in self._completions[row]]
        completions = _on_device([tokens + [0] * (c - len(tokens)) for tokens in found], case.device)
        lengths = _on_device([len(tokens) for tokens in found], case.device)
        mask = (torch.arange(c, device=case.device) < lengths[:, None]).float()
        attention_mask = None
        if prompts.mask is not None:
            attention_mask = torch.cat((prompts.mask, torch.ones_like(completions)), 1)
        tokens = torch.cat((prompts.tokens, completions), 1)
        return Batch(
            tokens=tokens,
            attention_mask=attention_mask,
            mask=mask,
            prompt_len=p,
            num_rows=len(rows),
            rows=tuple(rows),
            extents=tuple(
                (p - len(self._prompts[row]), p + len(tokens)) for row in rows for tokens in self._completions[row]
            ),
        )


class DemonstrationSource(_CompletionSource):
    """One sequence a data row. Arguments and errors are those of ``_Rows``."""

    def _rows(self, path: str) -> tuple[Sequence[Demonstration], int]:
        return read_demonstrations(path), 0


class PairSource(_CompletionSource):
    """Two sequences a data row: chosen, then rejected. Arguments and errors are those of ``_Rows``."""

    _num_completions = SEQUENCES_PER_ROW["pairs"]

    def _rows(self, path: str) -> tuple[Sequence[Pair], int]:
        return read_pairs(path)


SOURCES: dict[SourceName, type[PromptSource] | type[DemonstrationSource] | type[PairSource]] = {
    "prompts": PromptSource,
    "demonstrations": DemonstrationSource,
    "pairs": PairSource,
}
