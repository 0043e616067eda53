"""Cases of one run that were measured under unlike conditions."""

import io
import json

import pytest
from rich.console import Console

from rlhfbench.records.file import RecordsFile, make_record, read_records
from rlhfbench.records.frame import records_frame
from rlhfbench.runs.conditions import with_conditions
from rlhfbench.runs.drawing import draw_run
from rlhfbench.runs.page import read_run, write_run_page
from rlhfkernels.config.case import Case

HERE = {"host": "a", "num_threads": 2, "versions": {"torch": "2.11"}, "source": {"commit": "abc", "hash": "x"}}
OTHER = {**HERE, "num_threads": 1}
NOTE = (
    "The run was resumed under other conditions (resumption 1: threads 1 instead of 2): times are compared only "
    "between cases of the same conditions."
)


@pytest.fixture
def write_run():
    """Writes a run of lora and hydra at two batch sizes, each case in the segment and on the host that is given."""

    def write(folder, *places, environments=(HERE, OTHER)):
        folder.mkdir(exist_ok=True)
        cases = [(method, batch_size) for batch_size in (1, 2) for method in ("lora", "hydra")]
        with RecordsFile(folder) as records:
            for (method, batch_size), (segment, host) in zip(cases, places, strict=True):
                case = Case(method=method, model="tiny", prompt_len=8, completion_len=8, batch_size=batch_size)
                latency = {"inference_s_per_sample": 0.25, "update_s_per_sample": 0.25, "total_s_per_sample": 0.5}
                measured = {"memory": {"total_bytes": 2**30}, "latency": latency}
                record = make_record(case, outcome="ok", error=None, measured=measured, started_at="now", wall_s=1.0)
                records.append({**record, "run": {"id": "r", "segment": segment, "host": host}})
        first, *resumed = environments
        (folder / "environment.json").write_text(json.dumps({**first, "run_id": "r", "resumed": resumed}))

    return write


def conditions_of(folder, environments):
    frame = with_conditions(records_frame(read_records(folder)), environments)
    return frame["conditions"].tolist() if "conditions" in frame else None


def test_cases_of_segments_under_unlike_conditions_are_told_apart(tmp_path, write_run):
    places = [(0, "a"), (1, "a"), (2, "a"), (3, "a")]
    write_run(tmp_path, *places)
    start, first = "the start", "resumption 1"
    assert conditions_of(tmp_path, [HERE, OTHER, HERE, OTHER]) == [start, first, start, first]
    torch = {**HERE, "versions": {"torch": "2.12"}}
    assert conditions_of(tmp_path, [HERE, OTHER, torch, HERE]) == [start, first, "resumption 2", start]
    other_commit = {**HERE, "source": {"commit": "def", "hash": "x"}}  # of the same sources
    assert conditions_of(tmp_path, [HERE, other_commit, HERE, HERE]) is None
    assert conditions_of(tmp_path, [HERE]) is None
    assert conditions_of(tmp_path, []) is None


def test_only_measured_cases_of_one_machine_count(tmp_path, write_run):
    write_run(tmp_path, (0, "a"), (1, "b"), (1, "b"), (1, "b"))
    assert conditions_of(tmp_path, [HERE, {**OTHER, "host": "b"}]) is None  # the host tells them apart
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records[1:]:
        record |= {"outcome": "oom", "run": {**record["run"], "host": "a"}}
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert conditions_of(tmp_path, [HERE, OTHER]) is None


def test_the_conditions_of_a_node_of_a_cluster_are_its_own(tmp_path, write_run):
    write_run(tmp_path, (0, "b"), (1, "b"), (0, "b"), (1, "b"))
    node = {**HERE, "host": "b"}
    nodes = [{**HERE, "nodes": {"b": node}}, {**OTHER, "nodes": {"b": node}}]
    assert conditions_of(tmp_path, nodes) is None
    nodes = [{**HERE, "nodes": {"b": node}}, {**HERE, "nodes": {"b": {**node, "num_threads": 4}}}]
    assert conditions_of(tmp_path, nodes) == ["the start", "resumption 1"] * 2


def test_a_report_compares_no_times_across_conditions_and_says_so(tmp_path, write_run):
    write_run(tmp_path / "alike", *[(0, "a")] * 4)
    write_run(tmp_path / "unlike", (0, "a"), (1, "a"), (0, "a"), (1, "a"))
    for name, is_compared in (("alike", True), ("unlike", False)):
        console = Console(width=200, file=io.StringIO(), record=True)
        console.print(draw_run(tmp_path / name, whole=True))
        table = (tmp_path / name / "memory_table.md").read_text()
        assert (tmp_path / name / "gain.md").exists() == is_compared
        assert (NOTE not in " ".join(console.export_text().split())) == is_compared
        assert (NOTE not in table) == is_compared
        assert (NOTE not in (tmp_path / name / "slopes.md").read_text()) == is_compared
        assert (NOTE not in (tmp_path / name / "index.html").read_text()) == is_compared
        assert ("| resumption 1 |" not in " ".join(table.split())) == is_compared
        assert ("conditions" not in (tmp_path / name / "slopes.csv").read_text().splitlines()[0]) == is_compared
        assert ("conditions" in read_run(tmp_path / name).frame) != is_compared


def test_a_run_under_two_conditions_is_compared_with_a_run_under_one(tmp_path, write_run):
    write_run(tmp_path / "before", *[(0, "a")] * 4)
    write_run(tmp_path / "after", (0, "a"), (0, "a"), (1, "a"), (1, "a"))
    folders = [tmp_path / "before", tmp_path / "after"]
    (sentence, *_) = write_run_page(folders, tmp_path / "comparison.html")
    assert sentence.startswith("Of 4 cases that both have")
    page = (tmp_path / "comparison.html").read_text()
    words = "(after, resumption 1: threads 1 instead of 2): what the times of two runs differ by may be these."
    assert f"A run was resumed under other conditions {words}" in page


def test_what_changed_on_each_machine_is_told(tmp_path, write_run):
    there, torch = {**HERE, "host": "b"}, {"torch": "2.12"}
    start = {**HERE, "nodes": {"b": there}}
    resumed = {**OTHER, "nodes": {"b": {**there, "versions": torch}}}
    write_run(tmp_path, (0, "a"), (1, "a"), (0, "b"), (1, "b"), environments=(start, resumed))
    draw_run(tmp_path)
    table = (tmp_path / "memory_table.md").read_text()
    assert "a, resumption 1: threads 1 instead of 2; b, resumption 1: torch 2.12 instead of 2.11" in table


def test_a_machine_with_two_names_can_have_two_conditions(tmp_path, write_run):
    write_run(tmp_path, (0, "a"), (1, "b"), (0, "a"), (1, "b"), environments=(HERE, {**OTHER, "host": "b"}))
    draw_run(tmp_path, same_machine=True)
    assert NOTE in (tmp_path / "memory_table.md").read_text()
    write_run_page([tmp_path, tmp_path], tmp_path / "comparison.html", same_machine=True)
    assert "resumption 1: threads 1 instead of 2" in (tmp_path / "comparison.html").read_text()


def test_a_report_leaves_no_table_of_an_earlier_one(tmp_path, write_run):
    write_run(tmp_path, (0, "a"), (0, "a"), (0, "b"), (0, "b"), environments=(HERE,))
    draw_run(tmp_path, same_machine=True)
    assert (tmp_path / "gain.md").is_file()
    write_run(tmp_path / "other", (0, "a"), (1, "a"), (0, "a"), (1, "a"))
    for name in ("records.jsonl", "environment.json"):
        (tmp_path / name).write_bytes((tmp_path / "other" / name).read_bytes())
    draw_run(tmp_path)
    assert not (tmp_path / "gain.md").exists()
    assert (tmp_path / "memory_table.md").is_file()
