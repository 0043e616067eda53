"""A process whose cluster does not answer any more ends itself."""

import socket
import threading

from rlhfbench.cluster import lease

LONGEST_S = 30.0


def test_a_process_ends_when_the_head_has_not_answered_for_its_lease(monkeypatch):
    monkeypatch.setattr(lease, "ASK_S", 0.01)
    monkeypatch.setattr(lease, "LEASE_S", float("inf"))
    ended = threading.Event()
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))  # it refuses connections until it listens
        lease.keep_lease(f"127.0.0.1:{head.getsockname()[1]}", ended.set)
        head.listen()
        head.settimeout(LONGEST_S)
        head.accept()[0].close()
        monkeypatch.setattr(lease, "LEASE_S", 0.0)
        for _ in range(3):
            head.accept()[0].close()
        assert not ended.is_set()
    assert ended.wait(LONGEST_S)
