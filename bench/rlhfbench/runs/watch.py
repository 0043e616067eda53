"""Serves the page of a run while the run goes on.

A page that is built beside a timed step takes CPU time from it, and the run's record says so. So a page is built only
while a browser shows it and records have come, and then seldom: see ``_REST``.
"""

from __future__ import annotations

import functools
import html
import ipaddress
import mimetypes
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rlhfbench.errors import RlhfBenchError, RunFolderError, SweepError
from rlhfbench.records.file import RECORDS_NAME, read_records
from rlhfbench.runs.drawing import check_drawable
from rlhfbench.runs.folder import RunFolder

# After a build no other begins for ten times its CPU seconds, so that at most a tenth of one CPU goes to the page.
_REST = 10.0
_SCRIPT = "watch.js"
_EMPTY = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} – rlhfbench</title>
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"></head>
<body><main><h1>{title}</h1><p>{text}</p></main></body></html>"""


class LivePage:
    """The page of a run as of its newest records.

    Args:
        run_dir: The folder of the run.
        clock: Seconds, for the pauses between builds.
        cpu_clock: CPU seconds of this thread.
    """

    def __init__(
        self,
        run_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._run_dir = run_dir
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._lock = threading.Lock()
        self._version: str | None = None
        self._text = ""
        self._next_s = 0.0

    def current(self) -> tuple[str, str]:
        """The version of the page and its text, built again if records have come and it has rested."""
        with self._lock:
            version = self._records_version()
            if self._version is None or (version != self._version and self._clock() >= self._next_s):
                started_s = self._cpu_clock()
                self._text = _with_script(self._built(), version)
                self._version = version
                self._next_s = self._clock() + _REST * (self._cpu_clock() - started_s)
            return self._version, self._text

    def _records_version(self) -> str:
        try:
            status = (self._run_dir / RECORDS_NAME).stat()
        except OSError:
            return "none"
        return f"{status.st_mtime_ns:x}-{status.st_size:x}"

    def _built(self) -> str:
        title = self._run_dir.resolve().name
        try:
            if not (self._run_dir / RECORDS_NAME).is_file() or not read_records(self._run_dir):
                return _plain(title, "The run has no records yet. The page follows as they come.")
            return _page_of(self._run_dir)
        except (RlhfBenchError, OSError) as error:
            return _plain(title, str(error))


def _page_of(run_dir: Path) -> str:
    check_drawable(run_dir, read_records(run_dir))
    from rlhfbench.runs.page import read_run
    from rlhfreports.page.data import Page
    from rlhfreports.page.render import page_html

    run = read_run(run_dir)
    status = f'<p role="status" class="caption">{_progress(run_dir, len(run.frame))}</p>'
    return page_html(Page.of([run])).replace("<main", f"{status}<main", 1)


def _progress(run_dir: Path, num_records: int) -> str:
    """The number of recorded cases, of how many; of a search for the largest batch nobody knows how many."""
    folder = RunFolder(run_dir)
    try:
        if folder.settings().get("max_batch_limit") is not None:
            tries = "1 try is" if num_records == 1 else f"{num_records} tries are"
            return f"{tries} recorded. The page follows if others come."
        num_cases = max(len(folder.load_sweep().cases), num_records)
    except RunFolderError:
        return f"{num_records} cases are recorded."
    if num_records == num_cases:
        return f"All {num_cases} cases are recorded."
    return f"{num_records} of {num_cases} cases are recorded. The page follows as others come."


def _plain(title: str, text: str) -> str:
    return _EMPTY.format(title=html.escape(title), text=html.escape(text))


def _with_script(text: str, version: str) -> str:
    before, end, after = text.rpartition("</body>")
    return f'{before}<script type="module" data-version="{version}">{_script()}</script>{end}{after}'


@functools.cache
def _script() -> str:
    return (resources.files("rlhfbench.runs") / _SCRIPT).read_text(encoding="utf-8")


class _Server(ThreadingHTTPServer):
    """Holds what its handlers need."""

    run_dir: Path
    page: LivePage
    only_local: bool

    def server_bind(self) -> None:
        """Binds without the reverse look-up of the host's name, which may ask the network."""
        # Connections of a server that has ended hold its port for a minute.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback of an error, unless it is a browser that left before its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answers with the page, its version, or a file of the run."""
        if self.server.only_local and not _is_local(self.headers.get("Host", "")):
            # A page of another site that got its name to stand for this address.
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        try:
            path = unquote(urlsplit(self.path).path)
        except ValueError:  # such as of a bracket that is not closed
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if path in ("/", "/index.html"):
            self._send(self.server.page.current()[1].encode(), "text/html; charset=utf-8")
        elif path == "/version":
            self._send(self.server.page.current()[0].encode(), "text/plain; charset=utf-8")
        else:
            self._send_file(path)

    def do_HEAD(self) -> None:
        """Answers as ``do_GET`` does, without the content."""
        self.do_GET()

    def _send_file(self, path: str) -> None:
        root = self.server.run_dir.resolve()
        try:
            file = (root / path.lstrip("/")).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            content = file.read_bytes()
        except (OSError, ValueError):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._send(content, mimetypes.guess_type(file.name)[0] or "application/octet-stream")

    def _send(self, content: bytes, media_type: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Prints nothing."""


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(run_dir: Path, host: str, port: int) -> ThreadingHTTPServer:
    """A server of the page of ``run_dir``, bound and not yet serving; ``serve_forever`` serves.

    Args:
        run_dir: The folder of a run, finished or not.
        host: The address to listen on.
        port: The port; 0 for any that is free.

    Raises:
        RunFolderError: The folder holds no run.
        SweepError: The port is no port or is in use, or the host is no address of this machine.
    """
    if not run_dir.is_dir():
        raise RunFolderError(f"run '{run_dir}' cannot be watched: there is no such folder.")
    if not RunFolder(run_dir).is_run:
        raise RunFolderError(f"run '{run_dir}' cannot be watched: there is no run in it.")
    if not 0 <= port < 2**16:
        raise SweepError([f"--port is {port}: it must be from 0 to 65535."])
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise SweepError([f"--host is '{host}': it must be an address of this machine."]) from None
    server_class = type("_ServerOfFamily", (_Server,), {"address_family": family})
    try:
        server: _Server = server_class(address, _Handler)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SweepError([f"--host {host} --port {port} cannot be served: {reason}."]) from None
    server.run_dir, server.page, server.only_local = run_dir, LivePage(run_dir), _is_loopback(host)
    return server
