import dataclasses
import io

import pytest

from rlhfbench.runs.progress import BarProgress, LineProgress, TimeLeft, clock, make_progress, title
from rlhfkernels.config.case import Case
from rlhfkernels.config.options import Options
from rlhfkernels.config.settings import SETTINGS

SMALL = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=1)
LARGE = Case(method="lora", model="tiny", prompt_len=8, completion_len=8, batch_size=2)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(outcome="ok", message=None):
    error = None if message is None else {"kind": "K", "message": message, "phase": None}
    return {"outcome": outcome, "error": error, "wall_s": 1.25}


def test_a_terminal_gets_a_bar_and_anything_else_lines():
    assert isinstance(make_progress(Terminal()), BarProgress)
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_a_line_a_case():
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.begin([SMALL, LARGE], num_recorded=3)
    progress.start_case(SMALL)
    progress.doing("timing")
    progress.finish_case(SMALL, record())
    progress.notice("by the way")
    progress.start_case(LARGE)
    progress.finish_case(LARGE, record("oom", "no room"))
    progress.end()
    assert stream.getvalue().splitlines() == [
        "2 cases to run, 3 already recorded",
        "[1/2] hydra tiny 4+4 x1 ok 1.2 s 0:00 left",
        "by the way",
        "[2/2] lora tiny 8+8 x2 oom 1.2 s · no room",
    ]


def test_a_bar_shows_the_current_case_and_failures(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = BarProgress(stream)
    progress.begin([SMALL, LARGE], num_recorded=0)
    progress.start_case(SMALL)
    progress.doing("phase [generate]")
    progress._bar.refresh()
    assert "hydra tiny 4+4 x1 · phase [generate]" in stream.getvalue()
    progress.finish_case(SMALL, record("oom", "no [room]"))
    progress._bar.refresh()
    progress.end()
    assert "hydra tiny 4+4 x1: oom: no [room]" in stream.getvalue()
    assert "1/2" in stream.getvalue()
    assert "1 oom" in stream.getvalue()


def test_a_bar_accepts_notices_and_its_end_before_it_begins():
    stream = Terminal()
    progress = BarProgress(stream)
    progress.notice("hello")
    progress.end()
    assert stream.getvalue() == "hello\n"


def test_the_time_left_is_estimated_by_tokens():
    left = TimeLeft()
    left.begin([SMALL, LARGE])
    assert left.seconds is None
    left.finish(SMALL, 2.0, ran=True)
    assert left.seconds == pytest.approx(2.0 * (16 * 2) / 8)
    left.finish(LARGE, 0.0, ran=False)
    assert left.seconds == 0


def test_a_skipped_case_gives_no_estimate():
    left = TimeLeft()
    left.begin([SMALL, LARGE])
    left.finish(SMALL, 0.0, ran=False)
    assert left.seconds is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65.4, "1:05"), (3599.6, "1:00:00"), (7384, "2:03:04")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_title_names_the_fields_that_vary():
    assert title(LARGE) == "lora tiny 8+8 x2"
    paper = dataclasses.replace(LARGE, options=Options.of(SETTINGS["paper"]["options"]))
    assert title(paper) == "lora paper tiny 8+8 x2"
