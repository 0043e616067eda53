"""What a step samples and scores, and the batches of prompts it starts from.

Shapes: b = batch, p = prompt length, c = completion length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from rlhfkernels.config.case import Case
from rlhfkernels.data.files import read_prompts
from rlhfkernels.errors import ModelError


@dataclasses.dataclass(kw_only=True, slots=True)
class Rollout:
    """Completions of a batch of prompts, and what the roles say of them.

    Attributes:
        tokens: [b, p + c] int64, prompts padded on the left, completions padded on the right.
        attention_mask: [b, p + c] int64, 0 on padding; ``None`` where nothing is padded on the left.
        mask: [b, c] float32, 1 on real completion tokens, the stop token included.
        logprobs: [b, c], of the old policy, kept while sampling.
        prompt_len: p.
        reference_logprobs: [b, c].
        values: [b, c]: the value read at the position before token t.
        terminal_values: [b], the value after a completion that was cut by length, else 0; only where asked for.
        scores: [b].
        advantages: [b, c], whitened.
        returns: [b, c].
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor | None
    mask: torch.Tensor
    logprobs: torch.Tensor
    prompt_len: int
    reference_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    terminal_values: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def completions(self) -> torch.Tensor:
        """[b, c], the sampled tokens."""
        return self.tokens[:, self.prompt_len :]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor it holds now."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                yield value


class PromptSource:
    """Batches of prompts of exactly p tokens, padded on the left, in turn and over again.

    Args:
        case: names the file and the lengths, or draws random token ids.
        vocab_size: ids are below it.
        tokenizer: of the model; ``None`` (a preset) encodes text as its UTF-8 bytes.

    Raises:
        PromptsError: the file cannot be used.
        ModelError: the vocabulary is too small for bytes.
    """

    def __init__(self, case: Case, vocab_size: int, tokenizer: Any | None) -> None:
        self._case = case
        self._vocab_size = vocab_size
        self._next = 0
        self._rows: list[list[int]] = []
        self.num_truncated = 0
        if case.options.data.prompts is not None:
            texts = read_prompts(case.options.data.prompts, case.options.data.prompt_field)
            encoded = [_encode(text, tokenizer, vocab_size) for text in texts]
            self.num_truncated = sum(len(row) > case.prompt_len for row in encoded)
            self._rows = [row[-case.prompt_len :] for row in encoded]
        # Known once for the whole source, so that every step of a case does the same work.
        self.padded = any(len(row) < case.prompt_len for row in self._rows)

    def summary(self) -> dict[str, Any]:
        """The ``prompts`` object of a record."""
        return {
            "source": self._case.options.data.prompts or "random",
            "num_prompts": len(self._rows) or None,
            "num_truncated": self.num_truncated,
        }

    def next_batch(self, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [b, p] and their mask [b, p] (``None`` where no prompt is short), on the case's device."""
        case = self._case
        if not self._rows:
            shape = (case.batch_size, case.prompt_len)
            return torch.randint(self._vocab_size, shape, generator=generator, device=case.device), None
        rows = [self._rows[(self._next + i) % len(self._rows)] for i in range(case.batch_size)]
        self._next = (self._next + case.batch_size) % len(self._rows)
        tokens = [[0] * (case.prompt_len - len(row)) + row for row in rows]
        masks = [[0] * (case.prompt_len - len(row)) + [1] * len(row) for row in rows]
        mask = torch.tensor(masks, device=case.device) if self.padded else None
        return torch.tensor(tokens, device=case.device), mask


def _encode(text: str | list[dict[str, str]], tokenizer: Any | None, vocab_size: int) -> list[int]:
    if tokenizer is None:
        if vocab_size < 256:
            raise ModelError(f"prompts are encoded as bytes for a preset: a vocabulary of {vocab_size} is below 256.")
        return list(_flat(text).encode())
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer(_flat(text))["input_ids"])
    return list(tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)["input_ids"])


def _flat(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
