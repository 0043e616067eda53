from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from rlhfreports.answer import answer

Frames = Callable[..., pd.DataFrame]
GIB = 2**30


def timed(method: str, *seconds: float, batch_size: int = 1, total: int = GIB, **more: object) -> dict[str, object]:
    """A case whose blocks took ``seconds``."""
    mean = sum(seconds) / len(seconds)
    return {
        "method": method,
        "batch_size": batch_size,
        "model_bytes": total,
        "activation_bytes": 0,
        "rollout_bytes": 0,
        "total_s_per_sample": mean,
        "total_half_width_s_per_sample": 0.01 * mean,
        "total_block_s_per_sample": list(seconds),
        **more,
    }


def test_memory_is_compared_at_the_largest_case_that_the_baseline_has_too(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, total=10 * GIB),
        timed("hydra", 1.0, total=4 * GIB),
        timed("lora", 1.0, total=20 * GIB, batch_size=2),
        timed("hydra", 1.0, total=5 * GIB, batch_size=2),
        timed("hydra", 1.0, total=6 * GIB, batch_size=4),
    )
    expected = (
        "Hydra-PPO needs 75 % less memory than LoRA-PPO at the same batch (5.00 against 20.0 GiB, 64 tokens, batch 2)."
    )
    assert answer(frame)[0] == expected


def test_a_gain_is_claimed_where_its_interval_and_the_run_carry_it(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, 1.01, 0.99, total=10 * GIB),
        timed("hydra", 0.5, 0.505, 0.495, total=8 * GIB),
        timed("hydra", 0.4, 0.404, 0.396, total=10 * GIB, batch_size=2),
    )
    found = answer(frame)
    assert found[1] == (
        "Hydra-PPO is 2.500x (2.500 to 2.500) faster than LoRA-PPO at equal memory and 64 tokens (batch 2 against 1)."
    )
    assert found[2] == "This run tells apart differences above 1.4 %, by its intervals."


@pytest.mark.parametrize(
    ("hydra", "reason"),
    [((0.5, 1.5, 0.9), "the interval"), ((1.2, 1.3, 1.25), "slower"), ((0.99, 0.989, 0.991), "the resolution")],
)
def test_a_gain_that_intervals_or_the_run_do_not_carry_is_not_claimed(
    make_frame: Frames, hydra: tuple[float, ...], reason: str
) -> None:
    frame = make_frame(timed("lora", 1.0, 1.001, 0.999), timed("hydra", *hydra), timed("hydra", *hydra, batch_size=2))
    assert answer(frame)[1] == (
        "No method is faster than LoRA-PPO at equal memory and 64 tokens by more than this run can tell apart."
    ), reason


def test_the_difference_of_controls_is_a_bound_too(make_frame: Frames) -> None:
    rows = [timed("lora", 1.0, 1.0, 1.0), timed("hydra", 0.8, 0.8, 0.8), timed("hydra", 0.8, 0.8, 0.8, batch_size=2)]
    assert "is 1.25" in answer(make_frame(*rows))[1]
    control = timed("dynamic-lora", 1.5, 1.5, 1.5, same_work_as="lora")
    assert "No method is faster" in answer(make_frame(*rows, control))[1]


def test_one_block_cannot_tell(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, total_half_width_s_per_sample=None),
        timed("hydra", 0.1, total_half_width_s_per_sample=None),
        timed("hydra", 0.1, batch_size=2, total_half_width_s_per_sample=None),
    )
    found = answer(frame)
    assert "One block a case cannot tell" in found[1]
    assert found[2] == "Every case was timed in one block: how sure the times are is not known."


def test_one_method_says_what_it_needs(make_frame: Frames) -> None:
    assert answer(make_frame(timed("hydra", 1.0, 1.1)))[0] == "Hydra-PPO needs 1.00 GiB (64 tokens, batch 1)."


def test_methods_without_the_baseline_are_compared_with_the_one_that_needs_most(make_frame: Frames) -> None:
    frame = make_frame(timed("full", 1.0, total=4 * GIB), timed("hydra", 1.0, total=GIB))
    assert answer(frame)[0].startswith("Hydra-PPO needs 75 % less memory than PPO")


def test_families_are_not_compared(make_frame: Frames) -> None:
    frame = make_frame(timed("lora", 1.0, total=4 * GIB), timed("sft", 1.0, total=GIB, family="SFT"))
    assert "less memory" not in " ".join(answer(frame))


def test_a_run_without_measurements_says_so(make_frame: Frames) -> None:
    failed = ({"outcome": "oom"}, {"outcome": "oom", "method": "lora"}, {"outcome": "timeout"})
    counts = "No case was measured: 2 OOM, 1 TIMEOUT."
    assert answer(make_frame(*failed)) == [counts]
    with_reason = make_frame(failed[0], *({**row, "error": "out of memory."} for row in failed[1:]))
    assert answer(with_reason) == [counts, "The first says: out of memory."]
    assert answer(make_frame()) == ["This run has no records yet."]


def test_memory_alone_makes_no_claim_on_time(make_frame: Frames) -> None:
    none = {"total_s_per_sample": None, "inference_s_per_sample": None, "update_s_per_sample": None}
    found = answer(make_frame({"method": "lora", **none}, {"method": "hydra", "model_bytes": GIB // 2, **none}))
    assert "less memory" in found[0]
    assert found[1:] == ["No case has a time."]


def test_a_sentence_names_the_case_that_it_is_about(make_frame: Frames) -> None:
    rows = [
        timed(method, *(factor * s for s in (1.0, 1.01, 0.99)), total=size * GIB, batch_size=batch, setting=setting)
        for setting, factor in (("modern", 1.0), ("paper", 2.0))
        for method, size, batch in (("lora", 8, 1), ("hydra", 4, 1))
    ]
    rows += [timed("hydra", 0.2, 0.202, 0.198, total=5 * GIB, batch_size=2, setting="paper")]
    memory, time, _ = answer(make_frame(*rows))
    assert memory.endswith("(4.00 against 8.00 GiB, 64 tokens, batch 1, setting modern).")
    assert time.endswith("(batch 2 against 1, setting paper).")


def test_two_sizes_have_the_digits_that_tell_them_apart(make_frame: Frames) -> None:
    frame = make_frame(timed("lora", 1.0, total=1004 * GIB // 10), timed("hydra", 1.0, total=1003 * GIB // 10))
    assert "(100.3 against 100.4 GiB, " in answer(frame)[0]


def test_memory_is_compared_across_conditions(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, total=10 * GIB),
        timed("hydra", 1.0, total=4 * GIB),
        timed("hydra", 1.0, total=4 * GIB, batch_size=2),
    )
    frame = frame.assign(conditions=["the start", "resumption 1", "the start"], conditions_differ=["", "threads", ""])
    assert answer(frame)[0].startswith("Hydra-PPO needs 60 % less memory than LoRA-PPO")


def test_a_baseline_that_needs_least_is_compared_too(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, total=4 * GIB, batch_size=2),
        timed("full", 1.0, total=10 * GIB, batch_size=2),
        timed("lora", 1.0, total=4 * GIB),
        timed("hydra", 1.0, total=3 * GIB),
    )
    assert answer(frame)[0].startswith(
        "LoRA-PPO needs 60 % less memory than PPO at the same batch (4.00 against 10.0 GiB"
    )


def test_memory_is_compared_across_machines(make_frame: Frames) -> None:
    frame = make_frame(
        timed("lora", 1.0, total=10 * GIB, host="a"),
        timed("hydra", 1.0, total=4 * GIB, host="b"),
    )
    assert answer(frame)[0].startswith("Hydra-PPO needs 60 % less memory than LoRA-PPO")


def test_no_method_is_said_to_be_faster_only_of_those_that_were_compared(make_frame: Frames) -> None:
    rows = [timed(name, 1.0, 1.0, batch_size=size) for name in ("lora", "full") for size in (1, 4)]
    sentence = "method is faster than LoRA-PPO at equal memory and 64 tokens by more than this run can tell apart."
    assert answer(make_frame(*rows))[1] == f"No {sentence}"
    rows.append(timed("hydra", 0.5, 0.5, batch_size=4))
    assert answer(make_frame(*rows))[1] == f"Of PPO, no {sentence}"
