"""The phase ``prepare``: columns that are read once for the data set."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhfkernels import Observer, TrainingStep, phase_work

MakeStep = Callable[..., TrainingStep]
ROWS = [("ab", "cdef", "gh"), ("a", "b", "cdefgh"), ("abcdefgh", "cd", "ef"), ("xyz", "uvwxyz12", "q"), ("k", "l", "m")]
ONCE = {"dpo.precompute_ref_log_probs": True}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": prompt, "chosen": won, "rejected": lost} for prompt, won, lost in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def small(small_step: MakeStep, file: str) -> MakeStep:
    """Builds small steps over the rows of the file."""
    return functools.partial(small_step, batch_size=2, **{"data.pairs": file, "optimizer.learning_rate": 1e-3})


class Phases(Observer):
    def __init__(self) -> None:
        self.names: list[str] = []

    def enter_phase(self, name: str) -> None:
        self.names.append(name)


@pytest.mark.parametrize("form", ["joint", "two-pass"])
@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_once_is_each_step(small: MakeStep, method: str, form: str) -> None:
    """Three steps of 2 of 5 rows: the last takes row 4 and row 0 again."""
    once, each = (small(method, **{"dpo.forward": form, **options}) for options in (ONCE, {}))
    for _ in range(3):
        found, expected = once.run().to_dict(), each.run().to_dict()
        assert found == pytest.approx(expected, rel=1e-9)
    for a, b in zip(once.trained_parameters(), each.trained_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert expected["margin"] != pytest.approx(0, abs=1e-6)  # the policy has moved, and the reference has not


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_the_gradients_of_the_first_step_are_the_same(small: MakeStep, method: str) -> None:
    steps = [small(method, **options) for options in (ONCE, {})]
    for step in steps:
        step.optimizers = {}
        step.run()
    for a, b in zip(*(step.trained_parameters() for step in steps), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_micro_batches_change_no_column(small: MakeStep) -> None:
    whole, parts = small("dpo-lora", **ONCE), small("dpo-lora", **ONCE, **{"engine.micro_batch_size": 1})
    found = []
    for step in (whole, parts):
        batch, _ = step.infer()
        found.append(batch["reference_logprobs"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def test_prepare_is_a_phase_before_the_first_step_alone(small: MakeStep) -> None:
    step, observer = small("dpo-lora", **ONCE), Phases()
    assert [(phase.name, phase.kind) for phase in step.phases] == [
        ("prepare", "prepare"),
        ("update", "update"),
        ("optimize", "update"),
    ]
    step.run(observer)
    assert observer.names == ["prepare", "update", "update", "optimize"]
    observer.names.clear()
    step.run(observer)
    assert observer.names == ["update", "update", "optimize"]


def test_it_keeps_4_bytes_a_sequence_of_the_data_set(small: MakeStep) -> None:
    step = small("dpo-lora", **ONCE)
    step.prepare()
    kept = [tensor for part, tensor in step.persistent_tensors() if part == "rollout"]
    assert step.num_data_rows == 5
    assert [tensor.nbytes for tensor in kept] == [4 * 2 * 5]


def test_a_reference_of_its_own_is_freed(small: MakeStep) -> None:
    step = small("dpo", **ONCE)
    before = {id(tensor): tensor.nbytes for part, tensor in step.persistent_tensors() if part == "base"}
    step.prepare(num_batches=1)
    assert set(step.engine.models) == {"policy", "reference"}
    step.prepare()
    after = {id(tensor): tensor.nbytes for part, tensor in step.persistent_tensors() if part == "base"}
    assert set(step.engine.models) == {"policy"}
    assert sum(after.values()) * 2 == sum(before.values())
    step.run()


def test_an_adapters_base_is_not_freed(small: MakeStep) -> None:
    step = small("dpo-lora", **ONCE)
    step.prepare()
    assert set(step.engine.models) == {"policy"}
    step.run()


def test_random_rows_are_one_batch_that_every_step_reads(small_step: MakeStep) -> None:
    step = small_step("dpo-lora", batch_size=2, **ONCE)
    batches = [step.infer()[0] for _ in range(2)]
    assert step.num_data_rows == 2
    assert torch.equal(batches[0].tokens, batches[1].tokens)
    assert torch.equal(batches[0]["reference_logprobs"], batches[1]["reference_logprobs"])
    fresh = small_step("dpo-lora", batch_size=2)
    first, second = (fresh.infer()[0] for _ in range(2))
    assert torch.equal(first.tokens, batches[0].tokens)
    assert not torch.equal(first.tokens, second.tokens)


def test_a_column_of_another_row_shows_in_the_first_step(small: MakeStep) -> None:
    step = small("dpo-lora", **ONCE)
    step.prepare()
    right = float(small("dpo-lora", **ONCE).run()["reference_error"])
    (column,) = step._prepared.columns.values()
    column.copy_(column.roll(2))
    assert right < 1e-6 < 0.1 < float(step.run()["reference_error"])


def test_its_work_is_that_of_every_row_once(small: MakeStep) -> None:
    case = small("dpo-lora", **ONCE)
    each = phase_work(small("dpo-lora"))["score"]
    found = phase_work(case)
    assert found["prepare"].flops == each.flops * 5 // 2
    assert found["prepare"].bytes == each.bytes * 3
    one_by_one = phase_work(small("dpo-lora", **ONCE, **{"engine.micro_batch_size": 1}))
    assert one_by_one["prepare"].bytes == each.bytes * 5
    assert "score" not in found


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_its_work_is_the_same_once_it_ran(small: MakeStep, method: str) -> None:
    step = small(method, **ONCE)
    before = phase_work(step)
    step.run()
    assert phase_work(step) == before


@pytest.mark.parametrize("method", ["dpo", "dpo-lora"])
def test_a_second_call_reads_nothing_again(small: MakeStep, method: str) -> None:
    """The base of the reference is freed by then."""
    step, phases = small(method, **ONCE), Phases()
    for _ in range(2):
        step.prepare(phases)
    assert phases.names == ["prepare"]
