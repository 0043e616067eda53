from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Case, DataError, ModelError, build_step
from rlhfkernels.data.sources import DemonstrationSource, PairSource, PromptSource
from rlhfkernels.parallel.world import World


def write_prompts(path: Path, prompts: list[object]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_prompts_are_padded_on_the_left_and_truncated_from_the_left(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["abcdefgh", "xy", "12345"])
    source = PromptSource(make_case(batch_size=2, data__prompts=file), 256, None)
    tokens, mask = source.next_batch(None)
    assert tokens.tolist() == [list(b"defgh"), [0, 0, 0, *b"xy"]]
    assert mask is not None
    assert mask.tolist() == [[1] * 5, [0, 0, 0, 1, 1]]
    tokens, _ = source.next_batch(None)
    assert tokens.tolist() == [list(b"12345"), list(b"defgh")]
    assert source.summary() == {"source": file, "num_prompts": 3, "num_truncated": 1, "num_dropped": 0}


def test_prompts_that_all_fit_exactly_need_no_mask(make_case: Callable[..., Case], tmp_path: Path) -> None:
    source = PromptSource(make_case(data__prompts=write_prompts(tmp_path / "p.jsonl", ["abcde", "fghij"])), 256, None)
    assert source.next_batch(None).mask is None


def test_messages_are_joined_where_there_is_no_template(make_case: Callable[..., Case], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    file = write_prompts(tmp_path / "p.jsonl", [messages])
    tokens, _ = PromptSource(make_case(batch_size=1, data__prompts=file), 256, None).next_batch(None)
    assert tokens.tolist() == [list(b"ab\ncd")]


def test_random_prompts_come_from_the_generator(make_case: Callable[..., Case]) -> None:
    source = PromptSource(make_case(), 48, None)
    first, mask = source.next_batch(torch.Generator().manual_seed(0))
    again, _ = source.next_batch(torch.Generator().manual_seed(0))
    assert mask is None
    assert first.shape == (4, 5)
    assert torch.equal(first, again)


def test_a_vocabulary_below_256_holds_no_bytes(make_case: Callable[..., Case], tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["abc"])
    with pytest.raises(ModelError, match="a vocabulary of 48 is below 256"):
        PromptSource(make_case(data__prompts=file), 48, None)


def test_a_step_runs_on_prompts_from_a_file(tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["abcdefgh", "xy", "12345"])
    from rlhfkernels import Options

    case = Case(
        method="hydra",
        model="tiny",
        prompt_len=5,
        completion_len=3,
        batch_size=2,
        options=Options.of({"data.prompts": file}),
    )
    step = build_step(case)
    for _ in range(2):
        stats = step.run()
        stats.check_finite()
    assert step.data_summary()["num_truncated"] == 1


def test_without_its_rows_a_file_stands_for_random_rows_with_a_mask(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["abc"])
    tokens, mask = PromptSource(make_case(data__prompts=file), 256, None, with_rows=False).next_batch(None)
    assert mask is not None
    assert tokens.shape == mask.shape == (4, 5)


def test_pairs_that_are_equal_within_the_completion_length_are_dropped(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [("abcdef one", "abcdef two"), ("abcdef", "ghijkl")]
    path.write_text("".join(json.dumps({"prompt": "p", "chosen": w, "rejected": r}) + "\n" for w, r in rows))
    source = PairSource(make_case("dpo", data__pairs=str(path)), 256, None)
    assert source.summary() == {"source": str(path), "num_prompts": 1, "num_truncated": 0, "num_dropped": 1}
    path.write_text(json.dumps({"prompt": "p", "chosen": rows[0][0], "rejected": rows[0][1]}))
    with pytest.raises(DataError, match="the completions of every row are equal within completion_len 6"):
        PairSource(make_case("dpo", data__pairs=str(path)), 256, None)


class ChatTokenizer:
    """Encodes characters; its template is ``<role>content`` with an end mark, and two line feeds are one token."""

    chat_template = "there is one"
    eos_token_id = 3

    def apply_chat_template(
        self, messages: list[dict[str, str]], add_generation_prompt: bool = False, **_: object
    ) -> str:
        text = "".join(f"<{m['role']}>\n{m['content']}$" for m in messages)
        return text + "<assistant>\n" if add_generation_prompt else text

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.replace("\n\n", "\u00b6").encode("latin-1"))}


def test_a_completion_that_starts_with_a_line_feed_is_not_merged_with_the_prompt(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": [{"role": "user", "content": "hi"}], "completion": "\nyes"}))
    case = make_case("sft", data__demonstrations=str(path), prompt_len=40, completion_len=9, batch_size=1)
    batch = DemonstrationSource(case, 256, ChatTokenizer()).next_batch(None)
    assert bytes(batch.tokens[0, :40].tolist()).lstrip(b"\0") == b"<user>\nhi$<assistant>\n"
    assert bytes(batch.completions[0].tolist()).rstrip(b"\0") == b"\nyes$"


def test_messages_without_a_chat_template_name_their_line(make_case: Callable[..., Case], tmp_path: Path) -> None:
    class NoTemplate(ChatTokenizer):
        chat_template = None

    path = tmp_path / "d.jsonl"
    row = json.dumps({"prompt": [{"role": "user", "content": "hi"}], "completion": "yes"})
    path.write_text(f"\n\n{row}\n")
    with pytest.raises(DataError, match=r"line 3: it holds messages, and the model's tokenizer has no chat template"):
        DemonstrationSource(make_case("sft", data__demonstrations=str(path)), 256, NoTemplate())


def test_the_data_set_of_a_file_is_every_row_once_and_names_its_rows(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [("a", "bc", "d"), ("ab", "cdefghij", "k"), ("abcdefg", "h", "ij")]
    path.write_text("".join(json.dumps({"prompt": p, "chosen": w, "rejected": r}) + "\n" for p, w, r in rows))
    source = PairSource(make_case("dpo", data__pairs=str(path), batch_size=2), 256, None)
    source.next_batch(None)
    found = list(source.data_set(None))
    assert [batch.rows for batch in found] == [(0, 1), (2,)]
    assert [batch.num_rows for batch in found] == [2, 1]
    assert found[0].extents == ((4, 7), (4, 6), (3, 11), (3, 6))
    assert source.next_batch(None).rows == (2, 0)  # reading the data set takes no turn
    assert source.num_rows == 3
    assert source.lengths() == {(1, 2): 1, (1, 1): 1, (2, 6): 1, (2, 1): 1, (5, 1): 1, (5, 2): 1}


def test_the_data_set_of_random_rows_is_one_batch_from_then_on(make_case: Callable[..., Case]) -> None:
    source = DemonstrationSource(make_case("sft"), 48, None)
    generator = torch.Generator().manual_seed(0)
    before = source.next_batch(generator)
    assert before.rows is None
    (batch,) = source.data_set(generator)
    assert not torch.equal(batch.tokens, before.tokens)
    for later in (*source.data_set(generator), source.next_batch(generator)):
        assert later.tokens is batch.tokens
        assert later.rows == (0, 1, 2, 3)
        assert later.columns == {}
        later["column"] = batch.mask
    assert {id(tensor) for tensor in source.tensors()} == {id(batch.tokens), id(batch.mask)}
    assert source.lengths() == {}


def test_ranks_take_the_rows_of_a_file_in_turns(make_case: Callable[..., Case], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": chr(97 + i)}) for i in range(5)))
    case = make_case(batch_size=2, prompt_len=1, data__prompts=str(file))
    ranks = [PromptSource(case, 256, None, world=World(rank, 2)) for rank in range(2)]
    taken = [[source.next_batch(None).tokens.flatten().tolist() for _ in range(2)] for source in ranks]
    assert [["".join(map(chr, rows)) for rows in rank] for rank in taken] == [["ab", "ea"], ["cd", "bc"]]
