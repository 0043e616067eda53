from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhfbench.cases.sweep import Sweep
from rlhfbench.errors import RunFolderError, SweepError
from rlhfbench.runs import watch as module
from rlhfbench.runs.watch import LivePage, make_server

RESULT = Path(__file__).parents[3] / "reports" / "results" / "default-cpu"


class Clock:
    """A clock that only the test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has begun: a sweep and no records."""
    folder = tmp_path / "my <run>"
    folder.mkdir()
    shutil.copy(RESULT / "sweep.toml", folder)
    return folder


def add_record(run_dir: Path, number: int = 0) -> None:
    line = (RESULT / "records.jsonl").read_text().splitlines()[number]
    with (run_dir / "records.jsonl").open("a") as file:
        file.write(line + "\n")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Has a page be the number of builds before it, and keeps the builds."""
    builds: list[Path] = []

    def build(run_dir: Path) -> str:
        builds.append(run_dir)
        return f"<body>page {len(builds)}</body>"

    monkeypatch.setattr(module, "_page_of", build)
    return builds


def test_a_page_is_built_when_records_have_come_and_after_a_rest(run_dir: Path, built: list[Path]) -> None:
    clock = Clock()
    page = LivePage(run_dir, clock, clock)
    version, text = page.current()
    assert "no records yet" in text
    assert "my &lt;run&gt;" in text
    add_record(run_dir)
    first, text = page.current()
    assert first != version
    assert "page 1" in text
    assert page.current() == (first, text)
    assert len(built) == 1


def test_builds_take_at_most_a_tenth_of_the_time(
    run_dir: Path, built: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    page = LivePage(run_dir, clock, clock)
    fast = module._page_of

    def slow(run_dir: Path) -> str:
        clock.now_s += 3.0
        return fast(run_dir)

    monkeypatch.setattr(module, "_page_of", slow)
    add_record(run_dir)
    page.current()
    add_record(run_dir, 1)
    for now_s, num_builds in ((4.0, 1), (32.9, 1), (33.0, 2), (40.0, 2)):
        clock.now_s = max(clock.now_s, now_s)
        page.current()
        assert len(built) == num_builds, now_s


def test_records_that_cannot_be_read_are_said_on_the_page_and_read_again(run_dir: Path, built: list[Path]) -> None:
    page = LivePage(run_dir, Clock(), Clock())
    (run_dir / "records.jsonl").write_text("<b>\n")
    assert "it is not JSON" in page.current()[1]
    (run_dir / "records.jsonl").unlink()
    add_record(run_dir)
    assert "page 1" in page.current()[1]


def test_a_page_has_its_version_and_the_script_that_follows_it(run_dir: Path, built: list[Path]) -> None:
    add_record(run_dir)
    version, text = LivePage(run_dir).current()
    assert f'<script type="module" data-version="{version}">' in text
    assert text.endswith("</script></body>")
    assert 'fetch("version"' in text


def test_the_page_of_a_run_says_how_far_it_is(run_dir: Path) -> None:
    add_record(run_dir)
    text = LivePage(run_dir).current()[1]
    assert "1 of 30 cases are recorded." in text
    assert "page-specs" in text


def test_the_page_of_a_search_for_the_largest_batch_promises_no_end(run_dir: Path) -> None:
    """A sweep of one case is tried at many batch sizes."""
    (run_dir / "environment.json").write_text(json.dumps({"settings": {"max_batch_limit": 512}}))
    for number, says in enumerate(("1 try is recorded.", "2 tries are recorded.")):
        add_record(run_dir, number)
        assert f">{says} The page follows if others come.<" in LivePage(run_dir).current()[1]


Get = Callable[..., tuple[int, str, str]]


@pytest.fixture
def get(run_dir: Path, built: list[Path]) -> Iterator[Get]:
    """Asks a server of ``run_dir``; returns status, media type and text."""
    add_record(run_dir)
    with make_server(run_dir, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def ask(path: str, method: str = "GET", **headers: str) -> tuple[int, str, str]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            connection.close()
            return answer.status, answer.getheader("Content-Type") or "", text

        yield ask
        server.shutdown()
        thread.join()


def test_the_server_answers_with_the_page_its_version_and_files_of_the_run(get: Get, run_dir: Path) -> None:
    status, media_type, text = get("/")
    assert (status, media_type) == (200, "text/html; charset=utf-8")
    assert "page 1" in text
    assert get("/index.html") == (status, media_type, text)
    assert get("/", "HEAD") == (200, media_type, "")
    assert f'data-version="{get("/version")[2]}"' in text
    (run_dir / "traces").mkdir()
    (run_dir / "traces" / "a b.json").write_text("{}")
    assert get("/traces/a%20b.json") == (200, "application/json", "{}")


def test_the_server_gives_nothing_else(get: Get, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    (run_dir / "link").symlink_to(tmp_path / "secret")
    for path in ("/../secret", "/%2e%2e/secret", "//etc/passwd", "/link", "/traces", "/absent", "/a%00b"):
        assert get(path)[0] == 404, path
    assert get("/", Host="evil.example")[0] == 403
    assert get("/", Host="[")[0] == 403
    assert get("http://[/", Host="localhost")[0] == 400
    assert get("/", Host="localhost:1")[0] == 200
    assert get("/", "POST")[0] == 501


@pytest.mark.parametrize(
    ("error", "is_printed"), [(BrokenPipeError, False), (ConnectionResetError, False), (ZeroDivisionError, True)]
)
def test_a_browser_that_has_left_is_no_traceback(
    get: Get,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[Exception],
    is_printed: bool,
) -> None:
    def fail(handler: module._Handler) -> None:
        raise error

    monkeypatch.setattr(module._Handler, "do_GET", fail)
    with pytest.raises(http.client.RemoteDisconnected):
        get("/")
    assert ("Traceback" in capsys.readouterr().err) == is_printed


def test_a_folder_without_a_run_a_port_and_a_host_that_cannot_be_used_are_refused(
    run_dir: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunFolderError, match=r"^run '.*absent' cannot be watched: there is no such folder\.$"):
        make_server(tmp_path / "absent", "127.0.0.1", 0)
    with pytest.raises(RunFolderError, match=r"^run '.*empty' cannot be watched: there is no run in it\.$"):
        make_server(empty, "127.0.0.1", 0)
    for port in (-1, 65536):
        with pytest.raises(SweepError, match=rf"^--port is {port}: it must be from 0 to 65535\.$"):
            make_server(run_dir, "127.0.0.1", port)
    with pytest.raises(SweepError, match=r"^--host is 'a\.\.b': it must be an address of this machine\.$"):
        make_server(run_dir, "a..b", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SweepError, match=rf"^--host 127\.0\.0\.1 --port {port} cannot be served: address already"):
            make_server(run_dir, "127.0.0.1", port)


def test_a_result_has_as_many_records_as_its_sweep_has_cases(tmp_path: Path) -> None:
    """The tests above count on it."""
    cases = Sweep.from_file(RESULT / "sweep.toml").cases
    records = [json.loads(line) for line in (RESULT / "records.jsonl").read_text().splitlines()[: len(cases)]]
    assert {record["case"]["id"] for record in records} == {case.id for case in cases}
    assert len(cases) == 30
    assert records[0]["outcome"] == "ok"


def test_a_server_can_follow_another_on_its_port_at_once(run_dir: Path) -> None:
    with make_server(run_dir, "127.0.0.1", 0) as server:
        assert server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
