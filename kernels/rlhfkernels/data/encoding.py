"""Texts and chats to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhfkernels.data.files import Text
from rlhfkernels.errors import DataError, ModelError


def encode_row(where: str, texts: tuple[Text, ...], tokenizer: Any | None, vocab_size: int) -> list[list[int]]:
    """The prompt's tokens, then each completion's. A text ends with the end-of-sequence token, a chat as its template.

    Args:
        where: the row's place, for messages.
        texts: prompt and completions.
        tokenizer: of the model; ``None`` (a preset) encodes text as its UTF-8 bytes.
        vocab_size: token ids are below it.

    Raises:
        DataError: a chat has no template, or one that refuses it or does not continue the prompt; or a token is not in
            the model's vocabulary.
        ModelError: the vocabulary is too small for bytes.
    """
    prompt, *completions = texts
    if tokenizer is None:
        return [_bytes(text, vocab_size) for text in texts]
    if isinstance(prompt, str):
        found = [_prompt_tokens(prompt, tokenizer)]
        end = tokenizer.eos_token_id
        for completion in completions:
            tokens = _continuation(_flat(completion), tokenizer)
            found.append(tokens if end is None or tokens[-1:] == [end] else [*tokens, int(end)])
    elif tokenizer.chat_template is None:
        raise DataError(f"{where}: it holds messages, and the model's tokenizer has no chat template.")
    else:
        found = _encode_chat(where, prompt, completions, tokenizer)
    return _below(where, found, vocab_size)


def encode_prompt(where: str, text: Text, tokenizer: Any | None, vocab_size: int) -> list[int]:
    """The tokens of a prompt that a completion is sampled for; arguments and errors as in ``encode_row``."""
    if tokenizer is None:
        return _bytes(text, vocab_size)
    if isinstance(text, str) or tokenizer.chat_template is None:
        found = _prompt_tokens(_flat(text), tokenizer)
    else:
        encoded = _templated(where, tokenizer, text, add_generation_prompt=True, return_dict=True)
        found = list(encoded["input_ids"])
    return _below(where, [found], vocab_size)[0]


def _encode_chat(where: str, prompt: Text, completions: Sequence[Text], tokenizer: Any) -> list[list[int]]:
    """Tokens of a chat. Prompt and completion are told apart in the text: a token could span both."""
    head: str = _templated(where, tokenizer, prompt, add_generation_prompt=True, tokenize=False)
    found = [list(tokenizer(head, add_special_tokens=False)["input_ids"])]
    for completion in completions:
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole: str = _templated(where, tokenizer, [*prompt, *messages], tokenize=False)
        if not whole.startswith(head):
            raise DataError(f"{where}: the chat template does not continue the prompt's text with the completion's.")
        found.append(_continuation(whole[len(head) :], tokenizer))
    return found


def _templated(where: str, tokenizer: Any, messages: Any, **how: Any) -> Any:
    """The messages through the tokenizer's chat template, which may refuse them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except (TemplateError, TypeError, ValueError) as error:  # of jinja, of Python inside the template, of transformers
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"{where}: the model's chat template refuses the messages: {reason}.") from error


def _prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt, without the end that some tokenizers add to every text: a prompt goes on."""
    tokens, bare = (list(tokenizer(text, add_special_tokens=has)["input_ids"]) for has in (True, False))
    has_end = tokens[-1:] == [tokenizer.eos_token_id] and tokens[-len(bare) :] != bare
    return tokens[:-1] if has_end else tokens


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a text that follows another: SentencePiece puts a space before a text that stands alone."""
    alone, before, both = (
        list(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (text, "\n", "\n" + text)
    )
    return both[len(before) :] if both[: len(before)] == before else alone


def _below(where: str, rows: list[list[int]], vocab_size: int) -> list[list[int]]:
    """``rows``, checked: an added token may lie beyond the model's embedding."""
    largest = max((token for row in rows for token in row), default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{where}: the tokenizer gives token {largest}, which must be below the model's vocabulary of {vocab_size}."
        )
    return rows


def _bytes(text: Text, vocab_size: int) -> list[int]:
    if vocab_size < 256:
        raise ModelError(f"text is encoded as bytes for a preset: a vocabulary of {vocab_size} is below 256.")
    return list(_flat(text).encode())


def _flat(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)
