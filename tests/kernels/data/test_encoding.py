"""Tokens of texts and chats, by stand-ins for tokenizers whose tokens are characters."""

from __future__ import annotations

import pytest

from rlhfkernels import DataError
from rlhfkernels.data.encoding import encode_prompt, encode_row

WHERE = "rows 'r.jsonl', line 2"
USER = [{"role": "user", "content": "hi"}]


class SentencePiece:
    """Puts a space, here ``_``, before a text that stands alone, as Llama 2's tokenizer does; 1 begins a sequence."""

    chat_template: str | None = None
    eos_token_id = 3
    end: tuple[int, ...] = ()

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        tokens = [*f"_{text.replace(' ', '_')}".encode()]
        return {"input_ids": [1, *tokens, *self.end] if add_special_tokens else tokens}


class AddsEnd(SentencePiece):
    """As a tokenizer that was saved with ``add_eos_token``."""

    end = (3,)


class Chat(SentencePiece):
    chat_template = "there is one"

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> object:
        from jinja2 import TemplateError

        if messages[0]["role"] == "system":
            raise TemplateError("System role not supported")
        text = "".join(f"<{m['role']}>{m['content']}$" for m in messages)
        text += "<assistant>" if add_generation_prompt else ""
        assert return_dict == tokenize
        return self(text, add_special_tokens=False) if tokenize else text


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


def test_a_completion_goes_on_without_a_space_of_the_tokenizers() -> None:
    prompt, good, bad = encode_row(WHERE, ("2 + 2 =\n", "4", " 5"), SentencePiece(), 256)
    assert text_of(prompt) == "\x01_2_+_2_=\n"
    assert (text_of(good), text_of(bad)) == ("4\x03", "_5\x03")
    _, reply = encode_row(WHERE, (USER, "yes"), Chat(), 256)
    assert text_of(reply) == "yes$"


def test_a_chat_that_is_continued_ends_with_the_generation_prompt() -> None:
    assert text_of(encode_prompt(WHERE, USER, Chat(), 256)) == "_<user>hi$<assistant>"


@pytest.mark.parametrize("kind", [SentencePiece, AddsEnd])
def test_a_prompt_has_no_end(kind: type[SentencePiece]) -> None:
    assert text_of(encode_prompt(WHERE, "go on", kind(), 256)) == "\x01_go_on"
    assert text_of(encode_prompt(WHERE, USER, kind(), 256)) == "\x01_hi"
    assert text_of(encode_row(WHERE, ("go on", "yes"), kind(), 256)[0]) == "\x01_go_on"


@pytest.mark.parametrize("kind", [SentencePiece, AddsEnd])
def test_an_end_that_the_text_has_itself_stays(kind: type[SentencePiece]) -> None:
    assert text_of(encode_prompt(WHERE, "a\x03", kind(), 256)) == "\x01_a\x03"


def test_a_token_beyond_the_vocabulary_is_one_sentence() -> None:
    sentence = rf"^{WHERE}: the tokenizer gives token 122, which must be below the model's vocabulary of 122\.$"
    for encode in (
        lambda: encode_prompt(WHERE, "xyz", SentencePiece(), 122),
        lambda: encode_row(WHERE, ("a", "xyz"), SentencePiece(), 122),
        lambda: encode_row(WHERE, (USER, "xyz"), Chat(), 122),
    ):
        with pytest.raises(DataError, match=sentence):
            encode()


def test_a_template_that_refuses_the_messages_is_one_sentence() -> None:
    messages = [{"role": "system", "content": "be brief"}, *USER]
    sentence = rf"^{WHERE}: the model's chat template refuses the messages: System role not supported\.$"
    with pytest.raises(DataError, match=sentence):
        encode_prompt(WHERE, messages, Chat(), 256)
    with pytest.raises(DataError, match=sentence):
        encode_row(WHERE, (messages, "yes"), Chat(), 256)


@pytest.mark.parametrize("error", [TypeError("unsupported operand\n"), ValueError("There is no default template.")])
def test_an_error_inside_a_template_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(messages: object, **how: object) -> None:
        raise error

    monkeypatch.setattr(Chat, "apply_chat_template", staticmethod(fail))
    reason = str(error).strip().rstrip(".")
    with pytest.raises(DataError, match=rf"^{WHERE}: the model's chat template refuses the messages: {reason}\.$"):
        encode_prompt(WHERE, USER, Chat(), 256)
