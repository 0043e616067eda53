import dataclasses
import itertools
import os

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.runs import case_process
from rlhfbench.runs.case_runner import dominates
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options

CASE = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=2)


pytestmark = pytest.mark.usefixtures("fake_server")


def test_every_way_to_die_is_an_outcome_and_the_run_continues(tmp_path, sweep_of, run):
    result = run(sweep_of("segfault", "exit", "die", "hang", "unknown", "ok"), tmp_path / "run", case_timeout_s=5)
    by_kind = {r["case"]["options"]["data"]["prompt_field"]: r for r in result.records}
    assert {kind: r["outcome"] for kind, r in by_kind.items()} == {
        "segfault": "crashed",
        "exit": "crashed",
        "die": "crashed",
        "hang": "timeout",
        "unknown": "crashed",
        "ok": "ok",
    }
    assert by_kind["segfault"]["error"]["kind"] == "SIGSEGV"
    assert by_kind["segfault"]["error"]["phase"] == "score"
    assert by_kind["exit"]["error"]["message"] == (
        "it exited with status 7 and left no result. Last line of its log: before the end"
    )
    assert by_kind["die"]["error"]["kind"] == "SIGKILL"
    assert by_kind["hang"]["error"]["message"] == "it was killed after 5 s."
    assert "KeyError: 'unknown'" in by_kind["unknown"]["error"]["message"]
    log = tmp_path / "run" / "logs" / f"{by_kind['unknown']['case']['id']}.log"
    assert "Traceback" in log.read_text()


def test_a_kill_by_the_kernel_for_memory_is_oom(tmp_path, monkeypatch, sweep_of, run):
    counter = itertools.count()
    monkeypatch.setattr(case_process, "num_oom_kills", lambda: next(counter))
    result = run(sweep_of("die", "segfault"), tmp_path / "run")
    assert [r["outcome"] for r in result.records] == ["oom", "crashed"]
    assert "it: the machine was out of memory." in result.records[0]["error"]["message"]


def test_a_case_over_its_memory_limit_is_oom(tmp_path, sweep_of, run):
    result = run(sweep_of("over-limit", "ok"), tmp_path / "run", memory_limit_bytes=2**28)
    assert [r["outcome"] for r in result.records] == ["oom", "ok"]
    assert result.records[0]["error"]["kind"] == "MemoryError"


def test_a_server_that_dies_costs_one_case(tmp_path, sweep_of, run, watching):
    class Killing(watching):
        def doing(self, what):
            if what.startswith("hanging"):
                os.kill(int(what.split()[2]), 9)

    result = run(sweep_of("hang", "ok"), tmp_path / "run", Killing())
    assert [r["outcome"] for r in result.records] == ["crashed", "ok"]
    assert result.records[0]["error"]["kind"] == "ServerDied"


def test_cases_that_dominate_an_oom_case_are_skipped_and_name_it(tmp_path, run):
    spec = {
        "methods": ["hydra", "lora"],
        "models": "tiny",
        "seq_lens": [4, 8],
        "batch_sizes": [2, 4],
        "options": {"data.prompt_field": "oom-from-batch-4"},
    }
    result = run(Sweep.from_spec(spec), tmp_path / "run")
    outcomes = {(r["case"]["method"], r["case"]["batch_size"], r["case"]["prompt_len"]): r for r in result.records}
    assert {key: r["outcome"] for key, r in outcomes.items()} == {
        **{(method, 2, length): "ok" for method in ("hydra", "lora") for length in (2, 4)},
        **{(method, 4, 2): "oom" for method in ("hydra", "lora")},
        **{(method, 4, 4): "skipped" for method in ("hydra", "lora")},
    }
    failed, skipped = outcomes["hydra", 4, 2], outcomes["hydra", 4, 4]
    assert failed["case"]["id"] in skipped["error"]["message"]
    assert skipped["error"]["kind"] == "Dominates"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"prompt_len": 5}, True),
        ({"completion_len": 5, "batch_size": 3, "options": Options.of({"lora.r": 17})}, True),
        ({"seed": 1}, True),
        ({"prompt_len": 3}, False),
        ({"completion_len": 9, "batch_size": 1}, False),
        ({"options": Options.of({"lora.r": 8})}, False),
        ({"method": "lora"}, False),
        ({"model": "gpt2"}, False),
        ({"device": "cuda"}, False),
        ({"dtype": "bfloat16"}, False),
        ({"options": Options.of({"ppo.gamma": 0.5})}, False),
    ],
)
def test_dominates(change, expected):
    assert dominates(dataclasses.replace(CASE, **change), CASE) is expected
