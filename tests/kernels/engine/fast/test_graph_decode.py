"""Decode steps of static buffers, against the CPU's own steps, and replayed from a recording as a graph would."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhfkernels import Batch, Case, Observer, TrainingStep, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.engine.fast import decoding, graph_decode
from rlhfkernels.engine.fast.capture import Step, run_eagerly
from rlhfkernels.engine.fast.graph_decode import GraphDecodeSteps
from rlhfkernels.models.cache import PreallocatedLayer

NEAR = {"rtol": 1e-9, "atol": 1e-9}
PROMPT, WHOLE = 5, 14
# Buckets of 4 positions end at 8, 12 and 14, the length of the caches.
SMALL_BUCKET, BUCKETS = 4, [8, 12, 14]
ARCHITECTURES = ["llama", "mistral", "opt", "gpt_neox", "gpt2", "qwen2"]


class Recording(TorchDispatchMode):
    """Keeps every op with its arguments, and runs all of them again on the same memory, as a CUDA graph does.

    What the host computes between the ops is fixed when they are recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ops: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._ops:
            given = {address(t) for t in tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if address(old) not in given:
                    old.copy_(new)


def tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Captures:
    """Records the steps of one generation; counts how often each is captured and repeated."""

    def __init__(self) -> None:
        self.num_captured = self.num_repeated = 0

    def __call__(self, step: Step) -> Step:
        step()
        recording = Recording()
        with recording:
            step()
        self.num_captured += 1

        def repeat() -> None:
            self.num_repeated += 1
            recording.replay()

        return repeat


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Captures]:
    """Makes every generation record and replay steps of static buffers, in small buckets; lists the generations."""
    made: list[Captures] = []

    def make_capture(x: torch.Tensor, observer: Observer, *, is_required: bool) -> Captures:
        made.append(Captures())
        return made[-1]

    monkeypatch.setattr(decoding, "takes_graphs", lambda x, cuda_graphs: cuda_graphs != "off")
    monkeypatch.setattr(decoding, "make_capture", make_capture)
    monkeypatch.setattr(graph_decode, "BUCKET", SMALL_BUCKET)
    return made


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new KV caches with NaN, as memory that was used before may hold anything."""
    allocate = PreallocatedLayer.lazy_initialization

    def allocate_dirty(self: PreallocatedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        allocate(self, keys, values)
        self._both.fill_(float("nan"))

    monkeypatch.setattr(PreallocatedLayer, "lazy_initialization", allocate_dirty)


def without_graphs(case: Case) -> Case:
    return dataclasses.replace(case, options=case.options.replace({"engine.cuda_graphs": "off"}))


def states(engine: Engine, adapter: str | None, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Hidden states [steps, b, d] of a prompt and of each token after it."""
    decoder = engine.trunks["hydra"].decoder(adapter, WHOLE, Observer())
    found = []
    for start, end in ((0, PROMPT), *((t, t + 1) for t in range(PROMPT, WHOLE))):
        found.append(decoder.advance(tokens[:, start:end], None if mask is None else mask[:, :end]).clone())
    return torch.stack(found)


@pytest.mark.parametrize("num_padding", [None, [2], [0, 3, 4]])
@pytest.mark.parametrize("adapter", ["actor", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replayed_steps_equal_the_cpus_own(
    make_case: Callable[..., Case],
    shake: Callable[[Engine], None],
    captures: list[Captures],
    architecture: str,
    adapter: str | None,
    num_padding: list[int] | None,
) -> None:
    rows = 2 if num_padding is None else len(num_padding)
    engine = Engine(make_case(architecture=architecture, batch_size=rows, lora__alpha=2.1, engine__backend="torch"))
    plain = Engine(without_graphs(engine.case))
    for each in (engine, plain):
        shake(each)
    captures.clear()  # the check of the models has generated
    tokens = torch.randint(48, (rows, WHOLE), generator=torch.Generator().manual_seed(5))
    mask = None if num_padding is None else (torch.arange(WHOLE) >= torch.tensor(num_padding)[:, None]).long()
    torch.testing.assert_close(states(engine, adapter, tokens, mask), states(plain, adapter, tokens, mask), **NEAR)
    (made,) = captures
    assert (made.num_captured, made.num_repeated) == (len(BUCKETS), WHOLE - PROMPT - len(BUCKETS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout__stop_token_id": 3},
        {"engine__trunk": "plain"},
        {"data__prompts": "prompts.jsonl"},
    ],
    ids=["random prompts", "stop token", "plain trunk", "padded prompts"],
)
def test_a_generation_samples_what_one_without_graphs_samples(
    make_case: Callable[..., Case],
    generated: Callable[[TrainingStep], Batch],
    captures: list[Captures],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abcde"}\n')
    sizes = {"prompt_len": PROMPT, "completion_len": WHOLE - PROMPT, "engine__backend": "torch"}
    case = make_case(**sizes, **options)
    if case.options.data.prompts:
        case = dataclasses.replace(case, model="tiny")  # which has a tokenizer
    expected = generated(build_step(without_graphs(case)))
    captures.clear()
    found = generated(build_step(case))
    assert torch.equal(found.completions, expected.completions)
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found["old_logprobs"], expected["old_logprobs"], rtol=1e-5, atol=1e-5)
    assert bool(captures) == (case.options.engine.trunk == "fast")


def test_a_generation_after_an_update_captures_anew_and_reads_the_new_weights(
    make_case: Callable[..., Case], shake: Callable[[Engine], None], captures: list[Captures]
) -> None:
    engine = Engine(make_case(engine__backend="torch"))
    plain = Engine(without_graphs(engine.case))
    tokens = torch.randint(48, (2, WHOLE), generator=torch.Generator().manual_seed(5))
    captures.clear()
    before = states(engine, "actor", tokens, None)
    for each in (engine, plain):
        shake(each)  # in place, as an optimizer
    after = states(engine, "actor", tokens, None)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, states(plain, "actor", tokens, None), **NEAR)
    assert [made.num_captured for made in captures] == [len(BUCKETS)] * 2


def test_a_step_writes_the_same_memory_every_time(make_case: Callable[..., Case], captures: list[Captures]) -> None:
    engine = Engine(make_case(engine__backend="torch"))
    decoder = engine.trunks["hydra"].decoder("actor", WHOLE, Observer())
    tokens = torch.ones(2, WHOLE, dtype=torch.int64)
    decoder.advance(tokens[:, :PROMPT], None)
    places = set()
    for t in range(PROMPT, WHOLE):
        out = decoder.advance(tokens[:, t : t + 1], None)
        caches = [cache.keys for cache in decoder._caches]  # type: ignore[attr-defined]
        places.add(tuple(tensor.data_ptr() for tensor in (out, *caches)))
    assert len(places) == 1


def test_skipped_positions_need_no_step(make_case: Callable[..., Case], captures: list[Captures]) -> None:
    engine = Engine(make_case(engine__backend="torch"))
    decoder = engine.trunks["hydra"].decoder("actor", WHOLE, Observer())
    tokens = torch.ones(2, WHOLE, dtype=torch.int64)
    captures.clear()
    decoder.advance(tokens[:, :PROMPT], None)
    decoder.advance(tokens[:, :1], None)
    decoder.skip_to(WHOLE - 1)
    decoder.advance(tokens[:, :1], None)
    assert captures[0].num_captured == 2


def test_the_caches_of_a_generation_are_freed_without_a_collection(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "takes_graphs", lambda x, cuda_graphs: True)
    monkeypatch.setattr(decoding, "make_capture", lambda x, observer, is_required: run_eagerly)
    engine = Engine(make_case())
    gc.collect()
    gc.disable()
    try:
        decoder = engine.trunks["hydra"].decoder("actor", WHOLE, Observer())
        tokens = torch.ones(2, WHOLE, dtype=torch.int64)
        decoder.advance(tokens[:, :PROMPT], None)
        decoder.advance(tokens[:, :1], None)
        assert isinstance(decoder._steps, GraphDecodeSteps)  # type: ignore[attr-defined]
        alive = weakref.ref(decoder._caches[0])  # type: ignore[attr-defined]
        del decoder
        assert alive() is None
    finally:
        gc.enable()
