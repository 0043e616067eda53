"""The address of a cluster: its form, and whether a cluster answers there."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

from rlhfbench.errors import SweepError

LOCAL = "local"
CONNECT_S = 2.0
ANSWER_S = 3.0
MAX_S = 9.0  # for all of it
_ADDRESS = re.compile(r"(?P<host>[^\s:/\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
# What a client of HTTP/2 sends first: the preface, and an empty frame of settings. Every gRPC server answers with its
# own settings, whose frame has this type.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
# Asks the control store of the cluster. In a process of its own: Ray tries for half a minute and cannot be stopped.
_ASK = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
_SETTINGS, _TYPE_PLACE, _HEADER_BYTES = 4, 3, 9


def check_address(address: str) -> None:
    """Checks that ``address`` is ``local``, or that a Ray cluster answers there, within 10 s.

    Raises:
        SweepError: it has another form, or nothing answers.
    """
    if address == LOCAL:
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 2**16:
        raise SweepError([f"--ray is '{address}': it must be local, or HOST:PORT of the head of a Ray cluster."])
    deadline_s = time.monotonic() + MAX_S
    problem: str | None = "no Ray cluster answers there"
    if _is_grpc(found["host"].strip("[]"), int(found["port"])):
        problem = _refusal(address, deadline_s)
    if problem is not None:
        raise SweepError([f"--ray is '{address}': {problem}."])


def _refusal(address: str, deadline_s: float) -> str | None:
    """The reason why the control store of a Ray cluster cannot be asked; ``None`` if it answers."""
    try:
        subprocess.run(
            [sys.executable, "-P", "-c", _ASK, address],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=max(deadline_s - time.monotonic(), 0.1),
            check=True,
        )
    except subprocess.CalledProcessError as error:
        if b"AuthenticationError" in error.stderr:  # as Ray 2.60 has it by default
            return "the Ray cluster there asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or its file"
    except (OSError, subprocess.SubprocessError):
        pass
    else:
        return None
    return "no Ray cluster answers there"


def _is_grpc(host: str, port: int) -> bool:
    """True if a server of HTTP/2 answers, as that of a cluster does: most wrong addresses are told at once."""
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
