"""The addresses and the network interface of this machine that others reach it by."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable


def address_toward(host: str) -> str | None:
    """This machine's address on the way to ``host``, which may be itself; ``None`` where there is no way."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of UDP: nothing is sent
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None


def outer_address(hosts: Iterable[str]) -> str | None:
    """This machine's address on the way to the first of ``hosts`` that is another machine, or that names its network.

    A name of this machine may stand for a loopback address, as Debian's installer has it in ``/etc/hosts``: other
    machines cannot connect to that.
    """
    found = (address_toward(host) for host in hosts)
    return next((address for address in found if address and not ipaddress.ip_address(address).is_loopback), None)


def interface_of(address: str) -> str | None:
    """The name of the interface that has ``address``; ``None`` if none does."""
    import psutil  # here: only cases of several ranks need it

    return next(
        (
            name
            for name, found in psutil.net_if_addrs().items()
            if any(each.address.partition("%")[0] == address for each in found)
        ),
        None,
    )


def url_of(host: str, port: int) -> str:
    """``tcp://host:port``, with brackets around an address of IPv6."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as found:
        found.bind(("", 0))
        port: int = found.getsockname()[1]
        return port
