"""Texts and chats to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhfkernels.data.files import Text
from rlhfkernels.errors import DataError, ModelError


def encode_row(where: str, texts: tuple[Text, ...], tokenizer: Any | None, vocab_size: int) -> list[list[int]]:
    """The prompt's tokens, then each completion's, which end with the end-of-sequence token where there is one.

    Args:
        where: the row's place, for messages.
        texts: prompt and completions.
        tokenizer: of the model; ``None`` (a preset) encodes text as its UTF-8 bytes.
        vocab_size: token ids are below it.

    Raises:
        DataError: a chat has no template, or one that does not continue the prompt.
        ModelError: the vocabulary is too small for bytes.
    """
    prompt, *completions = texts
    if tokenizer is None:
        return [_bytes(text, vocab_size) for text in texts]
    if not isinstance(prompt, str):
        if tokenizer.chat_template is None:
            raise DataError(f"{where}: it holds messages, and the model's tokenizer has no chat template.")
        return _encode_chat(where, prompt, completions, tokenizer)
    found = [list(tokenizer(prompt)["input_ids"])]
    for completion in completions:
        tokens = list(tokenizer(_flat(completion), add_special_tokens=False)["input_ids"])
        end = tokenizer.eos_token_id
        found.append(tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)])
    return found


def encode_prompt(text: Text, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """The tokens of a prompt that a completion is sampled for; arguments and errors as in ``encode_row``."""
    if tokenizer is None:
        return _bytes(text, vocab_size)
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    if tokenizer.chat_template is None:
        return list(tokenizer(_flat(text))["input_ids"])
    return list(tokenizer.apply_chat_template(text, add_generation_prompt=True, return_dict=True)["input_ids"])


def _encode_chat(where: str, prompt: Text, completions: Sequence[Text], tokenizer: Any) -> list[list[int]]:
    """Tokens of a chat. Prompt and completion are told apart in the text: a token could span both."""
    head: str = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    found = [head]
    for completion in completions:
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole: str = tokenizer.apply_chat_template([*prompt, *messages], tokenize=False)
        if not whole.startswith(head):
            raise DataError(f"{where}: the chat template does not continue the prompt's text with the completion's.")
        found.append(whole[len(head) :])
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in found]


def _bytes(text: Text, vocab_size: int) -> list[int]:
    if vocab_size < 256:
        raise ModelError(f"text is encoded as bytes for a preset: a vocabulary of {vocab_size} is below 256.")
    return list(_flat(text).encode())


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
