import pytest

from rlhfbench.cluster.nodes import GIB, Need, Node, names_of, no_node

CPU = Node(id="a", name="n1", num_cores=8, memory_bytes=16 * GIB)
GPU = Node(id="b", name="n2", num_cores=32, num_gpus=4, memory_bytes=64 * GIB, gpu_bytes=24 * GIB)


@pytest.mark.parametrize(
    ("need", "on_cpu", "on_gpu"),
    [
        (Need(device="cpu"), 8, 32),  # all cores: nothing else runs there
        (Need(device="cpu", num_cores=8), 8, 8),
        (Need(device="cpu", num_cores=9), None, 9),
        (Need(device="cpu", memory_bytes=16 * GIB), 8, 32),
        (Need(device="cpu", memory_bytes=16 * GIB + 1), None, 32),
        (Need(device="cpu", num_ranks=32), 8, 32),
        (Need(device="cpu", num_ranks=33), None, 32),
        (Need(device="cuda"), None, 8),  # a device's share of the cores
        (Need(device="cuda", num_ranks=4), None, 32),
        (Need(device="cuda", num_ranks=5), None, None),
        (Need(device="cuda", memory_bytes=24 * GIB), None, 8),
        (Need(device="cuda", memory_bytes=24 * GIB + 1), None, None),
        (Need(device="cuda", num_cores=2), None, 2),
    ],
)
def test_a_node_holds_what_it_has(need, on_cpu, on_gpu):
    for node, cores in ((CPU, on_cpu), (GPU, on_gpu)):
        assert node.holds(need) == (cores is not None)
        if cores is not None:
            assert node.cores_for(need) == cores


def test_a_node_of_unknown_memory_is_tried():
    assert Node(id="a", name="n1", num_cores=1).holds(Need(device="cpu", memory_bytes=2**50))


def test_what_no_node_can_hold_is_one_sentence():
    need = Need(device="cuda", num_ranks=2, num_cores=4, memory_bytes=80 * GIB)
    others = [Node(id=f"c{i}", name=f"c{i}", num_cores=8, memory_bytes=i * GIB) for i in range(1, 4)]
    assert no_node(need, [GPU]) == (
        "no node can hold it: it needs 2 CUDA devices of 80 GiB, 4 cores, and node n2 has 32 cores, 64 GiB, 4 GPUs of "
        "24 GiB."
    )
    assert no_node(Need(device="cpu", memory_bytes=GIB), others) == (
        "no node can hold it: it needs 1 GiB, and 3 nodes have up to 8 cores, 3 GiB, no GPU."
    )
    assert no_node(Need(device="cpu", num_ranks=33), [CPU]) == (
        "no node can hold it: it needs 9 cores for 33 ranks, and node n1 has 8 cores, 16 GiB, no GPU."
    )
    kinds = [Node(id=str(i), name=f"k{i}", num_cores=i) for i in range(1, 6)]
    assert no_node(Need(device="cuda"), kinds).endswith("node k3 has 3 cores, no GPU; and 2 other kinds.")


def test_nodes_have_the_names_of_their_hosts_where_these_differ():
    alike = [("123456789", "c", "z"), ("223456789", "c", "z")]
    names = names_of([("id1", "a", "x"), ("id2", "b", "x"), ("id3", "b", "y"), *alike])
    assert names == {"id1": "a", "id2": "b/x", "id3": "b/y", "123456789": "c/12345678", "223456789": "c/22345678"}
