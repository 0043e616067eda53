"""The executor of this machine: threads of a plan, servers of rounds of blocks, and what a dead case died of."""

from pathlib import Path

import pytest

from rlhfbench.runs import case_process, worker
from rlhfbench.runs.execution import Task
from rlhfbench.runs.job import Exit
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options


def threads(options, asked=None):
    sizes = {"prompt_len": 4, "completion_len": 4, "batch_size": 1}
    case = Case(method="dpo", model="tiny", options=Options.of(options), **sizes)
    request = {"case": case.to_dict(), "settings": {"num_threads": asked}}
    return case_process._num_threads(Task(case=case, request=request, log_path=Path(), timeout_s=1.0))


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch):
    monkeypatch.setattr(worker, "num_cores", lambda: 8)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_a_case_is_planned_with_the_threads_that_it_runs_with(monkeypatch):
    ranks = {"parallel.strategy": "ddp", "parallel.world_size": 4}
    assert threads({}) is None
    assert threads({}, 3) == threads(ranks, 3) == 3
    assert threads(ranks) == 2
    assert threads({**ranks, "parallel.world_size": 16}) == 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert threads(ranks) == 8  # the others are on machines of their own


class StubServer:
    """A server whose start takes two seconds of those that a round is compared with."""

    def __init__(self):
        self.start_s, self.calls = 0.0, []

    def start(self):
        self.start_s = 2.0
        self.calls.append("start")

    def close(self):
        self.calls.append("close")


def test_a_round_gets_a_server_of_its_own_if_starting_it_takes_less_time(monkeypatch):
    server = StubServer()
    machine = case_process.ThisMachine(server)
    machine.start()
    machine.start(round_s=1.9)
    assert server.calls == ["start", "start"]
    machine.start(round_s=2.1)
    assert server.calls[2:] == ["close", "start"]


@pytest.mark.parametrize("vanishes", [True, False])
@pytest.mark.parametrize(
    ("module", "name"), [(case_process.versions, "installed"), (case_process.environment, "package_versions")]
)
def test_no_server_imports_other_code_than_the_one_before(monkeypatch, module, name, vanishes):
    def changed():
        if vanishes:
            raise FileNotFoundError
        return "another"

    machine = case_process.ThisMachine(server := StubServer())
    machine.start()
    monkeypatch.setattr(module, name, changed)
    machine.start(round_s=2.1)
    assert server.calls == ["start", "start"]


@pytest.mark.parametrize(("number", "name"), [(11, "SIGSEGV"), (40, "signal 40")])
def test_a_case_that_a_signal_killed_names_it_also_where_it_has_no_name(number, name):
    end = Exit(pid=1, code=-number, max_rss_bytes=None)
    found = case_process._death(end, "score", timeout_s=1.0, oom_killed=False, log="")
    assert found["error"] == {"kind": name, "message": f"it was killed by {name}.", "phase": "score"}
