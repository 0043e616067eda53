import dataclasses
import json
import math
import resource

import pandas as pd
import pytest

from rlhfbench.errors import RecordsError, RunFolderError
from rlhfbench.records.file import RecordsFile, make_plan, make_record, read_records
from rlhfbench.records.frame import records_frame
from rlhfbench.records.schema import empty_record
from rlhfkernels.config.case import Case

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)


def record(outcome="ok", **measured):
    return make_record(CASE, outcome=outcome, error=None, measured=measured, started_at="2026-01-01", wall_s=1.5)


def append(folder, *records):
    with RecordsFile(folder) as file:
        for item in records:
            file.append(item)


def test_a_record_has_every_key_with_none_for_absent_values():
    made = record("oom")
    assert set(made) == {
        "schema", "case", "world", "outcome", "error", "memory", "latency", "work", "stats", "prompts", "engine",
        "attention", "kernels", "fast_paths", "plan", "run", "num_threads", "started_at", "wall_s",
    }  # fmt: skip
    assert made["schema"] == 2
    assert set(made["case"]) == {
        "id", "method", "model", "prompt_len", "completion_len", "batch_size", "device", "dtype", "seed", "options",
    }  # fmt: skip
    assert Case.from_dict(made["case"]) == CASE
    assert set(made["memory"]) == {
        "model_bytes", "activation_bytes", "rollout_bytes", "total_bytes", "persistent_model_bytes", "peak_phase",
        "parts", "phases", "largest_tensor", "views",
    }  # fmt: skip
    assert set(made["memory"]["views"]) == {
        "ledger_peak_bytes", "allocator_peak_bytes", "allocator_reserved_bytes", "driver_peak_bytes",
        "host_peak_bytes", "allocator_rest_bytes", "workspace_bytes",
    }  # fmt: skip
    assert set(made["latency"]) == {
        "inference_s_per_sample", "update_s_per_sample", "total_s_per_sample", "prepare_s_per_sample",
        "sequences_per_sample", "phases",
        "inference_half_width_s_per_sample", "update_half_width_s_per_sample", "total_half_width_s_per_sample",
        "inference_block_s_per_sample", "update_block_s_per_sample", "total_block_s_per_sample",
        "num_blocks", "num_counted_blocks", "num_disturbed_blocks", "disturbed_by", "blocks", "stopped_because",
    }  # fmt: skip
    assert set(made["work"]) == {"phases", "floor_fraction"}
    leaves = [v for part in ("memory", "latency", "work") for v in made[part].values()]
    assert all(v is None or v == {} for v in leaves if v is not made["memory"]["views"])
    assert set(made["memory"]["views"].values()) == {None}
    assert (made["world"], made["stats"], made["prompts"], made["plan"]) == (None, {}, None, None)


def test_a_plan_has_the_memory_keys_that_can_be_predicted():
    assert set(make_plan({"total_bytes": 7, "views": {"ledger_peak_bytes": 7}, "largest_tensor": {}}, None)) == {
        "model_bytes", "activation_bytes", "rollout_bytes", "total_bytes", "persistent_model_bytes", "peak_phase",
        "parts", "phases", "error",
    }  # fmt: skip


def test_measured_values_are_kept_and_missing_keys_filled():
    memory = {"total_bytes": 7, "views": {"ledger_peak_bytes": 9}, "more": 1}
    made = record(memory=memory, prompts={"num_prompts": 2}, stats={"policy_loss": 0.5}, timeline={"events": []})
    assert made["memory"]["total_bytes"] == 7
    assert made["memory"]["more"] == 1
    assert made["memory"]["model_bytes"] is None
    assert made["memory"]["views"]["ledger_peak_bytes"] == 9
    assert made["memory"]["views"]["driver_peak_bytes"] is None
    assert made["prompts"] == {"num_prompts": 2}
    assert made["stats"] == {"policy_loss": 0.5}
    assert "timeline" not in made


@pytest.mark.parametrize(("method", "num_sequences"), [("hydra", 1), ("sft", 1), ("dpo", 2), ("best-of-n", 4)])
def test_a_measured_record_has_the_sequences_of_a_sample(method, num_sequences):
    case = dataclasses.replace(CASE, method=method)
    measured = {"latency": {"total_s_per_sample": 1.0}}
    made = make_record(case, outcome="ok", error=None, measured=measured, started_at="", wall_s=1.0)
    assert made["latency"]["sequences_per_sample"] == num_sequences
    row = records_frame([made]).iloc[0]
    assert (row["sequences_per_sample"], row["total_s_per_sequence"]) == (num_sequences, 1 / num_sequences)
    assert pd.isna(row["update_s_per_sequence"])


def test_records_do_not_share_their_empty_objects():
    first, second = record(), record()
    first["memory"]["views"]["host_peak_bytes"] = 1
    first["memory"]["parts"]["base"] = 1
    assert second["memory"]["views"]["host_peak_bytes"] is None
    assert second["memory"]["parts"] == {}


def test_appended_records_are_read_back(tmp_path):
    append(tmp_path, record(), record("oom"))
    append(tmp_path, record("timeout"))
    assert [r["outcome"] for r in read_records(tmp_path)] == ["ok", "oom", "timeout"]
    assert read_records(tmp_path / "records.jsonl") == read_records(tmp_path)


def test_numbers_that_json_cannot_hold_become_null(tmp_path):
    append(tmp_path, record(stats={"kl": math.nan, "losses": [1.0, math.inf]}))
    assert read_records(tmp_path)[0]["stats"] == {"kl": None, "losses": [1.0, None]}


@pytest.mark.parametrize("num_bytes_kept", [1, 40])
def test_a_torn_last_line_is_dropped_and_the_next_record_starts_clean(tmp_path, num_bytes_kept):
    append(tmp_path, record(), record("oom"))
    path = tmp_path / "records.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:num_bytes_kept])
    assert [r["outcome"] for r in read_records(tmp_path)] == ["ok"]
    append(tmp_path, record("crashed"))
    assert [r["outcome"] for r in read_records(tmp_path)] == ["ok", "crashed"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: it is not JSON."),
        ("[]", "line 2: it is not a record"),
        ('{"schema": "1"}', "line 2: it is not a record"),
        ('{"schema": 1, "case": {}, "outcome": "ok"}', "line 2: it is not a record"),
        ('{"schema": 1, "case": {"id": "a"}, "outcome": "fine"}', "line 2: it is not a record"),
        ('{"schema": 3}', "line 2: its schema is 3, of a newer rlhfbench: this one reads up to schema 2."),
    ],
)
def test_a_bad_line_is_named_in_one_sentence(tmp_path, line, says):
    good = json.dumps(record())
    (tmp_path / "records.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(RecordsError) as caught:
        read_records(tmp_path)
    assert says in str(caught.value)
    with pytest.raises(RecordsError):
        RecordsFile(tmp_path)


@pytest.mark.parametrize("latency", [{}, {"latency": None}, {"latency": {"blocks": []}}])
def test_a_record_without_its_objects_gets_empty_ones(tmp_path, latency):
    line = {"schema": 2, "case": {"id": "x"}, "outcome": "crashed", **latency}
    (tmp_path / "records.jsonl").write_text(json.dumps(line) + "\n")
    (record,) = read_records(tmp_path)
    assert record["outcome"] == "crashed"
    assert set(empty_record()) <= set(record)
    assert record["latency"]["total_s_per_sample"] is None


def test_a_missing_records_file_is_an_error(tmp_path):
    with pytest.raises(RecordsError, match="cannot be read: No such file"):
        read_records(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path):
    append(tmp_path, record())
    size = (tmp_path / "records.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordsFile(tmp_path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # ten bytes of the line fit, like on a full disk
        try:
            with pytest.raises(RecordsError, match="cannot be written: File too large"):
                file.append(record("oom"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "records.jsonl").stat().st_size == size
        assert len(file.records) == 1
        file.append(record("timeout"))
    assert [r["outcome"] for r in read_records(tmp_path)] == ["ok", "timeout"]


def test_a_run_has_one_writer(tmp_path):
    with RecordsFile(tmp_path), pytest.raises(RunFolderError, match="another rlhfbench is running in it"):
        RecordsFile(tmp_path)
    RecordsFile(tmp_path).__exit__()


def test_of_a_case_that_a_run_tried_again_the_newest_record_is_read(tmp_path):
    def of(run, outcome, batch_size=1):
        case = dataclasses.replace(CASE, batch_size=batch_size)
        made = make_record(case, outcome=outcome, error=None, measured={}, started_at="2026-01-01", wall_s=1.5)
        return {**made, "run": {"id": run, "segment": 0, "host": None}}

    written = [of(None, "oom"), of("a", "crashed"), of("a", "ok", 2), of("b", "timeout"), of("a", "ok")]
    append(tmp_path, *written)
    assert read_records(tmp_path) == written[2:]
    with RecordsFile(tmp_path) as file:
        file.append(of("b", "ok"))
        assert file.records == [written[2], written[4], of("b", "ok")] == read_records(tmp_path)


def test_records_that_name_no_run_are_all_kept(tmp_path):
    append(tmp_path, record("oom"), record("ok"))
    assert [r["outcome"] for r in read_records(tmp_path)] == ["oom", "ok"]
