from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Case, ModelError, build_step
from rlhfkernels.data.sources import PromptSource


def write_prompts(path: Path, prompts: list[object]) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def test_prompts_are_padded_on_the_left_and_truncated_from_the_left(
    make_case: Callable[..., Case], tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "p.jsonl", ["abcdefgh", "xy", "12345"])
    source = PromptSource(make_case(batch_size=2, data__prompts=file), 256, None)
    assert source.num_truncated == 1
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
