"""The page of a run that goes on, in a real browser."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.runs import watch
from rlhfbench.runs.watch import make_server

RESULT = Path(__file__).parents[2] / "reports" / "results" / "default-cpu"
WATCHING = "html[data-watching=true]"
_WAIT_MS = 60_000


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shutil.copy(RESULT / "sweep.toml", tmp_path)
    return tmp_path


@pytest.fixture
def url(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(watch, "_REST", 0.0)
    with make_server(run_dir, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def test_the_page_follows_the_run_and_keeps_what_the_reader_chose(browser: Any, url: str, run_dir: Path) -> None:
    lines = (RESULT / "records.jsonl").read_text().splitlines(keepends=True)
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    assert "no records yet" in page.inner_text("main")
    with (run_dir / "records.jsonl").open("a") as file:
        file.writelines(lines[:2])
    # Longer than a buffer, the lines may reach the file one after the other.
    has_records = "(num) => document.querySelector('[role=status]')?.innerText.startsWith(`${num} of 30 cases`)"
    page.wait_for_function(has_records, arg=2, timeout=_WAIT_MS)
    page.wait_for_selector(WATCHING, timeout=_WAIT_MS)
    chart = page.locator("figure:has([data-chart='latency'])")
    chart.locator("select").select_option("tokens per second")
    page.locator("details:has(pre) > summary").first.click()
    with (run_dir / "records.jsonl").open("a") as file:
        file.writelines(lines[2:4])
    page.wait_for_function(has_records, arg=4, timeout=_WAIT_MS)
    page.wait_for_selector(WATCHING, timeout=_WAIT_MS)
    assert chart.locator("select").input_value() == "tokens per second"
    assert page.locator("details:has(pre)").first.evaluate("fold => fold.open")
    page.close()
    assert {request.split("?")[0] for request in asked if not request.startswith(("blob:", "data:"))} == {
        url,
        f"{url}version",
    }
