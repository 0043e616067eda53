import dataclasses
import json

import pytest

from rlhfbench.cluster import needs
from rlhfbench.cluster.needs import GROUPS, PROCESS_BYTES, needs_of
from rlhfbench.cluster.nodes import Need
from rlhfbench.runs.options import RunOptions
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)


@pytest.fixture
def planned(monkeypatch):
    """The batch sizes that are planned, each at a thousand times its bytes."""
    found = []

    def map_parallel(function, cases, *, preload):
        found.extend(case.batch_size for case in cases)
        return [1000 * case.batch_size if case.batch_size else None for case in cases]

    monkeypatch.setattr(needs, "map_parallel", map_parallel)
    return found


def sized(*sizes, **changes):
    return [dataclasses.replace(CASE, batch_size=size, **changes) for size in sizes]


def test_memory_is_planned_once_for_cases_that_differ_in_the_seed(tmp_path, planned):
    cases = [*sized(1, 2), *sized(1, seed=1)]
    told = []
    need_of = needs_of(cases, RunOptions(num_threads=3), tmp_path, told.append)
    assert planned == [1, 2]
    assert told == ["2 cases are planned, to place them by the memory that they need."]
    wanted = [Need(device="cpu", num_cores=3, memory_bytes=PROCESS_BYTES + n) for n in (1000, 2000, 1000)]
    assert [need_of(case) for case in cases] == wanted
    assert json.loads((tmp_path / "planned_bytes.json").read_text()) == {
        case.id: n for case, n in zip(cases, (1000, 2000, 1000), strict=True)
    }
    needs_of([*cases, *sized(5)], RunOptions(), tmp_path, told.append)
    assert planned == [1, 2, 5]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": "b"}', '{"a": true}', "[" * 100_000, "\udc80"])
def test_a_file_of_something_else_is_planned_again(tmp_path, planned, text):
    (tmp_path / "planned_bytes.json").write_text(text, errors="surrogateescape")
    need_of = needs_of([CASE], RunOptions(), tmp_path, lambda text: None)
    assert need_of(CASE).memory_bytes == PROCESS_BYTES + 1000
    assert json.loads((tmp_path / "planned_bytes.json").read_text()) == {CASE.id: 1000}


def test_a_limit_bounds_what_a_case_needs_and_a_device_has_its_own_memory(tmp_path, planned):
    cases = sized(1, 9, device="cuda")
    need_of = needs_of(cases, RunOptions(memory_limit_bytes=5000), tmp_path, print)
    assert [need_of(case) for case in cases] == [
        Need(device="cuda", memory_bytes=1000),
        Need(device="cuda", memory_bytes=5000),
    ]


def test_each_rank_has_a_device_cores_and_memory_of_its_own(tmp_path, planned):
    ranks = Options.of({"parallel.strategy": "ddp", "parallel.world_size": 4})
    cases = [*sized(1, options=ranks), *sized(1, options=ranks, device="cuda")]
    need_of = needs_of(cases, RunOptions(num_threads=2), tmp_path, print)
    assert [need_of(case) for case in cases] == [
        Need(device="cpu", num_ranks=4, num_cores=8, memory_bytes=4 * (1000 + PROCESS_BYTES)),
        Need(device="cuda", num_ranks=4, num_cores=8, memory_bytes=1000),
    ]


def test_a_case_that_cannot_be_planned_needs_a_device_only(tmp_path, monkeypatch):
    monkeypatch.setattr(needs, "map_parallel", lambda function, cases, *, preload: [None for _ in cases])
    assert needs_of([CASE], RunOptions(), tmp_path, print)(CASE) == Need(device="cpu")


def test_the_total_of_a_plan_is_what_is_needed():
    from rlhfbench.planning.predict import plan_case

    assert needs._total_bytes(CASE) == plan_case(CASE).memory["total_bytes"]


@pytest.mark.parametrize(
    ("group", "together"),
    [
        ("sweep", ["model", "method", "batch_size", "options"]),
        ("model", ["method", "batch_size", "options"]),
        ("size", ["method", "options"]),
        ("case", []),
    ],
)
def test_groups(group, together):
    changes = {"model": "gpt2", "method": "lora", "batch_size": 2, "options": Options.of({"ppo.gamma": 0.5})}
    same = [
        name
        for name, value in changes.items()
        if GROUPS[group](dataclasses.replace(CASE, **{name: value})) == GROUPS[group](CASE)
    ]
    assert same == together
