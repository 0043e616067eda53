"""A browser, and the page of a run with everything that a page can show."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parents[2] / "reports" / "results"
RESULT = RESULTS / "default-cpu"
READY = "html[data-ready=true]"
HOSTILE = "</script><script>alert('run')</script><img src=x onerror=alert(1)>"
_WAIT_MS = 60_000
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")  # and no longer: its event loop runs in this thread
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's, driven by Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("playwright is not installed")
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        # Without a sandbox, as tests may run as root; the page is of this project's making.
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def expect(browser: Any) -> Any:
    """Playwright's assertions, which wait until they hold: the page answers a click after it returned."""
    from playwright.sync_api import expect as assertions

    assertions.set_options(timeout=_WAIT_MS)
    return assertions


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 cases: two of them failed, one with hostile text; the largest case of a method was profiled."""
    folder = tmp_path_factory.mktemp("browser") / "a run"
    shutil.copytree(RESULT, folder, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    records = [json.loads(line) for line in (RESULT / "records.jsonl").read_text().splitlines()]
    whole = [record for record in records if "case" in record]
    _fail(whole[-1], "oom", "out of memory")
    _fail(whole[-2], "crashed", HOSTILE)
    failed = {record["case"]["id"] for record in whole[-2:]}
    kept = [record for record in records if record.get("block_of") not in failed]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    largest = max(whole[:-2], key=lambda r: (r["case"]["prompt_len"], r["case"]["batch_size"]))
    sizes = ("prompt_len", "completion_len", "batch_size")
    alike = [record for record in whole if all(record["case"][key] == largest["case"][key] for key in sizes)]
    for number, record in enumerate(alike):
        _profile(folder, record["case"]["id"], number)
        _name_tensors(folder, record["case"]["id"])
    return folder


def _name_tensors(folder: Path, case_id: str) -> None:
    """Names one tensor of a timeline, as large as half of the base: it lives throughout."""
    path = folder / "timelines" / f"{case_id}.json"
    timeline = json.loads(path.read_text())
    columns: dict[str, list[Any]] = {
        "part": ["base"],
        "bytes": [timeline["parts_bytes"]["base"][0] // 2],
        "born_event": [1],
        "first_event": [1],
        "end_event": [timeline["num_events"] + 1],
        "shape": [[8192, 256]],
        "dtype": ["float32"],
        "op": [HOSTILE],
    }
    path.write_text(json.dumps(timeline | {"tensors": columns}))


def _fail(record: dict[str, Any], outcome: str, message: str) -> None:
    record["outcome"] = outcome
    record["error"] = {"kind": "Error", "message": message, "phase": "generate"}
    for key in ("memory", "latency", "work", "stats"):
        record[key] = dict.fromkeys(record[key]) if isinstance(record[key], dict) else None
    record["memory"] |= {"parts": {}, "phases": {}, "views": {}}
    record["latency"] |= {"phases": {}}
    record["work"] |= {"phases": {}}
    record["stats"] = {}


PHASE: dict[str, Any] = {
    "phase": "generate",
    "trace": "generate.json.gz",
    "wall_s": 2.0,
    "num_ops": 30,
    "ops": [
        {"name": f"aten::op{i}", "kind": "torch op", "count": i, "self_s": i / 100, "device_s": 0.0}
        for i in range(20, 0, -1)
    ]
    + [{"name": HOSTILE, "kind": "native op", "count": 3, "self_s": 0.15, "device_s": 0.0}],
    "kernels": [],
    "outside_s": 0.25,
    "stacks": {
        "wall_s": 2.0,
        "name": ["rlhf/engine.py(3): generate", "rlhf/ops.py(9): matmul", "aten::mm", HOSTILE],
        "kind": ["Python", "Python", "torch op", "native op"],
        "parent": [-1, 0, 1, 0],
        "total_s": [2.0, 1.0, 0.75, 0.5],
        "device_s": [0.0] * 4,
        "count": [1, 2, 20, 3],
    },
}


def _profile(folder: Path, case_id: str, number: int) -> None:
    """Writes a profile that differs from those of other numbers."""
    first = copy.deepcopy(PHASE)
    first["ops"] = first["ops"][number:]
    first["stacks"]["total_s"][2] /= 1 + number
    second = copy.deepcopy(first) | {"phase": "update_actor"}
    second["stacks"]["name"][1] = "rlhf/loss.py(9): policy"
    second["ops"] = second["ops"][5:]
    (folder / "traces" / case_id).mkdir(parents=True)
    profile = {"case_id": case_id, "device": "cpu", "phases": [first, second], "allocator": None}
    (folder / "traces" / case_id / "profile.json").write_text(json.dumps(profile))


@pytest.fixture(scope="session")
def ranks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four methods over two ranks in each strategy, of which DPO's last did not fit."""
    folder = tmp_path_factory.mktemp("browser") / "ranks"
    shutil.copytree(RESULTS / "two-ranks", folder, ignore=shutil.ignore_patterns("*.png", "*.svg"))
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    *_, last = (record for record in records if "case" in record)
    _fail(last, "oom", "out of memory")
    kept = [record for record in records if record.get("block_of") != last["case"]["id"]]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder


# Which cases a page of little has, by its name, and whether they failed.
LITTLE: dict[str, tuple[Callable[[dict[str, Any]], bool], bool]] = {
    "one case": (lambda case: (case["method"], case["prompt_len"], case["batch_size"]) == ("hydra", 64, 4), False),
    "one length": (lambda case: case["prompt_len"] == 64, False),
    "all failed": (lambda case: case["prompt_len"] == 64, True),
    "empty": (lambda case: False, False),
}


def _little(folder: Path, name: str) -> Path:
    """The run of a name of ``LITTLE``."""
    shutil.copytree(RESULT, folder, ignore=shutil.ignore_patterns("*.png", "*.svg", "*.html"))
    keep, fails = LITTLE[name]
    records = [json.loads(line) for line in (RESULT / "records.jsonl").read_text().splitlines()]
    kept = [record for record in records if "case" in record and keep(record["case"])]
    ids = {record["case"]["id"] for record in kept}
    if fails:
        for record in kept:
            _fail(record, "oom", "out of memory")
    else:
        kept += [record for record in records if record.get("block_of") in ids]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder


@pytest.fixture(scope="session")
def page_of(run_dir: Path, ranks_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The page of the run of a name, written once."""
    from rlhfbench.runs.page import write_run_page

    @functools.cache
    def written(name: str) -> Path:
        folder = {"one process": run_dir, "ranks": ranks_dir}.get(name)
        folder = folder or _little(tmp_path_factory.mktemp("browser") / name, name)
        write_run_page([folder], folder / "index.html")
        return folder / "index.html"

    return written


class Opened:
    """A page, and what it said and asked for since it was opened."""

    def __init__(self, page: Any, name: str, path: Path) -> None:
        self.page = page
        self.name = name
        self.said: list[str] = []
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("dialog", self._dismiss)
        self.url = path.as_uri()
        page.goto(self.url)
        page.wait_for_selector(READY, timeout=_WAIT_MS)

    def _dismiss(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()


@pytest.fixture(scope="module")
def opened(request: pytest.FixtureRequest, browser: Any, page_of: Callable[[str], Path]) -> Iterator[Opened]:
    """A page at a common size in light mode: of one process unless a test names another."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    name = getattr(request, "param", "one process")
    yield Opened(context.new_page(), name, page_of(name))
    context.close()


@pytest.fixture
def page(opened: Opened) -> Iterator[Any]:
    """The page of ``opened``. Tests leave the switches as they were."""
    yield opened.page
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(media="screen", color_scheme="light")
    opened.page.wait_for_function("() => !document.documentElement.classList.contains('dark')", timeout=_WAIT_MS)
