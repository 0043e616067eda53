from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

import rlhfbench
import rlhfreports
from rlhfbench.records.file import read_records
from rlhfbench.records.frame import records_frame
from rlhfbench.records.schema import FIELDS, PHASE_FIELDS, columns, columns_markdown, empty_record, filled
from rlhfbench.records.upgrades import upgraded, upgraded_case
from rlhfbench.runs.drawing import draw_run
from rlhfkernels.config.options import Options

SCHEMA_1 = Path(__file__).with_name("schema1.jsonl")


def schema_1() -> list[dict]:
    return [json.loads(line) for line in SCHEMA_1.read_text().splitlines()]


def test_every_column_is_named_once_typed_and_explained():
    names = [field.column for field in (*FIELDS, *PHASE_FIELDS) if field.column]
    assert len(names) == len(set(names))
    assert all(field.dtype in ("string", "Int64", "Float64", "list") for field in columns(["score"]).values())
    assert all(field.meaning for field in (*FIELDS, *PHASE_FIELDS))


def test_the_unit_in_a_name_fits_the_type():
    for name, field in columns(["score"]).items():
        if name.endswith("_bytes"):
            assert field.dtype == "Int64", name
        if "_block_s" in name:
            assert field.dtype == "list", name
        elif name.endswith(("_s", "_s_per_sample", "_s_per_sequence", "_fraction")):
            assert field.dtype == "Float64", name


def test_the_manual_has_every_column():
    manual = Path(__file__).parents[3] / "docs" / "columns.md"
    assert columns_markdown() in manual.read_text(), "write columns_markdown() into docs/columns.md"


def test_predictable_columns_have_a_predicted_column():
    predicted = {name.removeprefix("predicted_") for name in columns() if name.startswith("predicted_")}
    assert predicted == {field.column for field in FIELDS if field.in_plan and field.column}
    assert {"total_bytes", "persistent_model_bytes", "peak_phase"} <= predicted


def test_a_record_of_schema_1_gets_every_key_of_schema_2():
    for old in schema_1():
        new = upgraded(old)
        assert new["schema"] == 2
        assert empty_record().keys() <= new.keys()
        assert new["latency"]["sequences_per_sample"] == 1
        assert (new["world"], new["stats"], new["memory"]["persistent_model_bytes"]) == (None, {}, None)
        # Nothing that was measured is lost or changed.
        for section in ("memory", "work"):
            assert filled(new[section], old[section]) == new[section]
        assert new["latency"]["total_s_per_sample"] == old["latency"]["total_s_per_sample"]
        (block,) = new["latency"]["blocks"] or [{"phases": {}}]
        phases = old["latency"]["phases"]
        assert block["phases"] == {name: phase["samples_s"] for name, phase in phases.items()}
        assert new["latency"]["phases"] == {name: {"mean_s": phase["median_s"]} for name, phase in phases.items()}
        assert old["case"]["id"] == new["case"]["id"]


def test_a_key_that_was_renamed_is_read_by_its_present_name():
    record = filled(empty_record(), {**upgraded(schema_1()[0]), "fast_paths": "flash_attn"})
    old = {("taken" if key == "fast_paths" else key): value for key, value in record.items()}
    assert upgraded(old) == record


def test_options_of_schema_1_get_their_present_names_and_values():
    modern, paper, _ = (upgraded(record)["case"]["options"] for record in schema_1())
    for options in (modern, paper):
        Options.of({f"{group}.{name}": value for group, values in options.items() for name, value in values.items()})
    assert modern == {group: {**values, **modern[group]} for group, values in as_dict(Options(), modern).items()}
    assert (modern["lora"]["alpha"], modern["lora"]["r"]) == (None, 16)
    assert modern["engine"]["cache_implementation"] == "static"
    assert modern["ppo"]["critic_learning_rate"] is None
    assert (paper["lora"]["alpha"], paper["engine"]["cache_implementation"]) == (paper["lora"]["r"] / 128, "dynamic")
    assert paper["engine"]["attn_implementation"] == "eager"


def as_dict(options: Options, like: dict) -> dict:
    """The groups and fields of ``like``, with the values of ``options``."""
    return {group: {name: getattr(getattr(options, group), name) for name in like[group]} for group in like}


def test_values_of_schema_1_other_than_defaults_are_kept():
    case = {"lora_rank": 8, "options": {"lora_scaling": 0.5, "actor_lr": 1e-4, "critic_lr": 2e-4, "gone": 1}}
    options = upgraded_case(case)["options"]
    assert options["lora"] == {"r": 8, "alpha": 4.0}
    assert options["ppo"] == {"critic_learning_rate": 2e-4}
    assert options["other"] == {"gone": 1}


def test_the_paper_setting_of_schema_1_is_known_at_every_rank():
    record = schema_1()[1]
    assert record["case"]["lora_rank"] == 16  # a product scaled by 1/128: an alpha of 1/8, where paper's is 1
    assert records_frame([upgraded(record)]).loc[0, "setting"] == "paper"
    record["case"]["lora_rank"] = 128
    assert records_frame([upgraded(record)]).loc[0, ["setting", "options"]].tolist() == ["paper", ""]


@pytest.mark.parametrize("section", ["memory", "latency", "work", "prompts"])
def test_null_objects_of_schema_1_are_read(section):
    record = {**schema_1()[0], section: None}
    assert len(records_frame([upgraded(record)])) == 1


def test_a_folder_of_schema_1_is_read_and_drawn(tmp_path):
    shutil.copy(SCHEMA_1, tmp_path / "records.jsonl")
    frame = records_frame(read_records(tmp_path))
    old = schema_1()
    assert frame["setting"].tolist() == ["modern", "paper", "modern"]
    assert frame["lora_rank"].tolist() == [record["case"]["lora_rank"] for record in old]
    assert frame["total_bytes"].tolist() == [record["memory"]["total_bytes"] for record in old]
    assert frame["total_s_per_sequence"].tolist() == [record["latency"]["total_s_per_sample"] for record in old]
    draw_run(tmp_path)
    table = pd.read_csv(tmp_path / "memory_table.csv")
    assert sorted(table["total_bytes"]) == sorted(frame["total_bytes"])
    assert "PPO" in (tmp_path / "memory_table.md").read_text()


def test_the_public_names_read_and_tabulate_a_run(tmp_path):
    shutil.copy(SCHEMA_1, tmp_path / "records.jsonl")
    frame = rlhfbench.records_frame(rlhfbench.read_records(tmp_path))
    table = rlhfreports.table(frame)
    assert len(table.rows) == len(frame) == 3
    assert table.frame["total_bytes"].notna().all()
