import json
import shutil
from pathlib import Path

import pytest

from rlhfbench.records.file import read_records
from rlhfbench.records.frame import records_frame
from rlhfbench.runs import max_batch
from rlhfbench.runs.folder import RunFolder

SMALL = ("--methods", "hydra", "--seq-lens", "8", "--batch-sizes", "1")


def kind(name):
    return ("--option", f"data.prompt_field={name}")


@pytest.mark.usefixtures("fake")
def test_cases_of_two_settings_are_interleaved_and_resumed(call, tmp_path):
    arguments = ("run", *SMALL, *kind("ok"), "--setting", "paper,modern", "--lora-rank", "4", "--out", "a")
    assert call(*arguments)[0] == 0
    records = read_records("a")
    assert records_frame(records)[["setting", "dtype", "lora_rank"]].to_numpy().tolist() == [
        ["paper", "bfloat16", 4],
        ["modern", "float32", 4],
    ]
    assert call("run", "--resume", "a")[0] == 0
    assert call(*arguments[:-2], "--resume", "a")[0] == 0
    assert read_records("a") == records
    # A sweep file can name them too, and a flag beside it wins.
    (tmp_path / "s.toml").write_text('settings = ["paper", "modern"]\n[options.lora]\nr = 2\n')
    assert call("run", "--sweep", "s.toml", *SMALL, *kind("ok"), "--out", "b")[0] == 0
    assert records_frame(read_records("b"))["setting"].tolist() == ["paper", "modern"]
    assert call("run", "--sweep", "s.toml", "--setting", "paper", *SMALL, *kind("ok"), "--out", "c")[0] == 0
    (record,) = read_records("c")
    assert (records_frame([record]).loc[0, "setting"], record["case"]["options"]["lora"]["r"]) == ("paper", 128)


@pytest.mark.usefixtures("fake")
def test_a_run_is_resumed_by_the_same_command_or_by_its_folder_alone(call):
    arguments = ("run", *SMALL, *kind("ok"))
    assert call(*arguments, "--out", "here")[0] == 0
    assert call(*arguments, "--resume", "here")[0] == 0
    assert call("run", "--resume", "here")[0] == 0
    assert len(read_records("here")) == 1
    code, _, err = call(*arguments, "--lora-rank", "2", "--resume", "here")
    assert (code, err) == (2, "out 'here' holds a run of a different sweep: lora.r 2 instead of 16.\n")
    code, _, err = call("run", "--world-size", "2", "--global-batch", "--batch-sizes", "2", "--resume", "here")
    assert code == 2
    assert err.startswith("out 'here' holds a run of a different sweep: ")


@pytest.mark.usefixtures("fake")
def test_a_resumed_run_takes_its_settings_from_the_folder_unless_they_are_given_again(call):
    flags = ("--time-budget-s", "1.5", "--case-timeout-s", "9", "--memory-limit", "1GiB", "--threads", "1")
    call("run", *SMALL, *kind("exit"), *flags, "--profile", "--with-plan", "--out", "here")
    assert call("run", "--resume", "here", "--retry", "crashed")[0] == 3
    given = ("--threads", "2", "--no-profile", "--time-budget-s", "1")
    code, _, err = call("run", "--resume", "here", *given)
    assert (code, "threads 2 instead of 1" in err) == (3, True)
    environment = json.loads(Path("here/environment.json").read_text())
    first, second, third = (e["settings"] for e in (environment, *environment["resumed"]))
    assert (first["memory_limit_bytes"], first["profile"], first["with_plan"]) == (2**30, True, True)
    assert second == first
    assert third == {**first, "num_threads": 2, "profile": False, "time_budget_s": 1.0}
    assert call("run", "--resume", "here", "--memory-limit", "none")[0] == 3
    assert RunFolder("here").settings() == {**third, "memory_limit_bytes": None}
    assert [r["run"]["segment"] for r in read_records("here")] == [1]


@pytest.mark.usefixtures("fake")
def test_a_resumed_search_for_the_largest_batch_goes_on_searching(call, monkeypatch):
    monkeypatch.setattr(max_batch, "_planned", lambda *_: None)  # no plan says where the search starts
    arguments = ("run", *SMALL, *kind("oom-from-batch-4"), "--max-batch", "--max-batch-limit", "3", "--json")
    first = call(*arguments, "--out", "here")
    assert json.loads(first[1])[0]["largest_ok"] == 3
    assert call("run", "--resume", "here", "--json")[1] == first[1]
    grown = json.loads(call("run", "--resume", "here", "--json", "--max-batch-limit", "8")[1])
    assert (grown[0]["largest_ok"], grown[0]["smallest_failing"]) == (3, 4)


@pytest.mark.usefixtures("fake")
def test_a_run_that_is_no_search_cannot_be_resumed_as_one(call):
    assert call("run", *SMALL, *kind("ok"), "--out", "here")[0] == 0
    code, _, err = call("run", "--resume", "here", "--max-batch")
    assert (code, err) == (2, "--max-batch: the run to resume is no search for the largest batch: name a new folder.\n")
    assert len(read_records("here")) == 1


@pytest.mark.usefixtures("fake")
def test_a_run_with_data_and_a_local_model_is_resumed_from_any_folder(call, tmp_path, monkeypatch, checkpoint):
    (tmp_path / "p.jsonl").write_text('{"ok": "hello"}\n')
    shutil.copytree(checkpoint("llama"), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").touch()  # fake cases do not read it
    flags = ("--model", "./m", "--prompts", "p.jsonl", "--prompt-field", "ok")
    assert call("run", *SMALL, *flags, "--out", "here")[0] == 0
    (record,) = read_records("here")
    assert record["case"]["model"] == str(tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = call("run", "--resume", "../here")
    assert (code, err) == (0, "The run is in ../here.\n")
    assert read_records("../here") == [record]
    # Another content is another case.
    (tmp_path / "p.jsonl").write_text('{"ok": "good bye"}\n')
    code, _, err = call("run", "--resume", "../here")
    file = tmp_path / "p.jsonl"
    assert (code, err) == (2, f"data file '{file}' has changed since the run started: name a new folder.\n")


def test_a_recorded_setting_that_breaks_its_rule_is_one_sentence(call, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "sweep.toml").write_text("seq_lens = [8]\n")
    (tmp_path / "here" / "environment.json").write_text('{"settings": {"num_threads": "many", "later": 1}}')
    code, _, err = call("run", "--resume", "here")
    assert (code, err) == (2, "num_threads is 'many': it must be an integer from 1 to 1024 or none.\n")
