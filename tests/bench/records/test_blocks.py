"""Values and intervals that follow from the blocks of a record."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics

import pytest

from rlhfbench.errors import RecordsError
from rlhfbench.measure.statistic import half_width
from rlhfbench.records.blocks import block_values, step_values, summarize, wrong_block
from rlhfbench.records.file import RecordsFile, make_record, read_records
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=4)
KINDS = {"think": "inference", "learn": "update", "step": "update", "fetch": "prepare"}


def block(*steps, share=0.0, floors=(1.0, 2.0, 0.0, 0.0), **changes):
    """A block of steps, each (think, learn) seconds; ``step`` takes 1 s and ``fetch`` 100 s."""
    return {
        "phases": {
            "think": [a for a, _ in steps],
            "learn": [b for _, b in steps],
            "step": [1.0] * len(steps),
            "fetch": [100.0] * len(steps),
        },
        "stopped_because": "steady",
        "interference": {"other_cpu_share": share},
        "floors_s": dict(zip(KINDS, floors, strict=True)),
        "error": None,
        **changes,
    }


def record(*blocks, case=CASE):
    measured = {
        "latency": {"phases": {name: {"kind": kind} for name, kind in KINDS.items()}, "num_blocks": len(blocks)},
        "work": {"phases": {name: {"flops": 1, "bytes": 1} for name in KINDS}},
    }
    made = make_record(case, outcome="ok", error=None, measured=measured, started_at="2026-01-01", wall_s=1.0)
    made["latency"]["blocks"] = list(blocks)
    return summarize(made)


def test_seconds_per_sample_divide_by_the_samples_of_all_ranks():
    options = Options.of({"parallel.strategy": "ddp", "parallel.world_size": 3})
    alone, ranked = (
        record(block((1.0, 4.0))),
        record(block((1.0, 4.0)), case=dataclasses.replace(CASE, options=options)),
    )
    for kind in ("inference", "update", "total"):
        name = f"{kind}_s_per_sample"
        assert ranked["latency"][name] == pytest.approx(alone["latency"][name] / 3)
    assert ranked["latency"]["phases"] == alone["latency"]["phases"]  # a phase is of a step
    (values,), (of_step,) = block_values(ranked), step_values(ranked, ranked["latency"]["blocks"][0])
    assert values == of_step
    assert values["total"] == pytest.approx(ranked["latency"]["total_s_per_sample"])


def test_latency_is_the_mean_of_the_blocks_midmeans_and_adds_up():
    made = record(block((1.0, 4.0), (2.0, 4.0)), block((3.0, 6.0)))
    latency = made["latency"]
    assert latency["phases"]["think"] == {
        "kind": "inference", "mean_s": 2.25, "half_width_s": pytest.approx(half_width([1.5, 3.0])),
        "block_s": [1.5, 3.0],
    }  # fmt: skip
    assert latency["inference_s_per_sample"] == 2.25 / 4
    assert latency["update_s_per_sample"] == (5.0 + 1.0) / 4
    assert latency["total_s_per_sample"] == (2.25 + 6.0) / 4  # a phase of another kind is no part of the step
    assert latency["total_block_s_per_sample"] == [6.5 / 4, 10.0 / 4]
    assert latency["total_half_width_s_per_sample"] == pytest.approx(half_width([6.5 / 4, 10.0 / 4]))
    assert latency["stopped_because"] == "steady"


def test_a_phase_with_the_name_of_a_kind_leaves_the_sum_of_the_kind():
    """DPO and SFT have the phases update and optimize, both of the kind update."""
    made = record(block((1.0, 4.0)))
    made["latency"]["phases"] = {
        "think": {"kind": "inference"},
        "update": {"kind": "update"},
        "step": {"kind": "update"},
    }
    made["latency"]["blocks"][0]["phases"] = {"think": [1.0], "update": [4.0], "step": [1.0]}
    (values,) = block_values(made)
    assert values == {
        "total": 6.0 / 4, "inference": 1.0 / 4, "update": 5.0 / 4, "think": 1.0 / 4, "phase update": 4.0 / 4,
        "step": 1.0 / 4,
    }  # fmt: skip


def test_one_block_has_no_interval():
    assert record(block((1.0, 4.0)))["latency"]["total_half_width_s_per_sample"] is None


def test_a_kind_without_a_phase_is_null():
    made = record(block((1.0, 4.0)))
    for phase in made["latency"]["phases"].values():
        phase["kind"] = "update"
    latency = summarize(made)["latency"]
    assert [latency[f"inference_{key}_per_sample"] for key in ("s", "half_width_s", "block_s")] == [None] * 3


def test_disturbed_blocks_are_set_aside_where_three_others_are_left():
    quiet = [block((second, 4.0)) for second in (1.0, 1.1, 1.2)]
    loud = block((9.0, 4.0), share=0.4, stopped_because="budget")
    latency = record(quiet[0], loud, *quiet[1:])["latency"]
    assert latency["phases"]["think"]["block_s"] == [1.0, None, 1.1, 1.2]
    assert latency["phases"]["think"]["mean_s"] == pytest.approx(1.1)
    assert (latency["num_disturbed_blocks"], latency["num_counted_blocks"]) == (1, 3)
    assert latency["disturbed_by"] == "other processes used 40% of the CPUs"
    assert latency["stopped_because"] == "steady"
    few = record(quiet[0], loud, quiet[1])["latency"]
    assert few["phases"]["think"]["block_s"] == [1.0, 9.0, 1.1]
    assert (few["num_disturbed_blocks"], few["num_counted_blocks"]) == (1, 3)


def test_a_record_says_the_least_of_its_blocks():
    """The least sure reason to stop, and what disturbed the most disturbed block, whichever block has it."""
    sure, unsure = block((1.0, 4.0), stopped_because="precise"), block((1.0, 4.0), stopped_because="budget")
    for blocks in ((sure, unsure), (unsure, sure)):
        assert record(*blocks)["latency"]["stopped_because"] == "budget"
    shares = [block((1.0, 4.0), share=share) for share in (0.2, 0.4, 0.3)]
    assert record(*shares)["latency"]["disturbed_by"] == "other processes used 40% of the CPUs"


def test_setting_blocks_aside_reads_no_times():
    """The same blocks are set aside whatever their times are."""
    for seconds in ((1.0, 9.0, 1.0, 1.0), (9.0, 1.0, 9.0, 9.0)):
        blocks = [block((s, 4.0), share=0.4 if i == 1 else 0.0) for i, s in enumerate(seconds)]
        assert record(*blocks)["latency"]["phases"]["think"]["block_s"][1] is None


def test_the_highest_ceiling_of_any_block_makes_the_floor():
    made = record(block((1.0, 4.0), floors=(1.0, 2.0, 0.0, 0.0)), block((1.0, 4.0), floors=(0.5, 3.0, 0.0, 0.0)))
    assert {name: phase["floor_s"] for name, phase in made["work"]["phases"].items()} == {
        "think": 0.5, "learn": 2.0, "step": 0.0, "fetch": 0.0,
    }  # fmt: skip
    assert made["work"]["floor_fraction"] == pytest.approx(2.5 / 106)


def test_a_floor_is_at_the_highest_rates_though_no_block_has_them_all():
    rates = ("matmul_flops_per_s", "copy_bytes_per_s", "read_bytes_per_s")
    first, second = (dict(zip(rates, values, strict=True)) for values in ((100.0, 10.0, 10.0), (80.0, 12.0, 12.0)))
    made = record(
        block((1.0, 4.0), floors=(1.1,) * 4, ceilings=first), block((1.0, 4.0), floors=(1.25,) * 4, ceilings=second)
    )
    made["work"] = {"phases": {name: {"flops": 100, "bytes": 11, "written_bytes": 0} for name in KINDS}}
    work = summarize(made)["work"]
    assert {phase["floor_s"] for phase in work["phases"].values()} == {1.0}
    assert work["floor_fraction"] == pytest.approx(4.0 / 106)
    for ceilings in (first, second):
        del ceilings["read_bytes_per_s"]  # as in a record of an earlier version
    assert {phase["floor_s"] for phase in summarize(made)["work"]["phases"].values()} == {1.1}


def test_a_ceiling_of_a_disturbed_block_counts_too():
    """Other load lowers a measured rate and never raises it: the highest is the machine's, whichever block has it."""
    quiet = [block((1.0, 4.0)) for _ in range(3)]
    made = record(*quiet, block((9.0, 4.0), share=0.4, floors=(0.5, 2.0, 0.0, 0.0)))
    assert made["latency"]["num_disturbed_blocks"] == 1
    assert made["work"]["phases"]["think"]["floor_s"] == 0.5


def test_preparing_is_the_mean_of_the_blocks_and_no_part_of_the_step():
    without = record(block((1.0, 4.0)), block((3.0, 6.0)))
    made = record(block((1.0, 4.0), prepare_s_per_sample=1.0), block((3.0, 6.0), prepare_s_per_sample=2.0))
    assert made["latency"]["prepare_s_per_sample"] == 1.5
    assert without["latency"]["prepare_s_per_sample"] is None
    assert made["latency"]["total_s_per_sample"] == without["latency"]["total_s_per_sample"]
    floors = {name: {"flops": 1, "bytes": 1} for name in (*KINDS, "prepare")}
    blocks = [{**each, "floors_s": {**each["floors_s"], "prepare": 50.0}} for each in made["latency"]["blocks"]]
    more = {**made, "work": {"phases": floors}, "latency": {**made["latency"], "blocks": blocks}}
    assert summarize(more)["work"]["floor_fraction"] == made["work"]["floor_fraction"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"phases": {"think": [1.0]}}, "it must have the phases of its record"),
        ({"phases": {**block((1.0, 2.0))["phases"], "think": [1.0, 2.0]}}, "as many as other phases have"),
        ({"phases": {name: [] for name in KINDS}}, "it must be a list of seconds"),
        ({"phases": {name: [-1.0] for name in KINDS}}, "it must be a list of seconds"),
        ({"phases": {name: [1e12] for name in KINDS}}, "it must be a list of seconds"),
        ({"stopped_because": "bored"}, "must be one of precise, steady, budget"),
        ({"interference": {"other_cpu_share": "much"}}, "interference.other_cpu_share is 'much'"),
        ({"floors_s": {"think": 1.0}}, "floors_s.learn is missing"),
        ({"prepare_s_per_sample": "long"}, "prepare_s_per_sample is 'long': it must be a number of seconds"),
        ({"prepare_s_per_sample": 0.5}, None),
        ({"floors_s": 3}, "floors_s is 3: it must be an object"),
        ({}, None),
        ({"error": {"outcome": "oom"}, "phases": None}, None),
    ],
)
def test_a_wrong_block_is_named(change, says):
    found = wrong_block({**block((1.0, 2.0)), **change}, KINDS)
    assert found is None if says is None else says in found


def test_later_blocks_are_added_to_the_newest_record_of_their_case(tmp_path):
    made = {**record(block((1.0, 4.0))), "run": {"id": "r", "segment": 0, "host": "h"}}
    with RecordsFile(tmp_path) as file:
        file.append(made)
        file.append_block(made["case"]["id"], block((2.0, 4.0)))
        file.append(made)  # tried again: its earlier blocks go
        file.append_block(made["case"]["id"], block((3.0, 4.0)))
        assert read_records(tmp_path) == file.records
    (found,) = read_records(tmp_path)
    assert found["latency"]["phases"]["think"]["block_s"] == [1.0, 3.0]
    assert found["latency"]["total_s_per_sample"] == statistics.fmean([6.0, 8.0]) / 4
    assert math.isfinite(found["latency"]["total_half_width_s_per_sample"])


def test_a_block_of_other_phases_is_one_sentence(tmp_path):
    made = {**record(block((1.0, 4.0))), "run": {"id": "r", "segment": 0, "host": "h"}}
    with RecordsFile(tmp_path) as file:
        file.append(made)
        other = {**block((1.0, 4.0)), "phases": {"think": [1.0]}, "floors_s": None}
        with pytest.raises(RecordsError, match="has other phases than its record"):
            file.append_block(made["case"]["id"], other)


def test_a_block_of_a_record_without_phases_is_one_sentence(tmp_path):
    made = {**record(block((1.0, 4.0))), "run": {"id": "r", "segment": 0, "host": "h"}}
    later = {"schema": made["schema"], "block_of": made["case"]["id"], "run": made["run"], "block": block((2.0, 4.0))}
    made["latency"] = {**made["latency"], "phases": None, "blocks": None}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in (made, later)))
    with pytest.raises(RecordsError) as error:
        read_records(tmp_path)
    case_id = made["case"]["id"]
    assert str(error.value) == f"records file '{path}': a block of case {case_id} has other phases than its record."


@pytest.mark.parametrize("num_rows", [None, 0])
def test_a_timed_record_without_data_rows_is_one_sentence(tmp_path, num_rows):
    made = record(block((1.0, 4.0)))
    made["case"]["batch_size"] = num_rows
    (tmp_path / "records.jsonl").write_text(json.dumps(made) + "\n")
    with pytest.raises(RecordsError, match=r"case\.batch_size is .*: it must be an integer of at least 1 in a timed"):
        read_records(tmp_path)
