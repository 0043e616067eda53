import socket
import threading

import pytest

from rlhfbench.cluster import address
from rlhfbench.cluster.address import LOCAL, check_address
from rlhfbench.errors import SweepError

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@pytest.fixture
def server():
    """Starts a server that answers one connection with some bytes; returns its address."""
    threads = []

    def server(answer):
        listening = socket.create_server(("127.0.0.1", 0))

        def serve():
            with listening, listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"127.0.0.1:{listening.getsockname()[1]}"

    yield server
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("text", ["", "remote", "host:", ":1", "host:0", "host:70000", "ray://host:1", "a b:1"])
def test_another_form_of_address_is_one_sentence(text):
    with pytest.raises(
        SweepError, match=r"^--ray is '.*': it must be local, or HOST:PORT of the head of a Ray cluster"
    ):
        check_address(text)


def test_a_cluster_of_this_machine_needs_no_answer():
    check_address(LOCAL)


def test_a_server_of_http_2_is_asked_whether_it_is_a_cluster(server, monkeypatch):
    monkeypatch.setattr(address, "_ASK", "import sys; sys.exit(sys.argv[1] != %r)" % (where := server(SETTINGS)))
    check_address(where)
    monkeypatch.setattr(address, "_ASK", "raise SystemExit(1)")
    with pytest.raises(SweepError, match="no Ray cluster answers there"):
        check_address(server(SETTINGS))


def test_a_cluster_that_asks_for_a_token_says_so(server, monkeypatch):
    monkeypatch.setattr(address, "_ASK", "class AuthenticationError(Exception): pass\nraise AuthenticationError('x')")
    with pytest.raises(SweepError, match=r"the Ray cluster there asks for a token: set RAY_AUTH_MODE=token, and RAY_A"):
        check_address(server(SETTINGS))


def test_a_server_that_keeps_ray_waiting_is_no_cluster(server, monkeypatch):
    monkeypatch.setattr(address, "_ASK", "import threading; threading.Event().wait()")
    monkeypatch.setattr(address, "MAX_S", 0.1)
    with pytest.raises(SweepError, match="no Ray cluster answers there"):
        check_address(server(SETTINGS))


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", SETTINGS[:5]])
def test_another_server_is_no_cluster(server, answer, monkeypatch):
    monkeypatch.setattr(address, "_ASK", "")  # it is not asked
    with pytest.raises(SweepError, match="no Ray cluster answers there"):
        check_address(server(answer))


def test_a_port_that_nobody_listens_on_and_a_server_that_is_silent_are_no_cluster(monkeypatch):
    assert address.CONNECT_S + address.ANSWER_S < address.MAX_S < 10
    monkeypatch.setattr(address, "ANSWER_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SweepError, match=f"^--ray is '{where}': no Ray cluster answers there"):
            check_address(where)
    with pytest.raises(SweepError, match="no Ray cluster answers there"):
        check_address(where)
