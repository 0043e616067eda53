import itertools
import random

import pytest

from rlhfbench.cluster.nodes import GIB, Need, Node
from rlhfbench.cluster.placement import Placement, Work

ONE = Need(device="cpu", num_cores=1)
GPU = Need(device="cuda")


def node(name, num_cores=1, **others):
    return Node(id=f"id-{name}", name=name, num_cores=num_cores, **others)


@pytest.fixture
def works(fake):
    """Makes works of one group, or of a group each."""

    def works(number, need=ONE, group="", **others):
        cases = [fake(seed=seed) for seed in range(number)]
        return [Work(case=c, need=need, group=c.seed if group is None else group, **others) for c in cases]

    return works


def placed(placement):
    """Everything that can start now, as (seed of the case, name of the node)."""
    found = list(iter(placement.next, None))
    return [(work.case.seed, claim.node.name) for work, claim in found], [claim for _, claim in found]


def test_a_group_stays_on_the_machine_that_runs_most_of_it_at_once(works):
    placement = Placement([node("a", 2), node("b", 4), node("c", 4)])
    assert placement.add(works(6)) == []
    started, claims = placed(placement)
    assert started == [(0, "b"), (1, "b"), (2, "b"), (3, "b")]
    placement.release(claims[2])
    assert placed(placement)[0] == [(4, "b")]


def test_cases_on_their_own_spread_over_the_nodes(works):
    placement = Placement([node("a"), node("b", 2)])
    placement.add(works(4, group=None))
    assert sorted(placed(placement)[0]) == [(0, "b"), (1, "a"), (2, "b")]


def test_no_two_cases_share_a_core_a_device_or_memory(works):
    machines = [node("a", 7, num_gpus=3, memory_bytes=5 * GIB), node("b", 4, memory_bytes=6 * GIB), node("c", 2)]
    needs = [
        ONE,
        GPU,
        Need(device="cpu"),
        Need(device="cpu", num_cores=2, memory_bytes=3 * GIB),
        Need(device="cuda", num_ranks=2),
    ]
    rng = random.Random(0)
    placement = Placement(machines)
    waiting = [work for need in needs for work in works(30, need, None)]
    rng.shuffle(waiting)
    assert placement.add(waiting) == []
    running, num_ended = [], 0
    while True:
        running += list(iter(placement.next, None))
        for machine in machines:
            claims = [claim for _, claim in running if claim.node == machine]
            cores = list(itertools.chain.from_iterable(claim.cores for claim in claims))
            assert len(cores) == len(set(cores))
            assert set(cores) <= set(range(machine.num_cores))
            assert sum(claim.num_gpus for claim in claims) <= machine.num_gpus
            assert sum(claim.memory_bytes for claim in claims) <= (machine.memory_bytes or 0)
        if not running:
            break
        _, claim = running.pop(rng.randrange(len(running)))
        placement.release(claim)
        num_ended += 1
    assert num_ended == len(waiting)


def test_cases_that_no_node_can_hold_are_returned_and_their_group_is_divided(works):
    two, nine = (works(number, Need(device="cpu", num_cores=number), "g") for number in (2, 9))
    placement = Placement([node("a", 2), node("b", 1, num_gpus=1)])
    assert placement.add([*two, *nine, *works(2, GPU, "g")]) == nine
    assert sorted(placed(placement)[0]) == [(0, "a"), (0, "b")]


def test_a_lost_node_leaves_its_cases_to_the_others(works):
    placement = Placement([node("a", 2), node("b")])
    placement.add(works(5))
    assert placed(placement)[0] == [(0, "a"), (1, "a")]
    assert placement.lose("id-a") == []
    assert placement.lose("id-a") == []
    assert placed(placement)[0] == [(2, "b")]
    assert [work.case.seed for work in placement.lose("id-b")] == [3, 4]


def test_a_group_moves_as_a_whole_with_the_case_that_is_tried_again(works):
    placement = Placement([node("a"), node("b"), node("c")])
    placement.add(works(3))
    assert placed(placement)[0] == [(0, "a")]
    placement.lose("id-a")
    placement.add(works(1, lost_on=("a",)))
    started, (claim,) = placed(placement)
    assert started == [(1, "b")]
    placement.release(claim)
    assert placed(placement)[0] == [(2, "b")]


def test_a_case_is_tried_again_on_another_node_if_there_is_one(works):
    (work,) = works(1, lost_on=("a",))
    placement = Placement([node("a", 8), node("b")])
    placement.add([work])
    assert placed(placement)[0] == [(0, "b")]
    placement = Placement([node("a")])
    placement.add([work])
    assert placed(placement)[0] == [(0, "a")]


def test_a_block_runs_on_the_machine_of_its_case_or_nowhere(works):
    placement = Placement([node("a", 8), node("b")])
    assert placement.add(works(2, group=None, host="b")) == []
    assert placed(placement)[0] == [(0, "b")]
    gone = works(1, host="c")
    assert placement.add(gone) == gone


def test_a_resumed_group_goes_on_where_it_was(works):
    placement = Placement([node("a", 8), node("b")], homes={"": "b"})
    placement.add(works(2))
    assert placed(placement)[0] == [(0, "b")]


def test_a_node_that_joins_takes_cases(works):
    placement = Placement([node("a")])
    placement.add(works(3, group=None))
    assert len(placed(placement)[0]) == 1
    placement.join(node("b"))
    assert placed(placement)[0] == [(1, "b")]
