import socket

import pytest

from rlhfbench import network
from rlhfbench.network import address_toward, free_port, interface_of, outer_address, url_of


def test_the_address_on_the_way_to_this_machine_is_a_loopback_s():
    address = address_toward("127.0.0.1")
    assert address == "127.0.0.1"
    assert interface_of(address) in ("lo", "lo0")
    assert interface_of("192.0.2.1") is None  # an address of documentation


def test_there_is_no_way_to_a_name_that_does_not_resolve(monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert address_toward("nowhere") is None


@pytest.mark.parametrize(
    ("found", "address"),
    [
        (("127.0.1.1", "10.0.0.1"), "10.0.0.1"),
        (("10.0.0.1", "10.1.0.1"), "10.0.0.1"),
        ((None, "::1", "fe80::1%eth0"), "fe80::1%eth0"),
        (("127.0.0.1", "127.0.0.1"), None),
        ((), None),
    ],
)
def test_the_outer_address_is_no_loopback_s(monkeypatch, found, address):
    monkeypatch.setattr(network, "address_toward", lambda host: found[int(host)])
    assert outer_address(map(str, range(len(found)))) == address


def test_an_address_of_ipv6_has_brackets():
    assert (url_of("one", 1), url_of("fe80::1", 2)) == ("tcp://one:1", "tcp://[fe80::1]:2")


def test_a_free_port_can_be_taken():
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("", port))
        assert taken.getsockname()[1] == port
