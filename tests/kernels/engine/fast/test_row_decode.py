"""Decode steps of an accelerator, run on the CPU, against the plain trunk and against the CPU's own steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.engine.fast import decoding
from rlhfkernels.engine.fast.row_decode import RowDecodeSteps

COVERED = ["llama", "mistral", "opt", "gpt_neox", "gpt2", "qwen2"]
# Transformers' RMS norm rounds to float32 even in float64; the fast trunk's does not.
NEAR = {"rtol": 1e-5, "atol": 1e-5}
PROMPT, WHOLE = 5, 14


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Makes every generation take the steps of an accelerator, and lists them."""
    taken: list[type] = []

    def choose(blocks: object, adapter: object, x: object) -> type:
        taken.append(RowDecodeSteps)
        return RowDecodeSteps

    monkeypatch.setattr(decoding, "_class_of_steps", choose)
    return taken


@pytest.mark.parametrize("num_padding", [None, [2], [0, 3, 4]])
@pytest.mark.parametrize("adapter", ["actor", None])
@pytest.mark.parametrize("architecture", COVERED)
def test_every_step_equals_the_plain_trunks(
    make_case: Callable[..., Case],
    shake: Callable[[Engine], None],
    by_rows: list[type],
    architecture: str,
    adapter: str | None,
    num_padding: list[int] | None,
) -> None:
    rows = 2 if num_padding is None else len(num_padding)
    engines = [
        Engine(make_case(architecture=architecture, batch_size=rows, lora__alpha=2.1, engine__trunk=trunk))
        for trunk in ("fast", "plain")
    ]
    for engine in engines:
        shake(engine)
    tokens = torch.randint(48, (rows, WHOLE), generator=torch.Generator().manual_seed(5))
    mask = None if num_padding is None else (torch.arange(WHOLE) >= torch.tensor(num_padding)[:, None]).long()
    by_rows.clear()
    decoders = [engine.trunks["hydra"].decoder(adapter, WHOLE, Observer()) for engine in engines]
    for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, WHOLE))):
        seen = None if mask is None else mask[:, :end]
        found, expected = (decoder.advance(tokens[:, start:end], seen) for decoder in decoders)
        torch.testing.assert_close(found, expected, **NEAR)
    assert by_rows == [RowDecodeSteps]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_samples_what_the_cpus_own_steps_sample(
    make_case: Callable[..., Case],
    generated: Callable[[TrainingStep], Batch],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    case = make_case(dtype=dtype, engine__backend="torch")
    expected = generated(build_step(case))
    monkeypatch.setattr(decoding, "_class_of_steps", lambda blocks, adapter, x: RowDecodeSteps)
    found = generated(build_step(case))
    # In bfloat16 a rounding may choose another token, after which nothing is the same.
    first = 1 if dtype == "bfloat16" else found.completions.shape[1]
    assert torch.equal(found.completions[:, :first], expected.completions[:, :first])
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    torch.testing.assert_close(
        found["old_logprobs"][:, :first], expected["old_logprobs"][:, :first], rtol=tolerance, atol=tolerance
    )


def test_adapters_of_a_wider_dtype_decode(
    make_case: Callable[..., Case], generated: Callable[[TrainingStep], Batch], by_rows: list[type]
) -> None:
    rollout = generated(build_step(make_case(dtype="bfloat16", lora__dtype="float32")))
    assert rollout["old_logprobs"].isfinite().all()
    assert by_rows
