import json
import os
import subprocess
import sys

import pytest

from rlhfkernels.data.files import read_demonstrations, read_pairs, read_prompts
from rlhfkernels.errors import DataError


def write(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def messages(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]


def test_texts_and_messages_in_the_order_of_the_file(tmp_path):
    messages = [{"role": "user", "content": "Hello"}]
    # U+2028 ends a line for str.splitlines, not for JSON lines.
    path = write(
        tmp_path / "p.jsonl",
        {"q": "one\u2028two"},
        "\n",
        json.dumps({"q": "a\u2028b"}, ensure_ascii=False) + "\n",
        {"q": messages},
    )
    assert read_prompts(path, "q") == ["one\u2028two", "a\u2028b", messages]


def test_a_last_line_without_its_end_is_read(tmp_path):
    assert read_prompts(write(tmp_path / "p.jsonl", '{"q": "a"}\n{"q": "b"}'), "q") == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"q": "a"}\n{"q": \n', "line 2: it is not JSON."),
        ('\n["a"]\n', "line 2: it must be a JSON object."),
        ('{"prompt": "a", "id": 1}\n', "line 1: there is no field 'q'; its fields are 'prompt', 'id'."),
        ("{}\n", "its fields are none."),
        ('{"q": ""}\n', "line 1: field 'q' must be a text"),
        ('{"q": "  "}\n', "line 1: field 'q' must be a text"),
        ('{"q": 3}\n', "line 1: field 'q' must be a text"),
        ('{"q": []}\n', "line 1: field 'q' must be a text"),
        ('{"q": [{"role": "user"}]}\n', "line 1: field 'q' must be a text"),
        ('{"q": [{"role": "user", "content": " "}]}\n', "line 1: field 'q' is empty: its messages have no content."),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, says):
    path = write(tmp_path / "p.jsonl", text)
    with pytest.raises(DataError) as caught:
        read_prompts(path, "q")
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_bytes(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "absent.jsonl", "q")
    with pytest.raises(DataError, match="is a folder"):
        read_prompts(tmp_path, "q")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "bytes", "q")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"q": "a"}\n')
    assert read_prompts(path, "q") == ["a"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"q": "\\ud800"}', "field 'q' must be a text"),
        ("null", "line 1: it must be a JSON object."),
        ('{"q": null}', "field 'q' must be a text"),
        ("[" * 100_000, "line 1: it is not JSON."),
        ('{"q": "' + "x" * 20_000_000 + '"}', "line 1: it has 20,000,009 characters, and a row may have 16,000,000."),
    ],
    ids=["lone surrogate", "null row", "null text", "deep", "long"],
)
def test_a_hostile_line_is_one_short_sentence(tmp_path, line, says):
    with pytest.raises(DataError) as caught:
        read_prompts(write(tmp_path / "p.jsonl", line + "\n"), "q")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_path_with_a_null_character_is_one_sentence():
    with pytest.raises(DataError, match="is not a path: it contains a null character"):
        read_prompts("a\0b", "q")


def test_reading_prompts_imports_no_torch():
    code = "import sys, rlhfkernels.data.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_demonstrations_and_pairs_in_trls_shapes(tmp_path):
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b"}, "\n", {"prompt": "c", "completion": "d"})
    assert [(row.texts, row.line) for row in read_demonstrations(path)] == [(("a", "b"), 1), (("c", "d"), 3)]
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "g"), ("assistant", "b"))
    )
    system = {"role": "system", "content": "s"}
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"chosen": "Q: x A: yes", "rejected": "Q: x A: no"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": " q\n", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "q", "chosen": [system, user, good], "rejected": [system, user, bad]},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": [user], "chosen": "g", "rejected": "b"},
    )
    pairs, num_dropped = read_pairs(path)
    assert [pair.texts for pair in pairs] == [
        ("a", "b", "c"),
        ([user], [good], [bad]),
        ("Q: x A:", " yes", " no"),
        ([user], [good], [bad]),  # the text is a message that the chats begin with
        ([system, user], [good], [bad]),
        ([user], [good], [bad]),
        ([user], "g", "b"),
    ]
    assert num_dropped == 1


MIXED = "field 'prompt' is a text, and what completes it a list of messages: it must be messages too."


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a"}, "line 1: there is no field 'completion'; its fields are 'prompt'."),
        ({"prompt": "a", "completion": " "}, "line 1: field 'completion' must be a text that is not empty"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": " "}]},
            "line 1: field 'completion' is empty: its messages have no content.",
        ),
        (
            {"prompt": [{"role": "user", "content": ""}], "completion": "b"},
            "line 1: field 'prompt' is empty: its messages have no content.",
        ),
        ({"prompt": "a", "completion": messages("q", "a")}, f"line 1: {MIXED}"),
    ],
)
def test_a_bad_demonstration_is_one_sentence(tmp_path, row, says):
    with pytest.raises(DataError) as caught:
        read_demonstrations(write(tmp_path / "d.jsonl", row))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no field 'rejected'"),
        (
            {"chosen": "a", "rejected": "b"},
            "there is no field 'prompt', and 'chosen' and 'rejected' share no beginning.",
        ),
        (
            {"chosen": "a", "rejected": [{"role": "user", "content": "a"}]},
            "must both be texts, or both lists of messages",
        ),
        (
            {"chosen": messages("", "a"), "rejected": messages("", "b")},
            "line 1: the prompt is what 'chosen' and 'rejected' share, and it has no content.",
        ),
        ({"chosen": "  a", "rejected": "  b"}, "what 'chosen' and 'rejected' share, and it has no content."),
        ({"chosen": messages("q", "a"), "rejected": messages("q", "")}, "and what follows it in 'rejected' has no"),
        ({"chosen": "Hi\n", "rejected": "Hi there"}, "share, and what follows it in 'chosen' has no content."),
        ({"prompt": "q", "chosen": messages("q", "a"), "rejected": "b"}, f"line 1: {MIXED}"),
        ({"prompt": "q", "chosen": messages("q", "a"), "rejected": messages("p", "b")}, f"line 1: {MIXED}"),
        ({"prompt": "be brief", "chosen": messages("q", "a"), "rejected": messages("q", "b")}, f"line 1: {MIXED}"),
        ({"prompt": "a", "chosen": messages("q", "a"), "rejected": messages("q", "b")}, f"line 1: {MIXED}"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected in every row, so no pair is left."),
    ],
)
def test_a_bad_pair_is_one_sentence(tmp_path, row, says):
    with pytest.raises(DataError) as caught:
        read_pairs(write(tmp_path / "p.jsonl", row))
    assert says in str(caught.value)


def test_a_file_that_can_be_read_only_once_is_refused(tmp_path):
    """Every case reads it again."""
    pipe = tmp_path / "p.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match=rf"^prompts '{pipe}' is no regular file: every case reads it again"):
        read_prompts(pipe, "prompt")
