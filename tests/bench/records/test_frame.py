from __future__ import annotations

import copy
import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfbench.records.file import make_plan, make_record
from rlhfbench.records.frame import RANK_COLUMNS, ranks_frame, records_frame
from rlhfbench.records.schema import columns
from rlhfkernels.config.case import Case
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.table import METHODS
from rlhfkernels.observer import PARTS

CASE = Case(method="joined-hydra", model="tiny", prompt_len=24, completion_len=8, batch_size=2)
RECORD = {
    "schema": 2,
    "case": CASE.to_dict(),
    "outcome": "ok",
    "error": None,
    "memory": {
        "model_bytes": 150,
        "activation_bytes": 24,
        "rollout_bytes": 8,
        "total_bytes": 182,
        "persistent_model_bytes": 160,
        "peak_phase": "update_actor_critic",
        "parts": {part: 10 * place for place, part in enumerate(PARTS)},
        "phases": {"generate": {"total_bytes": 111, "parts": {}}, "update_actor_critic": {"total_bytes": 182}},
        "largest_tensor": {"bytes": 16, "shape": [2, 2], "op": "aten.mm.default"},
        "views": {
            "ledger_peak_bytes": 182,
            "allocator_peak_bytes": None,
            "allocator_reserved_bytes": None,
            "driver_peak_bytes": None,
            "host_peak_bytes": 5_000_000_000,
        },
    },
    "latency": {
        "inference_s_per_sample": 0.5,
        "update_s_per_sample": 0.25,
        "total_s_per_sample": 0.75,
        "sequences_per_sample": 2,
        "total_half_width_s_per_sample": 0.125,
        "total_block_s_per_sample": [0.7, None, 0.8],
        "phases": {"generate": {"mean_s": 1.0, "block_s": [0.9, None, 1.1]}, "optimize": {"mean_s": 0.5}},
        "blocks": [
            {"phases": {"generate": [1.0, 1.1]}, "ceilings": {"matmul_flops_per_s": 5e9, "copy_bytes_per_s": 1e9}},
            {"error": {"outcome": "oom"}},
            {"phases": {"generate": [1.0]}, "ceilings": {"matmul_flops_per_s": 6e9}},
        ],
        "stopped_because": "steady",
    },
    "work": {"phases": {"generate": {"flops": 7, "bytes": 9, "floor_s": 0.5}}, "floor_fraction": 0.125},
    "prompts": {"source": "random", "num_prompts": 2, "num_truncated": 0},
    "started_at": "2026-01-02T03:04:05Z",
    "wall_s": 9.5,
}


def test_the_frame_has_every_column_of_the_schema_with_its_dtype():
    frame = records_frame([RECORD])
    found = {name: str(dtype) for name, dtype in frame.dtypes.items()}
    phases = ("generate", "optimize", "update_actor_critic")
    dtypes = {name: field.dtype for name, field in columns(phases).items()}
    assert found == {name: "object" if dtype == "list" else dtype for name, dtype in dtypes.items()}


def test_a_record_becomes_a_row():
    row = records_frame([RECORD]).iloc[0].to_dict()
    expected = {
        "case_id": CASE.id,
        "method": "joined-hydra",
        "method_title": "J-Hydra-PPO",
        "method_order": 3,
        "seq_len": 32,
        "prompt_len": 24,
        "lora_rank": 16,
        "options": "",
        "outcome": "ok",
        "model_bytes": 150,
        "total_bytes": 182,
        "persistent_model_bytes": 160,
        "largest_tensor_bytes": 16,
        "gradients_part_bytes": 30,
        "temporary_part_bytes": 100,
        "peak_phase": "update_actor_critic",
        "host_peak_bytes": 5_000_000_000,
        "process_peak_bytes": 5_000_000_000,
        "update_s_per_sample": 0.25,
        "total_s_per_sequence": 0.375,
        "num_timed_steps": 3,
        "stopped_because": "steady",
        "floor_fraction": 0.125,
        "num_prompts_truncated": 0,
        "generate_phase_peak_bytes": 111,
        "update_actor_critic_phase_peak_bytes": 182,
        "total_half_width_s_per_sample": 0.125,
        "total_block_s_per_sample": [0.7, None, 0.8],
        "num_timed_blocks": 2,
        "generate_phase_s": 1.0,
        "generate_phase_block_s": [0.9, None, 1.1],
        "optimize_phase_s": 0.5,
        "generate_phase_flops": 7,
        "generate_phase_bytes": 9,
        "generate_phase_floor_s": 0.5,
        "matmul_flops_per_s": 6e9,
        "copy_bytes_per_s": 1e9,
        "wall_s": 9.5,
    }
    assert {name: row[name] for name in expected} == expected
    assert pd.isna(row["driver_peak_bytes"])
    assert pd.isna(row["error"])


@pytest.mark.parametrize("missing", [{}, {"memory": None, "latency": None, "work": None, "prompts": None}])
def test_numbers_that_were_not_measured_are_na(missing):
    record = make_record(
        CASE,
        outcome="oom",
        error={"kind": "OutOfMemoryError", "message": "full.", "phase": "score"},
        measured={},
        started_at="now",
        wall_s=1.0,
    )
    frame = records_frame([{**record, **missing}])
    assert frame.loc[0, ["error_kind", "error", "error_phase"]].tolist() == ["OutOfMemoryError", "full.", "score"]
    case = {"method_order", "prompt_len", "completion_len", "seq_len", "batch_size", "lora_rank", "seed", "wall_s"}
    case |= {"world_size", "global_batch_size"}
    numbers = [n for n, c in columns().items() if c.dtype != "string" and n not in {*case, "setting_order"}]
    assert len(numbers) > 20
    assert frame[numbers].isna().all(axis=None)


def test_predictions_have_columns_of_their_own():
    plan = make_plan({"model_bytes": 151, "activation_bytes": 25, "rollout_bytes": 8, "total_bytes": 184}, None)
    failed = make_plan(None, {"kind": "K", "message": "no fake of that.", "phase": "plan"})
    frame = records_frame([RECORD, {**RECORD, "plan": None}, {**RECORD, "plan": plan}, {**RECORD, "plan": failed}])
    assert frame["predicted_total_bytes"].fillna(-1).tolist() == [-1, -1, 184, -1]
    assert frame.loc[2, ["predicted_model_bytes", "predicted_activation_bytes", "total_bytes"]].tolist() == [
        151,
        25,
        182,
    ]
    assert frame["plan_error"].fillna("").tolist() == ["", "", "", "no fake of that."]


def test_phases_of_other_methods_are_na():
    other = copy.deepcopy(RECORD)
    other["latency"]["phases"] = {"train": {"mean_s": 2.0}}
    frame = records_frame([RECORD, other])
    assert frame["train_phase_s"].isna().tolist() == [True, False]
    assert frame["optimize_phase_s"].isna().tolist() == [False, True]


def test_no_records_give_an_empty_frame_with_all_columns():
    frame = records_frame([])
    assert len(frame) == 0
    assert list(columns()) == list(frame.columns)


def test_an_unknown_method_keeps_its_name():
    record = copy.deepcopy(RECORD)
    record["case"]["method"] = "retired"
    frame = records_frame([record])
    assert frame.loc[0, "method_title"] == "retired"
    assert pd.isna(frame.loc[0, "method_order"])


def test_methods_have_the_title_and_order_of_the_method_table():
    cases = [Case(method=name, model="tiny", prompt_len=4, completion_len=4, batch_size=1) for name in METHODS]
    frame = records_frame([{**RECORD, "case": case.to_dict()} for case in cases])
    assert frame["method_title"].tolist() == [method.title for method in METHODS.values()]
    assert frame["method_order"].tolist() == list(range(len(METHODS)))
    assert frame["family"].tolist() == [method.family for method in METHODS.values()]
    assert frame.set_index("method")["loads"][["full", "joined-hydra", "dpo-lora"]].tolist() == [
        "4 models",
        "1 model, 1 LoRA set",
        "1 model, 1 LoRA set",
    ]


def test_phases_stand_in_the_order_of_every_record():
    """A method's own phase stands between those that it runs between, whichever record comes first."""
    runs = (["generate", "score", "update_actor", "optimize"], ["generate", "score", "update_actor_critic", "optimize"])
    for order in (runs, runs[::-1]):
        records = [copy.deepcopy(RECORD) for _ in order]
        for record, phases in zip(records, order, strict=True):
            record["memory"]["phases"] = {}
            record["latency"]["phases"] = {phase: {"median_s": 1.0} for phase in phases}
        found = [name.removesuffix("_phase_s") for name in records_frame(records) if name.endswith("_phase_s")]
        for phases in order:
            assert [phase for phase in found if phase in phases] == phases


def with_options(**options):
    """``RECORD`` with other options, by their dotted names."""
    record = copy.deepcopy(RECORD)
    for name, value in options.items():
        group, _, field = name.partition(".")
        record["case"]["options"].setdefault(group, {})[field] = value
    return record


PAPER = SETTINGS["paper"]["options"]


@pytest.mark.parametrize(
    ("changed", "setting", "options"),
    [
        ({}, "modern", ""),
        ({"ppo.kl_coef": 0.5}, "modern", "ppo.kl_coef=0.5"),
        (PAPER, "paper", ""),
        ({**PAPER, "ppo.kl_coef": 0.5}, "paper", "ppo.kl_coef=0.5"),
        ({"engine.attn_implementation": "eager"}, "custom", "engine.attn_implementation=eager"),
        ({"other.of_a_newer_version": 3}, "modern", "other.of_a_newer_version=3"),
        (
            {"engine.attn_implementation": "eager", "ppo.kl_coef": 0.5},
            "custom",
            "engine.attn_implementation=eager, ppo.kl_coef=0.5",
        ),
    ],
)
def test_the_setting_follows_from_the_options_and_hides_those_it_sets(changed, setting, options):
    row = records_frame([with_options(**changed)]).iloc[0]
    assert (row["setting"], row["options"]) == (setting, options)
    assert (
        row["setting_order"] == list(SETTINGS).index(setting) if setting in SETTINGS else pd.isna(row["setting_order"])
    )


def test_a_comma_in_the_value_of_an_option_does_not_divide_it():
    row = records_frame([with_options(**{"lora.target_modules": "q_proj, v_proj", "ppo.kl_coef": 0.5})]).iloc[0]
    assert row["options"].split(", ") == ["lora.target_modules=q_proj,v_proj", "ppo.kl_coef=0.5"]


def test_missing_options_count_as_defaults():
    record = copy.deepcopy(RECORD)
    del record["case"]["options"]["engine"]["cache_implementation"]
    assert records_frame([record]).loc[0, "setting"] == "modern"
    del record["case"]["options"]
    assert records_frame([record]).loc[0, "setting"] == "modern"
    assert pd.isna(records_frame([record]).loc[0, "lora_rank"])


def test_an_absent_part_is_na():
    record = copy.deepcopy(RECORD)
    del record["memory"]["parts"]["kv_cache"]
    row = records_frame([record]).iloc[0]
    assert pd.isna(row["kv_cache_part_bytes"])
    assert [name for name in row.index if name.endswith("_part_bytes")] == [f"{part}_part_bytes" for part in PARTS]


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(0, 2**62)), st.one_of(st.none(), st.floats(1e-9, 1e9))),
        min_size=1,
        max_size=5,
    )
)
def test_numbers_come_through_to_the_last_bit(rows):
    records = []
    for num_bytes, seconds in rows:
        record = copy.deepcopy(RECORD)
        record["memory"]["model_bytes"], record["latency"]["total_s_per_sample"] = num_bytes, seconds
        records.append(json.loads(json.dumps(record)))
    frame = records_frame(records)
    assert [None if pd.isna(x) else x for x in frame["model_bytes"]] == [row[0] for row in rows]
    assert [None if pd.isna(x) else x for x in frame["total_s_per_sample"]] == [row[1] for row in rows]


@pytest.mark.parametrize(("device", "view"), [("cpu", "host"), ("cuda", "driver"), ("cuda:1", "driver")])
def test_the_process_is_what_holds_the_memory_of_its_device(device, view):
    views = {"host_peak_bytes": 3, "driver_peak_bytes": 4}
    record = {**RECORD, "case": {**RECORD["case"], "device": device}, "memory": {"views": views}}
    assert records_frame([record])["process_peak_bytes"].tolist() == [views[f"{view}_peak_bytes"]]


RANK = {
    "rank": 1,
    "host": "one",
    "device": "cpu",
    "total_bytes": 7,
    "parts": {"base": 5, "rollout": 2},
    "phases": {
        "generate": {"communication_step_s": 1.0, "waiting_s": 0.25},
        "optimize": {"communication_step_s": 0.5, "waiting_s": 0.0},
    },
}


def test_a_row_for_each_rank():
    on_cuda = {**RANK, "phases": {"generate": {"communication_step_s": 1.0, "waiting_s": None}}}
    frame = ranks_frame([RECORD, {**RECORD, "world": {"size": 2, "ranks": [RANK, on_cuda]}}])
    assert list(frame.columns) == list(RANK_COLUMNS)
    assert frame["case_id"].tolist() == [CASE.id] * 2
    assert frame[["rank", "host", "total_bytes", "base_part_bytes"]].to_numpy().tolist() == [[1, "one", 7, 5]] * 2
    assert frame["communication_step_s"].tolist() == [1.5, 1.0]
    assert frame["waiting_s"].isna().tolist() == [False, True]
    assert frame["waiting_s"][0] == 0.25


@pytest.mark.parametrize("ranks", [None, 3, [], [None], ["one"], [{"parts": 3, "phases": [1]}], [{"rank": "first"}]])
def test_ranks_of_any_content_are_read(ranks):
    frame = ranks_frame([{**RECORD, "world": {"ranks": ranks}}])
    assert list(frame.columns) == list(RANK_COLUMNS)
    assert frame["rank"].isna().all()
