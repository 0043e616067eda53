"""Answers of Ray that no cluster here would give."""

from __future__ import annotations

import pytest

pytest.importorskip("ray")

from ray.exceptions import OutOfMemoryError

from rlhfbench.cluster import ray_transport
from rlhfbench.cluster.nodes import Node
from rlhfbench.cluster.placement import Claim
from rlhfbench.cluster.ray_transport import RayTransport


def test_a_case_that_rays_memory_monitor_ends_is_out_of_memory_and_its_agent_is_not_asked_again(monkeypatch):
    def get(ref):
        raise OutOfMemoryError("the node is low on memory")

    monkeypatch.setattr(ray_transport.ray, "get", get)
    transport = RayTransport(server={}, describe={}, add_nodes=dict, tell=str)
    claim = Claim(node=Node(id="0", name="one", num_cores=2), cores=(0, 1), num_gpus=0, memory_bytes=1)
    transport._running["ref"] = claim, "the agent"
    answer = transport._answer("ref")
    assert answer.fields["result"] == {
        "outcome": "oom",
        "error": {"kind": "OutOfMemoryError", "message": "Ray ended it: node one was out of memory.", "phase": None},
    }
    assert (transport._running, transport._idle) == ({}, {})
