from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rlhfreports.columns import as_one_machine
from rlhfreports.compare import compared, comparison_sentences, comparison_table, ratio_of_runs

Frames = Callable[..., pd.DataFrame]
GIB = 2**30


def of_blocks(*seconds: float, **more: object) -> dict[str, object]:
    return {"total_s_per_sample": float(np.mean(seconds)), "total_block_s_per_sample": list(seconds), **more}


def runs(make_frame: Frames, **rows: list[dict[str, object]]) -> pd.DataFrame:
    frames = [make_frame(*of_run).assign(run=pd.array([n] * len(of_run), dtype="string")) for n, of_run in rows.items()]
    return pd.concat(frames, ignore_index=True)


def test_the_interval_of_two_runs_is_welchs() -> None:
    above, below = [2.0, 2.2, 1.9, 2.1], [1.0, 1.3, 0.8]
    found = ratio_of_runs(of_blocks(*above), of_blocks(*below))
    expected = stats.ttest_ind(np.log(above), np.log(below), equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx(math.exp(np.mean(np.log(above)) - np.mean(np.log(below))))
    assert (found.low, found.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))


def test_one_block_has_no_interval_and_equal_blocks_an_interval_of_no_width() -> None:
    assert ratio_of_runs(of_blocks(2.0), of_blocks(1.0, 1.0)).low is None
    same = ratio_of_runs(of_blocks(2.0, 2.0), of_blocks(1.0, 1.0))
    assert (same.value, same.low, same.high) == pytest.approx((2.0, 2.0, 2.0))


def test_cases_are_matched_across_devices_and_failures_are_kept(make_frame: Frames) -> None:
    frame = runs(
        make_frame,
        cpu=[of_blocks(4.0, 4.1, device="cpu"), {"prompt_len": 64, "device": "cpu"}, {"prompt_len": 128}],
        gpu=[
            of_blocks(1.0, 1.1, device="cuda", model_bytes=2 * GIB, activation_bytes=0, rollout_bytes=0),
            {"prompt_len": 64, "device": "cuda", "outcome": "oom", "error": "no memory."},
        ],
    )
    found = compared(frame)
    assert found["other_outcome"].tolist() == ["ok", "oom"]
    assert found["speedup"][0] == pytest.approx(math.sqrt(4.0 * 4.1) / math.sqrt(1.1))
    assert found["memory_ratio"][0] == pytest.approx(2 / 1.5, rel=1e-4)
    assert math.isnan(found["speedup"][1])
    table = comparison_table(found)
    assert table.cells["other s"].tolist() == ["1.05", "OOM"]
    assert table.cells["speed-up"][1] == "–"


def test_an_axis_that_varies_within_a_run_must_be_the_same(make_frame: Frames) -> None:
    frame = runs(make_frame, a=[{"lora_rank": 8}, {"lora_rank": 16}], b=[{"lora_rank": 16}, {"lora_rank": 32}])
    assert len(compared(frame)) == 1


def test_an_option_that_all_cases_of_a_run_have_tells_no_cases_apart(make_frame: Frames) -> None:
    epochs = [f"ppo.num_ppo_epochs={num}" for num in (1, 2)]
    frame = runs(
        make_frame,
        before=[{"options": options} for options in epochs],
        after=[{"options": f"lora.target_modules=q_proj, {options}"} for options in epochs],
    )
    assert compared(frame)["size"].tolist() == [
        f"64 tokens, batch 1, {options}, – → lora.target_modules=q_proj" for options in epochs
    ]


def test_a_case_is_named_in_the_words_of_both_runs(make_frame: Frames) -> None:
    frame = runs(make_frame, small=[{"model": "tiny"}], large=[{"model": "llama-7b", "setting": "paper"}])
    (found,) = compared(frame).to_dict("records")
    assert (found["line"], found["size"]) == ("Hydra-PPO, modern → paper", "64 tokens, batch 1, tiny → llama-7b")
    assert found["case"] == "Hydra-PPO, modern → paper, 64 tokens, batch 1, tiny → llama-7b"


def test_cases_that_only_one_run_measured_are_counted(make_frame: Frames) -> None:
    measured = [of_blocks(1.0, 1.01, 0.99, prompt_len=length) for length in (32, 64, 128)]
    failed = [{"prompt_len": length, "outcome": outcome} for length, outcome in ((64, "oom"), (128, "timeout"))]
    for before, after, names in (
        (measured, [measured[0], *failed], ("before", "after")),
        ([measured[0], *failed], measured, ("after", "before")),
    ):
        frame = runs(make_frame, before=before, after=after)
        counts, *rest = comparison_sentences(frame, compared(frame))
        assert counts.startswith("Of 1 case that both have")
        assert rest == [
            f"2 cases were measured in {names[0]} and not in {names[1]}: OOM, TIMEOUT.",
            "after needs the same memory as before.",
        ]


def test_sentences_count_only_what_the_intervals_carry(make_frame: Frames) -> None:
    frame = runs(
        make_frame,
        before=[
            of_blocks(2.0, 2.01, 1.99),
            of_blocks(1.0, 3.0, 2.0, prompt_len=64),
            of_blocks(1.0, 1.01, 0.99, prompt_len=128),
            of_blocks(1.0, prompt_len=256),
        ],
        after=[
            of_blocks(1.0, 1.01, 0.99),
            of_blocks(1.5, 2.5, 1.0, prompt_len=64),
            of_blocks(2.0, 2.01, 1.99, prompt_len=128),
            of_blocks(0.5, prompt_len=256),
        ],
    )
    first, second = comparison_sentences(frame, compared(frame))
    assert first.startswith(
        "Of 4 cases that both have, after is faster than before in 1, slower in 1; in 1 the interval carries no "
        "difference; 1 had one block and so no interval. Speed-ups are from 0.50x to 2.00x"
    )
    assert second == "after needs the same memory as before."


def test_runs_without_a_common_case_say_so(make_frame: Frames) -> None:
    frame = runs(make_frame, a=[{"prompt_len": 8}], b=[{"prompt_len": 16}])
    found = compared(frame)
    assert found.empty
    assert comparison_sentences(frame, found) == ["b and a have no timed case in common."]
    assert comparison_table(found).cells.empty


def of_host(host: str | None, **more: object) -> dict[str, object]:
    return of_blocks(1.0, 1.01, 0.99, host=host, **more)


def test_times_of_two_machines_of_one_kind_are_refused_with_the_reason(make_frame: Frames) -> None:
    frame = runs(make_frame, before=[of_host("one")], after=[of_host("two")]).assign(hardware="AMD EPYC, 2 cores")
    found = compared(frame)
    assert found["machines"].tolist() == ["two, times not compared"]
    assert found["speedup"].isna().all()
    assert found["memory_ratio"].tolist() == [1.0]
    table = comparison_table(found)
    assert table.cells[["size", "machines", "speed-up", "memory"]].to_numpy().tolist() == [
        ["64 tokens, batch 1", "two, times not compared", "–", "1.000x"]
    ]
    assert comparison_sentences(frame, found) == [
        "1 case ran on one in before and on two in after, two machines, which are not known to differ in kind. Their "
        "times are not compared, as a difference could be either's. Are both names of one machine? Then --same-machine "
        "compares them.",
        "after needs the same memory as before.",
    ]


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"device": "cpu"}, {"device": "cuda"}),
        ({"device": "cuda", "hardware": "A100"}, {"device": "cuda:1", "hardware": "H200"}),
    ],
)
def test_machines_of_two_kinds_are_compared_as_such(
    make_frame: Frames, first: dict[str, str], other: dict[str, str]
) -> None:
    kinds = [first.pop("hardware", None), other.pop("hardware", None)]
    frame = runs(make_frame, before=[of_host("one", **first)], after=[of_host("two", **other)])
    frame = frame.assign(hardware=pd.array(kinds, dtype="string"))
    found = compared(frame)
    assert found["machines"].tolist() == ["two"]
    assert found["speedup"].tolist() == pytest.approx([1.0])
    assert comparison_table(found).num_text_columns == 5
    assert comparison_sentences(frame, found)[0] == (
        "1 case ran on one in before and on two in after, two machines, so their speed-ups are of the machines, with "
        "all else that differs between the runs."
    )


@pytest.mark.parametrize("host", ["one", None])
def test_a_cpu_and_a_gpu_of_one_host_are_two_devices(make_frame: Frames, host: str | None) -> None:
    frame = runs(make_frame, before=[of_host(host, device="cpu")], after=[of_host(host, device="cuda")])
    found = compared(frame)
    assert found["machines"].tolist() == ["two"]
    assert found["speedup"].tolist() == pytest.approx([1.0])
    assert comparison_sentences(frame, found)[0] == (
        "1 case ran on cpu in before and on cuda in after, two devices, so their speed-ups are of the devices, with "
        "all else that differs between the runs."
    )


def test_cases_of_a_cluster_are_matched_and_each_pair_has_its_machines(make_frame: Frames) -> None:
    frame = runs(
        make_frame,
        before=[of_host("one"), of_host("two", prompt_len=64), of_host(None, prompt_len=128)],
        after=[of_host("one"), of_host("one", prompt_len=64), of_host("one", prompt_len=128)],
    )
    found = compared(frame)
    assert found["machines"].tolist() == ["one", "two, times not compared", "one"]
    assert found["size"].tolist() == [f"{tokens} tokens, batch 1" for tokens in (64, 128, 256)]
    assert comparison_sentences(frame, found)[1].startswith("Of 2 cases that both have")


def test_hosts_that_are_said_to_be_one_machine_are_compared_and_it_is_said(make_frame: Frames) -> None:
    frame = runs(make_frame, before=[of_host("c1")], after=[of_host("c2")])
    frame = as_one_machine(frame, ["c1", "c2"])
    found = compared(frame)
    assert found["machines"].tolist() == ["one"]
    assert found["speedup"].tolist() == pytest.approx([1.0])
    note, counts, _ = comparison_sentences(frame, found)
    assert note.startswith("The hosts c1 = c2 count as one machine because --same-machine says so")
    assert counts.startswith("Of 1 case that both have")


def test_a_verdict_is_one_that_the_interval_carries(make_frame: Frames) -> None:
    slow, fast = (2.0, 2.01, 1.99), (1.0, 1.01, 0.99)
    frame = runs(
        make_frame,
        a=[of_blocks(*slow), of_blocks(*fast, prompt_len=64), of_blocks(1.0, 3.0, prompt_len=128), {"prompt_len": 256}],
        b=[of_blocks(*fast), of_blocks(*slow, prompt_len=64), of_blocks(1.1, 2.9, prompt_len=128), {"prompt_len": 256}],
    )
    assert comparison_table(compared(frame)).cells["verdict"].tolist() == ["faster", "slower", "open", "–"]


def test_few_of_many_intervals_beside_1_are_no_sign_of_a_difference(make_frame: Frames) -> None:
    same, slow = (1.0, 1.01, 0.99), (2.0, 2.01, 1.99)
    lengths = [16 * place for place in range(1, 21)]
    before = [of_blocks(*same, prompt_len=length) for length in lengths]

    def sentences(num_slow: int) -> list[str]:
        after = [of_blocks(*(slow if i < num_slow else same), prompt_len=n) for i, n in enumerate(lengths)]
        frame = runs(make_frame, before=before, after=after)
        return comparison_sentences(frame, compared(frame))

    # Of 20 intervals of 95 % at most 3 miss in 98 runs of 100, at most 2 in 92.
    by_chance = "Chance alone puts up to 3 of 20 intervals beside 1 where nothing differs."
    assert [by_chance in sentences(num_slow) for num_slow in (0, 1, 3, 4)] == [False, True, True, False]


def test_seconds_have_the_digits_that_their_interval_carries(make_frame: Frames) -> None:
    def texts(*half_widths: float | None) -> list[str]:
        first, other = ({"total_s_per_sample": 1.23456, "total_half_width_s_per_sample": w} for w in half_widths)
        table = comparison_table(compared(runs(make_frame, first=[first], other=[other])))
        return [str(table.cells[heading].iloc[0]) for heading in ("first s", "other s")]

    assert texts(0.4, 0.0003) == ["1.2", "1.2346"]
    assert texts(0.02, None) == ["1.23", "1.23"]


def test_seconds_measured_beside_other_load_are_marked_and_said(make_frame: Frames) -> None:
    counts = {"num_timed_blocks": 3, "num_counted_blocks": 3, "num_disturbed_blocks": 0, "disturbed_by": None}
    loud = {**counts, "num_disturbed_blocks": 2, "disturbed_by": "x used 40 %"}
    frame = runs(
        make_frame,
        before=[of_blocks(1.0, 1.01, 0.99, **counts), of_blocks(1.0, 1.01, 0.99, prompt_len=64, **counts)],
        after=[of_blocks(2.0, 2.01, 1.99, **loud), of_blocks(1.0, 1.01, 0.99, prompt_len=64, **counts)],
    )
    found = compared(frame)
    said = [sentence for sentence in comparison_sentences(frame, found) if sentence.startswith("!")]
    assert said == [
        "!: 1 of these cases was timed in after while something else used the machine, so a difference may come from "
        "it: x used 40 %."
    ]
    cells = comparison_table(found).cells
    assert [cell.endswith("!") for cell in [*cells["first s"], *cells["other s"]]] == [False, False, True, False]
