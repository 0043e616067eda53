import dataclasses

import pytest

from rlhfbench.errors import SweepError
from rlhfbench.launch import Launch, find_launch, first_host, refuse_launcher

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "one",
    "MASTER_PORT": "29400",
}
SLURM = {
    "SLURM_PROCID": "4",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODELIST": "node[01-20]",  # of the job
    "SLURM_STEP_NODELIST": "node[07-08,11]",
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "2",
}


def test_without_a_launcher_there_is_none():
    assert find_launch({"HOME": "/h"}) is None
    assert find_launch({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None  # one process is no world
    # A shell in an allocation of Slurm is a step of one task.
    assert find_launch({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None


def test_the_variables_of_torchrun():
    launch = Launch(rank=3, size=4, local_rank=1, local_size=2, host="one", port=29400)
    assert find_launch(TORCHRUN) == launch
    assert find_launch({**SLURM, **TORCHRUN}) == launch
    assert find_launch({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).has_store
    assert find_launch({**TORCHRUN, "TORCHELASTIC_RUN_ID": "night"}).job == "night"


def test_the_variables_of_slurm():
    launch = Launch(rank=4, size=5, local_rank=0, local_size=1, host="node07", port=29500, job="17.2")
    assert find_launch(SLURM) == launch
    of_job = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find_launch(of_job) == dataclasses.replace(launch, host="node01")
    first = {**SLURM, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "MASTER_PORT": "1234"}
    launch = Launch(rank=1, size=5, local_rank=1, local_size=2, host="node07", port=1234, job="17.2")
    assert find_launch(first) == launch


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[3-5]", "n3"), ("n[03,09],b", "n03"), ("10.0.0.1", "10.0.0.1")]
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_wrong_variables_are_one_sentence():
    with pytest.raises(SweepError, match=r"^RANK is 'x': the launcher's variable must be an integer of at least 0\.$"):
        find_launch({**TORCHRUN, "RANK": "x"})
    with pytest.raises(SweepError, match=r"^the launcher's rank is 4: it must be below its number of ranks, 4\.$"):
        find_launch({**TORCHRUN, "RANK": "4"})


def test_a_verb_of_one_process_refuses_a_launcher(monkeypatch):
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    refuse_launcher("it")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SweepError, match=r"^it runs in one process, and a launcher started 5: start it without one\.$"):
        refuse_launcher("it")
