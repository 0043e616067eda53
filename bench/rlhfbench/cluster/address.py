"""The address of a cluster: its form, and whether anything there may be one."""

from __future__ import annotations

import re
import socket

from rlhfbench.errors import SweepError

LOCAL = "local"
CONNECT_S = 2.0
ANSWER_S = 3.0
_ADDRESS = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
# What a client of HTTP/2 sends first: the preface, and an empty frame of settings. Every gRPC server answers with its
# own settings, whose frame has this type.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS, _TYPE_PLACE, _HEADER_BYTES = 4, 3, 9


def check_address(address: str) -> None:
    """Checks that ``address`` is ``local``, or that a gRPC server answers there. Ray itself would try for minutes.

    Raises:
        SweepError: it has another form, or nothing answers.
    """
    if address == LOCAL:
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise SweepError([f"--ray is '{address}': it must be local, or HOST:PORT of the head of a Ray cluster."])
    if not _answers(found["host"].strip("[]"), int(found["port"])):
        raise SweepError([f"--ray is '{address}': no Ray cluster answers there."])


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_S) as connection:
            connection.settimeout(ANSWER_S)
            connection.sendall(_PREFACE)
            header = b""
            while len(header) < _HEADER_BYTES and (more := connection.recv(_HEADER_BYTES - len(header))):
                header += more
    except OSError:
        return False
    return len(header) == _HEADER_BYTES and header[_TYPE_PLACE] == _SETTINGS
