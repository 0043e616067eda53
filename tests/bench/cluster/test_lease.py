"""A process whose cluster does not answer any more ends itself."""

import socket
import threading
import types

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


def test_a_lease_counts_from_the_last_answer(monkeypatch):
    """A lease of 30 s: the head answers, misses and answers again, 20 s apart, and then misses for good."""
    answers, seconds = [True, False, True], iter(range(0, 1000, 20))
    monkeypatch.setattr(lease, "ASK_S", 0.0)
    monkeypatch.setattr(lease, "time", types.SimpleNamespace(monotonic=lambda: next(seconds)))
    monkeypatch.setattr(lease, "_answers", lambda *_: bool(answers) and answers.pop(0))
    lease._watch("", 0, lambda: None)
    assert next(seconds) == 120  # 60 had it counted from the first one
