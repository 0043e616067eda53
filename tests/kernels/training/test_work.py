from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhfkernels import METHODS, Case, Observer, Options, build_step, phase_work
from rlhfkernels.data.batch import Batch
from rlhfkernels.parallel.world import World
from rlhfkernels.training.roofline import Work
from rlhfkernels.training.sizes import StepSizes
from rlhfkernels.training.step import TrainingStep


class FlopObserver(Observer):
    """Counts what torch dispatches in each phase: an account that knows nothing of role tables."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    def enter_phase(self, name: str) -> None:
        self.mode = FlopCounterMode(display=False)
        self.mode.__enter__()

    def exit_phase(self, name: str) -> None:
        self.mode.__exit__(None, None, None)
        self.flops[name] = self.flops.get(name, 0) + self.mode.get_total_flops()


# Llama of hidden 32 with 4 query and 2 key-value heads of 8 and 64 between, 2 layers: query and output 32x32, key and
# value 16x32, three of 64x32. Its adapters of rank 3 are on all seven.
CHANNELS, NUM_LAYERS, LENGTH = 32, 2, 16
WEIGHTS, KEYS_AND_VALUES = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32, 2 * 16 * 32
ADAPTER = 3 * (2 * 64 + 2 * 48 + 3 * 96)
# Of query, key and value together, in the base and in the adapter's part that reads the same input.
INPUTS, ADAPTER_INPUTS = 32 * (32 + 2 * 16), 3 * 3 * 32
# The hidden states that log-probabilities and values are read from, of 9 + 7 tokens.
PREDICTING = (8, 15)


def pass_surplus(read: tuple[int, int], adapted: bool, base_products: int = 1, adapter_products: int = 1) -> int:
    """FLOPs that the plain engine does beyond ``phase_work`` for one sequence of 9 + 7 tokens.

    Attention is eager: the whole square, of all positions. Positions behind the last that a head reads run too, and so
    do outputs of the last layer before the first.

    Args:
        read: the first position that a head reads, and the one behind the last.
        adapted: an adapter set is on.
        base_products: matmuls with a weight of the base.
        adapter_products: with one of the adapter, and attention's.
    """
    start, stop = read
    products = base_products * WEIGHTS + adapter_products * ADAPTER * adapted
    unread = products - base_products * KEYS_AND_VALUES
    attention = 4 * CHANNELS * NUM_LAYERS * LENGTH**2 - 2 * CHANNELS * (NUM_LAYERS * stop**2 - start**2)
    found = 2 * (products * NUM_LAYERS * (LENGTH - stop) + unread * start) + adapter_products * attention
    if adapter_products == 3 and base_products == 2:
        # Autograd takes no gradient of frozen embeddings; ``phase_work`` counts the part of it through adapters.
        found -= 2 * (INPUTS * (LENGTH - stop) + ADAPTER_INPUTS * LENGTH)
    return found


def surplus(step: TrainingStep, phase: str) -> int:
    """FLOPs that the plain engine does beyond ``phase_work`` in a phase."""
    method, num_sequences = step.engine.method, 4 * step.sequences_per_row
    if phase == "generate":  # 8 positions of the prompt are unread; the last token is never run
        adapted = method.roles[method.generate.role].adapter is not None
        square = 4 * CHANNELS * NUM_LAYERS * (9**2 + sum(range(10, 16)))
        causal = 2 * CHANNELS * (NUM_LAYERS * 15**2 - 8**2)
        unread = WEIGHTS - KEYS_AND_VALUES + ADAPTER * adapted
        return num_sequences * (2 * unread * 8 + square - causal)
    if phase == "score":
        quantities = [[stage.quantity for stage in p.stages] for p in method.score_passes]
        reads = [(15 if set(names) == {"last_scalar"} else 8, 15 + ("last_scalar" in names)) for names in quantities]
        adapted = [p.weights.adapter is not None for p in method.score_passes]
        return num_sequences * sum(map(pass_surplus, reads, adapted))
    (p,) = next(found.passes for found in method.phases if found.name == phase)
    trains_base = any("base" in method.roles[name].trains for name in p.roles)
    return num_sequences * pass_surplus(PREDICTING, p.weights.adapter is not None, 3 if trains_base else 2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_those_that_torch_dispatches(make_case: Callable[..., Case], method: str) -> None:
    step = build_step(make_case(method, engine__attn_implementation="eager", prompt_len=9, completion_len=7))
    observer = FlopObserver()
    step.run(observer)
    for phase, work in phase_work(step).items():
        if phase == "optimize":
            continue
        wanted = observer.flops[phase] - surplus(step, phase)
        assert work.flops == pytest.approx(wanted, rel=1e-3)  # advantages are a matmul too


def test_bytes_of_generation_by_hand(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("full", "gpt_neox", batch_size=2, prompt_len=3, completion_len=2))
    # Hidden 32, intermediate 64, 2 layers: qkv 96x32, dense 32x32, two of 64x32, head 48x32, 8 bytes each.
    weights = (2 * (96 * 32 + 32 * 32 + 2 * 64 * 32) + 48 * 32) * 8
    a_position = 2 * 2 * 32 * 8 * 2
    # Two forwards read the weights; four positions are written; the second forward reads three.
    assert phase_work(step)["generate"].bytes == 2 * weights + a_position * (4 + 3)


def test_a_cache_of_one_head_is_read_as_such(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("full", "falcon", batch_size=2, prompt_len=3, completion_len=2))
    # Hidden 32, intermediate 128, 2 layers, 4 heads of 8 that share keys and values: qkv 48x32, dense 32x32.
    weights = (2 * (48 * 32 + 32 * 32 + 2 * 128 * 32) + 48 * 32) * 8
    a_position = 2 * 2 * 8 * 8 * 2
    assert phase_work(step)["generate"].bytes == 2 * weights + a_position * (4 + 3)


def test_a_generation_that_may_end_at_once_counts_one_token(make_case: Callable[..., Case]) -> None:
    size = {"batch_size": 2, "prompt_len": 3}
    ended = phase_work(build_step(make_case("full", completion_len=6, rollout__stop_token_id=5, **size)))
    whole, one = (phase_work(build_step(make_case("full", completion_len=num, **size))) for num in (6, 1))
    assert ended["generate"] == one["generate"]
    assert ended["score"] == whole["score"]


def visible_pairs(length: int, windows: list[int | None]) -> int:
    """Pairs of a query and a key that it sees, over all layers, counted one by one."""
    return sum(
        1
        for window in windows
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )


@pytest.mark.parametrize(
    ("architecture", "windows"),
    [
        ("mistral", [6, 6]),
        ("gemma3_text", [8, None]),
        ("stray-window llama", [None, None]),  # its configuration has a window that Llama does not read
        ("qwen2", [None, None]),
    ],
)
def test_a_sliding_window_hides_what_it_hides(
    make_case: Callable[..., Case], architecture: str, windows: list[int | None]
) -> None:
    size = {"prompt_len": 9, "completion_len": 27, "batch_size": 2}
    step = build_step(make_case("sft-lora", architecture, **size))
    config = step.engine.models["policy"].trunk.config
    # The same model with a window that hides nothing.
    config.sliding_window, window = 64, config.sliding_window
    whole = phase_work(step)
    config.sliding_window = window
    hidden = whole["update"].flops - phase_work(step)["update"].flops
    channels, length, unread = 32, 35, 8  # nothing reads the last token's state
    missing = [
        visible_pairs(t, [None, None]) - visible_pairs(t, windows)
        for t in (length, 0 if windows[-1] is None else unread)
    ]
    # Two matmuls, forward and twice backward, 2 FLOPs each; half of the square leaves half of the diagonal out.
    assert hidden == pytest.approx(3 * 2 * 2 * channels * 2 * (missing[0] - missing[1] / 2), rel=0.05)


def test_decoding_reads_no_more_of_the_cache_than_the_window(make_case: Callable[..., Case]) -> None:
    """Window 6, 2 layers, 2 key-value heads of 8: steps after 4, 5, 6 and 7 tokens read 4, 5, 5 and 5 positions."""
    work = phase_work(build_step(make_case("full", "mistral", batch_size=3, prompt_len=4, completion_len=5)))
    more = phase_work(build_step(make_case("full", "stray-window llama", batch_size=3, prompt_len=4, completion_len=5)))
    a_position = 2 * 2 * (2 * 8) * 8 * 3
    assert more["generate"].bytes - work["generate"].bytes == a_position * ((4 + 5 + 6 + 7) - (4 + 5 + 5 + 5))


def test_float32_adapters_on_a_narrow_base_move_no_master_copies(make_case: Callable[..., Case]) -> None:
    step = build_step(make_case("sft-lora", dtype="bfloat16", lora__dtype="float32"))
    num = sum(p.numel() for p in step.trained_parameters())
    assert all(p.dtype == torch.float32 for p in step.trained_parameters())
    counts = 2 * 4 * len(step.trained_parameters())  # of steps, a float32 scalar a weight, read and written
    # Weights and both moments read and written, gradients read, in 4 bytes each.
    assert phase_work(step)["optimize"].bytes == 4 * num * (2 + 2 * 2 + 1) + counts
    held = sum(t.nbytes for part, t in step.persistent_tensors() if part == "optimizer")
    assert held == 2 * 4 * num + counts // 2


def test_weights_with_a_master_copy_are_written_alone(make_case: Callable[..., Case]) -> None:
    """In bfloat16: 2 bytes of the gradient read, 2 of the weight written; masters in float32 are read and written."""
    steps = {
        name: build_step(make_case("sft", dtype="bfloat16", lora__dtype=None, optimizer__name=name))
        for name in ("adamw", "sgd")
    }
    num = sum(p.numel() for p in steps["sgd"].trained_parameters())
    work = {name: phase_work(step)["optimize"] for name, step in steps.items()}
    assert (work["sgd"].bytes, work["sgd"].flops) == ((2 + 2 + 2 * 4) * num, 5 * num)
    counts = 2 * 4 * len(steps["adamw"].trained_parameters())
    assert (work["adamw"].bytes, work["adamw"].flops) == ((2 + 2 + 3 * 2 * 4) * num + counts, 15 * num)


def test_a_reward_function_takes_no_forward_pass(make_case: Callable[..., Case]) -> None:
    def reward(batch: Batch) -> torch.Tensor:
        return torch.zeros(batch.num_sequences)

    assert phase_work(build_step(make_case("best-of-n"), reward_fn=reward))["score"] == Work(0, 0)
    step = build_step(make_case("full"))
    all_passes = phase_work(step)["score"]
    without = phase_work(build_step(make_case("full"), reward_fn=reward))["score"]
    assert all_passes.bytes - without.bytes == StepSizes.of(step).bases["reward"].matmul_bytes
    assert without.flops > 0


def test_a_smaller_reward_model_takes_its_own_work(
    make_case: Callable[..., Case], checkpoint: Callable[[str], str]
) -> None:
    size = {"prompt_len": 9, "completion_len": 7}
    same = phase_work(build_step(make_case("dynamic-lora", **size)))
    less = phase_work(build_step(make_case("dynamic-lora", rollout__reward_model=checkpoint("small-reward"), **size)))
    assert [less[phase] == same[phase] for phase in ("generate", "update_actor")] == [True, True]
    # Hidden 16, 1 layer: four of 16x16 and three of 24x16; rank 3 on each, 3 (in + out); 4 rows of 16 and 7 tokens.
    trunk, adapter = 4 * 16 * 16 + 3 * 24 * 16, 3 * (4 * 32 + 3 * 40)
    # Of its only layer the first 8 positions need keys and values alone, and no adapter by the account.
    # Nothing reads the state of the last, and the embeddings, inputs of three of 16x16, need no gradient.
    products = 2 * (2 * trunk + 3 * adapter) * 4 * 7 + 2 * 2 * (2 * 16 * 16) * 4 * 8 - 2 * 3 * 16 * 16 * 4 * 15
    attention, head = 3 * 2 * 16 * (15 * 15 - 8 * 8) * 4, 3 * 2 * 16 * 4 * 7
    assert less["update_critic"].flops == products + attention + head


def test_the_floor_is_the_larger_of_the_two_times() -> None:
    work = Work(flops=100, bytes=10)
    assert work.floor_s(flops_per_s=10, bytes_per_s=10) == 10
    assert work.floor_s(flops_per_s=1000, bytes_per_s=1) == 10


def test_work_scales_with_epochs_and_micro_batches(make_case: Callable[..., Case]) -> None:
    once = phase_work(build_step(make_case(batch_size=4)))["update_actor"]
    twice = phase_work(build_step(make_case(batch_size=4, ppo__num_ppo_epochs=2)))["update_actor"]
    split = phase_work(build_step(make_case(batch_size=4, engine__micro_batch_size=2)))["update_actor"]
    assert (twice.flops, twice.bytes) == (2 * once.flops, 2 * once.bytes)
    assert (split.flops, split.bytes) == (once.flops, 2 * once.bytes)
    assert torch.is_grad_enabled()


def test_scoring_reads_the_weights_for_each_micro_batch(make_case: Callable[..., Case]) -> None:
    once = phase_work(build_step(make_case(batch_size=4)))["score"]
    split = phase_work(build_step(make_case(batch_size=4, ppo__num_mini_batches=2)))["score"]
    assert (split.flops, split.bytes) == (once.flops, 2 * once.bytes)


@pytest.mark.parametrize(
    ("method", "option"),
    [("sft", {"sft__packing": True}), ("sft-lora", {"sft__packing": True}), ("dpo-lora", {"dpo__forward": "two-pass"})],
)
def test_operations_of_other_forms_are_those_that_torch_dispatches(
    make_case: Callable[..., Case], method: str, option: dict[str, object]
) -> None:
    size = {"prompt_len": 9, "completion_len": 7, "engine__attn_implementation": "eager"}
    step = build_step(make_case(method, **size, **option))
    observer = FlopObserver()
    step.run(observer)
    config, num_sequences = step.engine.models["policy"].trunk.config, 4 * step.sequences_per_row
    forward = 4 * config.hidden_size * config.num_hidden_layers * num_sequences * 16**2
    beyond = surplus(step, "update")
    if method == "dpo-lora":
        beyond += num_sequences * pass_surplus(PREDICTING, adapted=True)
    else:  # a dense mask over the whole row: four times the scores of four sequences
        beyond += 3 * (num_sequences - 1) * forward
    assert phase_work(step)["update"].flops == observer.flops["update"] - beyond


def test_two_passes_are_one_forward_more(make_case: Callable[..., Case]) -> None:
    joint, two = (phase_work(build_step(make_case("dpo-lora", dpo__forward=form))) for form in ("joint", "two-pass"))
    assert two["score"] == joint["score"]
    step = build_step(make_case("dpo-lora"))
    adapter = sum(p.numel() for p in step.trained_parameters())
    # The policy's forward is the reference's with the adapter on: 8 sequences of 11 tokens, of which nothing reads the
    # last one's state. Of the last layer of two the first 4 tokens need keys and values alone.
    adapted = 2 * 8 * (10 * adapter - 4 * adapter // 2)
    assert two["update"].flops - joint["update"].flops == joint["score"].flops + adapted
    # Weights are read for each graph and for the forward before: the trunk's twice a graph, its adapter's three times.
    assert two["update"].bytes == 2 * joint["update"].bytes + joint["score"].bytes + 8 * adapter


def test_packed_rows_are_counted_at_their_own_lengths(tmp_path: Path) -> None:
    rows = [("ab", "cdef"), ("abcdefgh", "b"), ("a", "bcdefghij")]
    size = {"model": "tiny", "dtype": "float32"}

    def work(name: str, prompt_len: int, completion_len: int, batch_size: int, rows: list[tuple[str, str]]) -> int:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
        options = Options.of({"data.demonstrations": str(path), "sft.packing": True})
        lengths = {"prompt_len": prompt_len, "completion_len": completion_len, "batch_size": batch_size}
        return phase_work(build_step(Case(method="sft", **size, **lengths, options=options)))["update"].flops

    together = work("all", 5, 6, 6, rows)
    cut = [(2, 4), (5, 1), (1, 6)]
    alone = [work(str(i), *lengths, 2, [row]) for i, (row, lengths) in enumerate(zip(rows, cut, strict=True))]
    assert together == sum(alone)


PARALLEL: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {},
    **{f"zero-{stage}": {"parallel__zero_stage": stage, "parallel__reduce_bucket_size": 3000} for stage in range(4)},
}


def works_of_a_rank(world: World, cases: list[Case]) -> list[tuple[dict[str, Work], int, int]]:
    """The work of each case, which a step does not change, and the bytes that its optimizers hold after the step.

    Also the bytes of the weights among these: in float32, DeepSpeed's stage 0 has the weights for masters.
    """
    found = []
    for case in cases:
        step = build_step(case, world=world)
        work = phase_work(step)
        step.run()
        assert phase_work(step) == work
        held = [tensor for optimizer in step.optimizers.values() for tensor in optimizer.tensors()]
        weights = {id(weight) for weight in step.trained_parameters()}
        of_weights = sum(tensor.nbytes for tensor in held if id(tensor) in weights)
        found.append((work, sum(tensor.nbytes for tensor in held), of_weights))
    return found


@pytest.mark.usefixtures("imported_deepspeed")
@pytest.mark.parametrize("name", PARALLEL)
def test_the_work_of_a_rank(make_case: Callable[..., Case], on_ranks: Any, name: str) -> None:
    """Phases over its own rows are those of one process; the ranks share what the optimizers do, or all do it."""
    strategy, options = name.split("-")[0].replace("zero", "deepspeed"), PARALLEL[name]
    parallel = {"parallel__strategy": strategy, "parallel__world_size": 2, **options}
    methods, fields = ("full", "hydra"), {"dtype": "float32", "engine__trunk": "plain"}
    found = on_ranks(2, works_of_a_rank, [make_case(method, **fields, **parallel) for method in methods])
    for method, *ranks in zip(methods, *found, strict=True):
        step = build_step(make_case(method, **fields))
        alone, weights = phase_work(step), sum(p.nbytes for p in step.trained_parameters())
        num_shares = 1 if name in ("ddp", "zero-0") else 2
        for work, held, of_weights in ranks:
            assert {**work, "optimize": None} == {**alone, "optimize": None}
            share = work["optimize"].flops * 4 // 15
            assert share == pytest.approx(weights / num_shares, rel=0.2)  # fsdp's rows need not divide evenly
            num_accesses = 3 if name in ("ddp", "fsdp", "zero-0") else 2  # ZeRO's masters are copies in float32 too
            assert work["optimize"].bytes == num_accesses * share + 2 * (held - of_weights)
        total = sum(work["optimize"].flops for work, *_ in ranks) * num_shares // 2
        assert total == pytest.approx(alone["optimize"].flops, rel=1e-3)  # padding
        if num_shares == 1:
            assert ranks[0][0]["optimize"] == alone["optimize"]
