"""Data sources: batches of prompts, demonstrations or preference pairs, from a file or of random tokens.

Shapes: b = data rows, n = sequences (b, or 2 b for pairs), p = prompt length, c = completion length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.data.batch import Batch
from rlhfkernels.data.files import Text, read_demonstrations, read_pairs, read_prompts
from rlhfkernels.errors import DataError, ModelError
from rlhfkernels.methods.program import SEQUENCES_PER_ROW, SourceName


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


class _Rows:
    """Tokenised rows, handed out in turn and over again."""

    def __init__(self, case: Case, vocab_size: int, path: str | None, num_dropped: int = 0) -> None:
        self._case, self._vocab_size, self._path = case, vocab_size, path
        self._num_dropped = num_dropped
        self._next = 0
        self._prompts: list[list[int]] = []
        self.num_truncated = 0

    def summary(self) -> dict[str, Any]:
        """See ``Source.summary``."""
        return {
            "source": self._path or "random",
            "num_prompts": len(self._prompts) or None,
            "num_truncated": self.num_truncated,
            "num_dropped": self._num_dropped,
        }

    def _take(self) -> list[int]:
        """Indices of the next rows."""
        case, num_rows = self._case, len(self._prompts)
        rows = [(self._next + i) % num_rows for i in range(case.batch_size)]
        self._next = (self._next + case.batch_size) % num_rows
        return rows

    def _keep_prompts(self, prompts: Sequence[list[int]]) -> None:
        """Keeps the last ``prompt_len`` tokens of each."""
        p = self._case.prompt_len
        self.num_truncated += sum(len(row) > p for row in prompts)
        self._prompts = [row[-p:] for row in prompts]

    @property
    def _is_padded(self) -> bool:
        """Known once for the whole source, so that every step of a case does the same work."""
        return any(len(row) < self._case.prompt_len for row in self._prompts)

    def _prompts_of(self, rows: Sequence[int]) -> Prompts:
        p, device = self._case.prompt_len, self._case.device
        found = [self._prompts[row] for row in rows]
        tokens = torch.tensor([[0] * (p - len(row)) + row for row in found], device=device)
        if not self._is_padded:
            return Prompts(tokens, None)
        masks = [[0] * (p - len(row)) + [1] * len(row) for row in found]
        return Prompts(tokens, torch.tensor(masks, device=device))

    def _random(self, shape: tuple[int, int], generator: torch.Generator | None) -> torch.Tensor:
        return torch.randint(self._vocab_size, shape, generator=generator, device=self._case.device)


class PromptSource(_Rows):
    """Prompts of exactly p tokens: longer ones lose their beginning, shorter ones are padded on the left.

    Args:
        case: names the file and the lengths. Without a file, tokens are random.
        vocab_size: token ids are below it.
        tokenizer: of the model; ``None`` (a preset) encodes text as its UTF-8 bytes.

    Raises:
        DataError: the file cannot be used.
        ModelError: the vocabulary is too small for bytes.
    """

    def __init__(self, case: Case, vocab_size: int, tokenizer: Any | None) -> None:
        path = case.options.data.prompts
        super().__init__(case, vocab_size, path)
        if path is not None:
            texts = read_prompts(path, case.options.data.prompt_field)
            self._keep_prompts([_encode_prompt(text, tokenizer, vocab_size) for text in texts])

    def next_batch(self, generator: torch.Generator | None) -> Prompts:
        """See ``Source.next_batch``."""
        if not self._prompts:
            return Prompts(self._random((self._case.batch_size, self._case.prompt_len), generator), None)
        return self._prompts_of(self._take())


class _CompletionSource(_Rows):
    """Prompts with given completions: longer completions lose their end, shorter ones are padded on the right."""

    def __init__(
        self,
        case: Case,
        vocab_size: int,
        tokenizer: Any | None,
        path: str | None,
        rows: Sequence[tuple[Text, ...]],
        num_dropped: int = 0,
    ) -> None:
        super().__init__(case, vocab_size, path, num_dropped)
        encoded = [_encode_row(f"'{path}', row {i}", row, tokenizer, vocab_size) for i, row in enumerate(rows, start=1)]
        self._keep_prompts([prompt for prompt, *_ in encoded])
        c = case.completion_len
        self.num_truncated += sum(len(tokens) > c for _, *completions in encoded for tokens in completions)
        self._completions = [[tokens[:c] for tokens in completions] for _, *completions in encoded]
        self._num_completions = SEQUENCES_PER_ROW[case.role_table.source]

    def next_batch(self, generator: torch.Generator | None) -> Batch:
        """See ``Source.next_batch``."""
        case, m = self._case, self._num_completions
        p, c, n = case.prompt_len, case.completion_len, case.batch_size * m
        if not self._prompts:
            tokens = self._random((n, p + c), generator)
            if m > 1:  # the completions of one row share its prompt
                tokens[:, :p] = tokens[::m, :p].repeat_interleave(m, 0)
            mask = torch.ones(n, c, dtype=torch.float32, device=case.device)
            return Batch(tokens=tokens, attention_mask=None, mask=mask, prompt_len=p, num_rows=case.batch_size)
        rows = self._take()
        prompts = self._prompts_of([row for row in rows for _ in range(m)])
        found = [tokens for row in rows for tokens in self._completions[row]]
        completions = torch.tensor([tokens + [0] * (c - len(tokens)) for tokens in found], device=case.device)
        lengths = torch.tensor([len(tokens) for tokens in found], device=case.device)
        mask = (torch.arange(c, device=case.device) < lengths[:, None]).float()
        attention_mask = None
        if prompts.mask is not None:
            attention_mask = torch.cat((prompts.mask, torch.ones_like(completions)), 1)
        tokens = torch.cat((prompts.tokens, completions), 1)
        return Batch(tokens=tokens, attention_mask=attention_mask, mask=mask, prompt_len=p, num_rows=case.batch_size)


class DemonstrationSource(_CompletionSource):
    """One sequence a data row. Arguments and errors as ``PromptSource``."""

    def __init__(self, case: Case, vocab_size: int, tokenizer: Any | None) -> None:
        path = case.options.data.demonstrations
        super().__init__(case, vocab_size, tokenizer, path, [] if path is None else read_demonstrations(path))


class PairSource(_CompletionSource):
    """Two sequences a data row: chosen, then rejected. Arguments and errors as ``PromptSource``."""

    def __init__(self, case: Case, vocab_size: int, tokenizer: Any | None) -> None:
        path = case.options.data.pairs
        rows, num_dropped = ([], 0) if path is None else read_pairs(path)
        super().__init__(case, vocab_size, tokenizer, path, rows, num_dropped)


SOURCES: dict[SourceName, Callable[[Case, int, Any | None], Source]] = {
    "prompts": PromptSource,
    "demonstrations": DemonstrationSource,
    "pairs": PairSource,
}


def _encode_row(where: str, row: tuple[Text, ...], tokenizer: Any | None, vocab_size: int) -> list[list[int]]:
    """The prompt's tokens, then each completion's, which end with the end-of-sequence token where there is one."""
    prompt, *completions = row
    if tokenizer is None:
        return [_bytes(text, vocab_size) for text in row]
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None:
            raise DataError(f"{where}: it holds messages, and the model's tokenizer has no chat template.")
        head = _encode_prompt(prompt, tokenizer, vocab_size)
        return [head, *(_reply(where, prompt, completion, head, tokenizer) for completion in completions)]
    found = [list(tokenizer(prompt)["input_ids"])]
    for completion in completions:
        tokens = list(tokenizer(_flat(completion), add_special_tokens=False)["input_ids"])
        found.append(_with_end(tokens, tokenizer))
    return found


def _reply(where: str, prompt: Text, completion: Text, head: list[int], tokenizer: Any) -> list[int]:
    """The tokens that the chat template adds to the prompt's for a completion."""
    messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    assert not isinstance(prompt, str)
    tokens = list(tokenizer.apply_chat_template([*prompt, *messages], return_dict=True)["input_ids"])
    if tokens[: len(head)] != head:
        raise DataError(f"{where}: the chat template does not continue the prompt's tokens with the completion's.")
    return tokens[len(head) :] or _with_end([], tokenizer)


def _with_end(tokens: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)]


def _encode_prompt(text: Text, tokenizer: Any | None, vocab_size: int) -> list[int]:
    if tokenizer is None:
        return _bytes(text, vocab_size)
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer(_flat(text))["input_ids"])
    return list(tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)["input_ids"])


def _bytes(text: Text, vocab_size: int) -> list[int]:
    if vocab_size < 256:
        raise ModelError(f"text is encoded as bytes for a preset: a vocabulary of {vocab_size} is below 256.")
    return list(_flat(text).encode())


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
