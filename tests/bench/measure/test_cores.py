"""Cores that two processes share while they take turns."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys

import pytest

from rlhfbench.measure import cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process")


@pytest.fixture
def machine(monkeypatch):
    """Eight hardware threads: four cores, of which thread ``n`` and ``n + 4`` are one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cores, "_siblings", lambda number: f"{number % 4},{number % 4 + 4}")


def test_cores_are_neighbours_with_all_their_hardware_threads(machine):
    drawn = [cores.draw_cores(2, random.Random(seed)) for seed in range(40)]
    assert {tuple(sorted(numbers)) for numbers in drawn} == {(0, 1, 4, 5), (1, 2, 5, 6), (2, 3, 6, 7), (0, 3, 4, 7)}


@pytest.mark.parametrize("number", [4, 9])
def test_nothing_is_drawn_where_every_core_is_needed(machine, number):
    assert cores.draw_cores(number, random.Random(0)) is None


def test_nothing_is_drawn_where_no_process_can_be_bound(machine, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.draw_cores(1, random.Random(0)) is None


def test_a_machine_that_does_not_say_which_threads_are_one_core_has_a_core_for_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    monkeypatch.setattr(cores, "_TOPOLOGY", "/nowhere/{}")
    assert {tuple(cores.draw_cores(1, random.Random(seed)) or ()) for seed in range(20)} == {(3,), (5,)}


_CHILD = """
import os, socket, sys, threading
threading.Thread(target=sys.stdin.read, daemon=True).start()
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(1)
print([sorted(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")], flush=True)
"""


def test_every_thread_of_the_peer_is_bound_and_this_process_is_not(tmp_path):
    core, before = min(os.sched_getaffinity(0)), os.sched_getaffinity(0)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        with subprocess.Popen(
            [sys.executable, "-c", _CHILD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            connection, _ = listener.accept()
            with connection:
                cores.bind_peer(connection, [core])
                connection.sendall(b"g")
                out = child.stdout.readline()  # its other thread lives until its input ends
                child.communicate()
    assert out.strip() == f"[[{core}], [{core}]]"
    assert os.sched_getaffinity(0) == before


def test_a_peer_that_is_gone_is_no_error(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        leaves = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        subprocess.run([sys.executable, "-c", leaves, path], check=True)
        connection, _ = listener.accept()
    with connection:
        cores.bind_peer(connection, [0])
