from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import SweepError
from rlhfbench.measure import host
from rlhfbench.records.file import make_record, read_records
from rlhfbench.runs import max_batch
from rlhfbench.runs.folder import RunFolder
from rlhfbench.runs.max_batch import MaxBatchResult, MaxBatchSearch, find_max_batches, max_batch_frame
from rlhfbench.runs.options import RunOptions
from rlhfkernels import Case, Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)
GIB = 2**30
SPEC = {"methods": ["hydra", "lora"], "models": "tiny", "seq_lens": [8], "batch_sizes": [2, 1]}


def record(
    case: Case, outcome: str, total_bytes: int | None = None, process_bytes: int | None = None
) -> dict[str, object]:
    error = None if outcome == "ok" else {"kind": "Kind", "message": "it says why.", "phase": None}
    memory = {"total_bytes": total_bytes, "model_bytes": GIB, "views": {"host_peak_bytes": process_bytes}}
    return make_record(case, outcome=outcome, error=error, measured={"memory": memory}, started_at="", wall_s=0.0)


def search(fits: int, *, start: int = 1, limit: int = 512, available_gib: float | None = None) -> MaxBatchResult:
    """Searches a device that fits ``fits`` rows; a step takes 1 GiB, and 1 GiB for each row."""

    def try_case(case: Case) -> dict[str, object]:
        size = case.batch_size
        return record(case, "ok" if size <= fits else "oom", (1 + size) * GIB)

    available_bytes = None if available_gib is None else int(available_gib * GIB)
    case = dataclasses.replace(CASE, batch_size=start)
    return MaxBatchSearch(case, limit=limit, available_bytes=available_bytes).run(try_case, planned=7)


def sizes(found: MaxBatchResult) -> list[int]:
    return [size for size, _, _ in found.tries]


def test_the_batch_is_doubled_and_then_bisected() -> None:
    found = search(11)
    assert sizes(found) == [1, 2, 4, 8, 16, 12, 10, 11]
    assert (found.largest_ok, found.smallest_failing, found.planned) == (11, 12, 7)
    assert found.stopped_because == "batch 12 was out of memory."


def test_a_start_at_the_answer_needs_few_more_tries() -> None:
    assert sizes(search(11, start=11)) == [11, 22, 16, 13, 12]
    assert sizes(search(3, start=8)) == [8, 4, 2, 3]


@given(fits=st.integers(0, 70), start=st.integers(1, 80), limit=st.integers(1, 64))
def test_the_answer_is_the_largest_that_fits_up_to_the_limit(fits: int, start: int, limit: int) -> None:
    found = search(fits, start=start, limit=limit)
    assert found.largest_ok == min(fits, limit)
    assert found.smallest_failing == (fits + 1 if fits < limit else None)
    assert len(set(sizes(found))) == len(found.tries)
    assert max(sizes(found)) <= limit


def test_the_limit_ends_the_search() -> None:
    found = search(1000, limit=6)
    assert sizes(found) == [1, 2, 4, 6]
    assert found.stopped_because == "the limit of 6 was reached."


@given(available_gib=st.integers(3, 60), start=st.integers(1, 2))
def test_no_batch_beyond_the_memory_of_the_host_is_tried(available_gib: int, start: int) -> None:
    found = search(10_000, start=start, available_gib=available_gib)
    assert found.largest_ok == max(sizes(found)) == available_gib - 1
    assert found.smallest_failing is None
    assert found.stopped_because == (
        f"batch {available_gib} would take {available_gib + 1} GiB by what was measured, "
        f"and only {available_gib} GiB are available."
    )


@given(
    available_gib=st.floats(4, 60),
    libraries_gib=st.floats(0.3, 1.0),
    loading_gib=st.floats(0, 4.0),
    overhead=st.floats(1.0, 2.0),
)
def test_no_process_beyond_the_memory_of_the_host_is_started(
    available_gib: float, libraries_gib: float, loading_gib: float, overhead: float
) -> None:
    """A step takes 1 GiB, and 1 GiB for each row; its process has libraries, freed memory and a peak of loading."""

    def process_gib(size: int) -> float:
        return max(loading_gib, libraries_gib + (1 + size) * overhead)

    def try_case(case: Case) -> dict[str, object]:
        size = case.batch_size
        return record(case, "ok", (1 + size) * GIB, int(process_gib(size) * GIB))

    found = MaxBatchSearch(CASE, limit=512, available_bytes=int(available_gib * GIB)).run(try_case)
    grown = [size for size in sizes(found)[1:] if process_gib(size) > loading_gib]
    # Until two batches have shown what a row takes beyond its tensors, a try may exceed the memory by that.
    assert all(process_gib(size) <= available_gib + (overhead - 1) * size for size in grown)
    assert all(process_gib(size) <= available_gib + 1e-6 for size in sizes(found)[3:])
    assert found.largest_ok == max(sizes(found))
    assert "only" in found.stopped_because


def test_the_process_and_not_the_tensors_alone_must_fit() -> None:
    def try_case(case: Case) -> dict[str, object]:
        total = (1 + case.batch_size) * GIB
        return record(case, "ok", total, total + 3 * GIB)

    found = MaxBatchSearch(CASE, limit=512, available_bytes=10 * GIB).run(try_case)
    assert found.largest_ok == max(sizes(found)) == 6
    assert found.stopped_because == "batch 7 would take 11 GiB by what was measured, and only 10 GiB are available."


@pytest.mark.parametrize("outcome", ["timeout", "invalid", "crashed"])
def test_another_failure_ends_the_search_and_is_not_out_of_memory(outcome: str) -> None:
    def try_case(case: Case) -> dict[str, object]:
        return record(case, "ok" if case.batch_size < 4 else outcome, GIB)

    found = MaxBatchSearch(CASE, limit=512, available_bytes=None).run(try_case)
    assert (found.largest_ok, found.smallest_failing) == (2, None)
    assert found.stopped_because == f"batch 4 ended as {outcome}: it says why."
    at_once = MaxBatchSearch(dataclasses.replace(CASE, batch_size=4), limit=512, available_bytes=None).run(try_case)
    assert at_once.largest_ok is None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, fake_server: None) -> None:
    """Makes every try a fake case, on a host of 64 GiB with a predicted batch of 5."""
    monkeypatch.setattr(host, "available_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(max_batch, "_planned", lambda case, usable_bytes, limit: min(5, limit))


def find(out: Path, kind: str, *, limit: int = 512, resume: bool = False, **options: object) -> list[MaxBatchResult]:
    sweep = Sweep.from_spec({**SPEC, "options": {"data.prompt_field": kind}})
    return find_max_batches(sweep, out, RunOptions(**options), limit=limit, resume=resume)[1]


@pytest.mark.usefixtures("fake")
def test_every_try_is_recorded_and_the_result_is_written(tmp_path: Path) -> None:
    found = find(tmp_path / "run", "oom-from-batch-4")
    assert [(f.case.method, f.largest_ok, f.smallest_failing, f.planned) for f in found] == [
        ("hydra", 3, 4, 5),
        ("lora", 3, 4, 5),
    ]
    tried = [(r["case"]["method"], r["case"]["batch_size"], r["outcome"]) for r in read_records(tmp_path / "run")]
    expected = [(1, "ok"), (2, "ok"), (4, "oom"), (3, "ok")]
    assert tried == [(method, *row) for method in ("hydra", "lora") for row in expected]
    kept = json.loads((tmp_path / "run" / "max_batch.json").read_text())
    assert [entry["tries"][2]["outcome"] for entry in kept] == ["oom", "oom"]
    assert {key: kept[0][key] for key in ("method", "prompt_len", "largest_ok", "smallest_failing", "planned")} == {
        "method": "hydra",
        "prompt_len": 4,
        "largest_ok": 3,
        "smallest_failing": 4,
        "planned": 5,
    }
    assert (kept[0]["seed"], kept[0]["options"]["data"]["prompt_field"]) == (0, "oom-from-batch-4")
    frame = max_batch_frame(found)
    assert frame["num_tries"].tolist() == [4, 4]


def test_results_of_several_lora_ranks_and_options_are_told_apart() -> None:
    known: dict[str, object] = {"largest_ok": 1, "smallest_failing": None, "planned": None, "stopped_because": ""}
    asked = [{"lora.r": 2, "ppo.gamma": 0.9}, {"lora.r": 4, "ppo.gamma": 0.9, "engine.gradient_checkpointing": True}]
    cases = [dataclasses.replace(CASE, options=Options.of(options)) for options in asked]
    frame = max_batch_frame([MaxBatchResult(case=case, **known, tries=()) for case in cases])
    assert frame["lora_rank"].tolist() == [2, 4]
    assert frame["options"].tolist() == ["", "engine.gradient_checkpointing=True"]


@pytest.mark.usefixtures("fake")
def test_a_try_is_timed_in_one_block(tmp_path: Path) -> None:
    find(tmp_path / "run", "blocks")
    assert {record["latency"]["num_blocks"] for record in read_records(tmp_path / "run")} == {1}


@pytest.mark.usefixtures("fake")
def test_an_unexplained_kill_on_a_cpu_counts_as_out_of_memory(tmp_path: Path) -> None:
    (hydra, _) = find(tmp_path / "run", "die")
    assert (hydra.largest_ok, hydra.smallest_failing) == (0, 1)


@pytest.mark.usefixtures("fake")
def test_with_a_memory_limit_the_predicted_batch_is_tried_first(tmp_path: Path) -> None:
    (hydra, _) = find(tmp_path / "run", "oom-from-batch-4", memory_limit_bytes=GIB)
    assert sizes(hydra) == [5, 2, 3, 4]


@pytest.mark.usefixtures("fake")
def test_no_first_try_on_a_cpu_is_larger_than_its_plan(tmp_path: Path) -> None:
    sweep = Sweep.from_spec({**SPEC, "batch_sizes": [9], "options": {"data.prompt_field": "ok"}})
    (hydra, _) = find_max_batches(sweep, tmp_path / "run", RunOptions(), limit=6)[1]
    assert sizes(hydra) == [5, 6]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("asked", "room"),
    [
        (None, "64 GiB that are available"),
        (2 * GIB, "2 GiB of --memory-limit"),
        (100 * GIB, "64 GiB that are available"),
    ],
)
def test_a_batch_of_1_that_does_not_fit_by_its_plan_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int | None, room: str
) -> None:
    monkeypatch.setattr(max_batch, "_planned", lambda case, usable_bytes, limit: 0)
    (hydra, _) = find(tmp_path / "run", "ok", memory_limit_bytes=asked)
    assert (hydra.tries, hydra.largest_ok, hydra.planned) == ((), None, 0)
    assert hydra.stopped_because == f"batch 1 does not fit into the {room}, by its plan."
    assert read_records(tmp_path / "run") == []


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("asked", "expected"), [(None, 64 * GIB), (GIB, GIB), (100 * GIB, 64 * GIB)])
def test_no_try_may_allocate_more_than_is_available(tmp_path: Path, asked: int | None, expected: int) -> None:
    """A try that takes more than was foreseen fails at its own allocation, and no other process is killed."""
    find(tmp_path / "run", "echo", limit=1, memory_limit_bytes=asked)
    limits = [record["prompts"]["memory_limit_bytes"] for record in read_records(tmp_path / "run")]
    assert limits == [expected] * 2
    assert RunFolder(tmp_path / "run").settings()["memory_limit_bytes"] == asked


@pytest.mark.usefixtures("fake")
def test_the_plan_leaves_room_for_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    monkeypatch.setattr(max_batch, "_planned", lambda case, usable_bytes, limit: rooms.append(usable_bytes) or 1)
    find(tmp_path / "run", "ok", limit=1)
    assert set(rooms) == {64 * GIB - GIB // 2}


@pytest.mark.usefixtures("fake")
def test_a_resumed_search_does_not_repeat_recorded_tries(tmp_path: Path) -> None:
    first = find(tmp_path / "run", "oom-from-batch-4")
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]))
    (tmp_path / "run" / "max_batch.json").unlink()
    assert find(tmp_path / "run", "oom-from-batch-4", resume=True) == first
    again = path.read_bytes().splitlines(keepends=True)
    assert (again[:5], len(again)) == (lines[:5], len(lines))
    assert (tmp_path / "run" / "max_batch.json").is_file()


@pytest.mark.usefixtures("fake")
def test_a_search_that_is_resumed_under_another_memory_limit_tries_anew(tmp_path: Path) -> None:
    for limit_bytes, is_resumed in ((GIB, False), (2 * GIB, True), (2 * GIB, True)):
        find(tmp_path / "run", "echo", limit=1, resume=is_resumed, memory_limit_bytes=limit_bytes)
    records = read_records(tmp_path / "run")
    assert [record["prompts"]["memory_limit_bytes"] for record in records] == [2 * GIB] * 2
    assert [record["run"]["segment"] for record in records] == [1, 1]


@pytest.mark.usefixtures("fake")
def test_a_search_that_is_resumed_on_another_machine_tries_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find(tmp_path / "run", "echo", limit=1)
    monkeypatch.setattr(platform, "node", lambda: "another")
    find(tmp_path / "run", "echo", limit=1, resume=True)
    assert [record["run"]["segment"] for record in read_records(tmp_path / "run")] == [1, 1]


@pytest.mark.parametrize(
    ("spec", "limit", "blocks", "sentence"),
    [
        ({}, 0, None, "max-batch-limit is 0: it must be an integer of at least 1."),
        ({}, 512, 8, "blocks is 8: each try of --max-batch has one block: leave it out, or ask for 1."),
        (
            {"batch_sizes": [4], "options": {"engine.micro_batch_size": 2}},
            512,
            1,
            "--max-batch tries each batch whole: leave out engine.micro_batch_size and ppo.num_mini_batches.",
        ),
    ],
)
def test_options_that_the_search_rejects(
    tmp_path: Path, spec: dict[str, object], limit: int, blocks: int | None, sentence: str
) -> None:
    with pytest.raises(SweepError) as caught:
        find_max_batches(Sweep.from_spec({**SPEC, **spec}), tmp_path / "run", RunOptions(blocks=blocks), limit=limit)
    assert caught.value.problems == (sentence,)
    assert not (tmp_path / "run").exists()


def test_the_predicted_batch_is_the_largest_that_fits_up_to_the_limit(make_case: Callable[..., Case]) -> None:
    from rlhfbench.planning.predict import plan_case

    case = make_case("hydra", dtype="float32")
    room = plan_case(dataclasses.replace(case, batch_size=9)).total_bytes + 10
    assert max_batch._planned(case, room, 512) == 9
    assert max_batch._planned(case, room, 4) == 4
    assert max_batch._planned(case, plan_case(dataclasses.replace(case, batch_size=600)).total_bytes + 10, 4096) == 600
    assert (
        max_batch._planned(dataclasses.replace(case, options=Options.of({"lora.target_modules": "absent"})), room, 4)
        is None
    )


def test_an_absent_device_has_no_memory() -> None:
    assert max_batch.device_bytes("cuda:77") is None


def test_the_ranks_of_a_case_share_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 64 * GIB)
    options = Options.of({"parallel.strategy": "ddp", "parallel.world_size": 4})
    case = dataclasses.replace(CASE, options=options)
    _, available_bytes = max_batch._memory_limits(case, RunOptions())
    assert available_bytes == 16 * GIB
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    _, available_bytes = max_batch._memory_limits(case, RunOptions())
    assert available_bytes == 32 * GIB  # the other two are on another machine
