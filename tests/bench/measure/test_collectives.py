import time
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from rlhfbench.measure.collectives import CollectiveCounter, tensor_bytes
from rlhfbench.measure.ranks import communication, imbalance, own_s, slowest, world_object
from rlhfkernels.config.options import ParallelOptions


@pytest.fixture
def _group(tmp_path, monkeypatch):
    """A process group of this process alone, whose collectives go through the dispatcher all the same."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_group")
def test_calls_and_bytes_of_every_collective_by_phase():
    counter = CollectiveCounter("cpu")
    ones = torch.ones(10)
    with counter:
        with counter.phase("generate"):
            distributed.broadcast(ones, 0)
            distributed.all_gather([torch.empty(10)], ones)
            distributed.barrier()
        with counter.phase("update"):
            for _ in range(3):
                distributed.all_reduce(ones.double())
            distributed.reduce_scatter(torch.empty(10), [ones])
            torch.ones(2) + 1
        distributed.all_reduce(ones)
    assert counter.calls == {
        "generate": {"broadcast": 1, "all_gather": 1, "barrier": 1},
        "update": {"all_reduce": 3, "reduce_scatter": 1},
        "outside": {"all_reduce": 1},
    }
    assert counter.num_bytes["generate"] == {"broadcast": 40, "all_gather": 40, "barrier": 0}
    assert counter.num_bytes["update"] == {"all_reduce": 240, "reduce_scatter": 40}
    assert set(counter.phase_s) == {"generate", "update"}


def bytes_of_two_ranks(world):
    with CollectiveCounter("cpu") as counter, counter.phase("update"):
        distributed.all_gather([torch.empty(10), torch.empty(10)], torch.ones(10))
        distributed.reduce_scatter(torch.empty(10), [torch.ones(10), torch.ones(10)])
    return counter.num_bytes["update"]


def test_bytes_are_those_of_the_whole_tensors(on_ranks):
    assert on_ranks(2, bytes_of_two_ranks) == [{"all_gather": 80, "reduce_scatter": 80}] * 2


@pytest.mark.usefixtures("_group")
def test_waiting_belongs_to_its_phase_and_ends_with_the_block(monkeypatch):
    wait = distributed.Work.wait
    backward = torch.autograd.graph._engine_run_backward

    def wait_long(work, *args):
        time.sleep(0.001)
        return wait(work, *args)

    monkeypatch.setattr(distributed.Work, "wait", wait_long)
    with CollectiveCounter("cpu") as counter:
        with counter.phase("generate"):
            torch.ones(2).sum()
        with counter.phase("update"):
            distributed.all_reduce(torch.ones(2))
    assert "generate" not in counter.waiting_s
    assert 0.001 <= counter.waiting_s["update"] <= counter.phase_s["update"]
    assert distributed.Work.wait is wait_long
    assert torch.autograd.graph._engine_run_backward is backward


def test_a_backward_pass_without_collectives_waits_for_nothing():
    weight = torch.ones(3, requires_grad=True)
    with CollectiveCounter("cpu") as counter, counter.phase("update"):
        (weight * 2).sum().backward()
    assert counter.waiting_s == {}
    assert weight.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.usefixtures("_group")
def test_a_backward_pass_waits_for_no_collective_that_was_issued_before_it():
    weight = torch.ones(3, requires_grad=True)
    with CollectiveCounter("cpu") as counter, counter.phase("update"):
        work = distributed.all_reduce(torch.ones(2), async_op=True)
        (weight * 2).sum().backward()
        assert counter.waiting_s == {}
        work.wait()


def test_cpu_seconds_are_those_of_all_ranks_on_this_machine():
    world = SimpleNamespace(gather=lambda mine: [mine, ("another", 5.0), (mine[0], 2.0)])
    assert own_s(1.0, world) == 3.0


def test_bytes_of_nested_tensors():
    assert tensor_bytes([[torch.ones(2)], [torch.ones(3, dtype=torch.float64)], 5]) == 8 + 24


def test_a_device_that_waits_is_not_the_process():
    counter = CollectiveCounter("cpu")
    counter.phase_s = {"update": 1.0}
    assert communication(counter, "cpu")["waiting_s"] == {"update": 0.0}
    assert communication(counter, "cuda:1")["waiting_s"] is None


def test_the_slowest_rank_is_that_of_the_longest_steps_and_not_of_the_longest_phase():
    one = [{"generate": 3.0, "update": 1.0}, {"generate": 3.0, "update": 1.0}]
    other = [{"generate": 1.0, "update": 3.5}, {"generate": 1.0, "update": 3.0}]
    assert slowest([one, other]) == 1
    assert slowest([one, one]) == 0


def rank(total_bytes, spent_s, waiting_s, steps_s):
    memory = {"total_bytes": total_bytes, "peak_phase": "update", "parts": {"base": total_bytes}}
    memory |= {"views": {"host_peak_bytes": 7}, "phases": {"update": {"total_bytes": total_bytes, "parts": {}}}}
    return {
        "host": "here",
        "device": "cpu",
        "num_threads": 1,
        "memory": memory,
        "steps_s": [{"update": seconds} for seconds in steps_s],
        "collectives": {"update": {"all_reduce": {"calls": 2, "bytes": 10}, "broadcast": {"calls": 1, "bytes": 5}}},
        "communication_step_s": {"update": spent_s},
        "waiting_s": None if waiting_s is None else {"update": waiting_s},
    }


def test_the_world_of_a_record():
    ranks = [rank(10, 4.0, 1.0, [1.0]), rank(30, 4.0, 0.0, [2.0]), rank(20, 4.0, 2.0, [1.5])]
    world = world_object(ParallelOptions(strategy="deepspeed", world_size=3, zero_stage=3), ranks)
    assert (world["size"], world["parallel"], world["zero_stage"], world["gather"]) == (3, "deepspeed", 3, "layer")
    assert (world["worst_rank"], world["slowest_rank"]) == (1, 1)
    assert (world["communication_calls"], world["communication_bytes"]) == (3, 15)
    assert world["waiting_share"] == pytest.approx(3 / 12)
    assert world["imbalance"] == pytest.approx(4 / 3 - 1)  # they were busy for 3, 4 and 2 s
    assert [r["phases"]["update"]["mean_s"] for r in world["ranks"]] == [1.0, 2.0, 1.5]
    assert [r["phases"]["update"]["waiting_s"] for r in world["ranks"]] == [1.0, 0.0, 2.0]
    assert [r["total_bytes"] for r in world["ranks"]] == [10, 30, 20]


def test_waiting_that_was_not_measured_is_absent():
    ranks = [rank(10, 4.0, None, [1.0])] * 2
    world = world_object(ParallelOptions(strategy="ddp", world_size=2), ranks)
    assert (world["waiting_share"], world["imbalance"], world["zero_stage"]) == (None, None, None)
    assert imbalance(ranks) is None
