import dataclasses
import io

import pytest

from rlhfbench.runs.progress import BarProgress, LineProgress, TimeLeft, clock, make_progress
from rlhfbench.runs.titles import Titles
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


@pytest.fixture
def bar(monkeypatch):
    """A bar on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    return stream, BarProgress(stream)


@pytest.fixture
def begun_bar(bar):
    """A bar of two cases, of which the first has started."""
    stream, progress = bar
    progress.begin([SMALL, LARGE], num_recorded=0)
    progress.start_case(SMALL)
    return stream, progress


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
        "2 cases to run, 3 already recorded (tiny · cpu · float32)",
        "[1/2] hydra 4+4 x1 ok 1.2 s 0:00 left",
        "by the way",
        "[2/2] lora 8+8 x2 oom 1.2 s · no room",
    ]


def test_a_bar_shows_the_current_case_and_failures(begun_bar):
    stream, progress = begun_bar
    progress.doing("phase [generate]")
    progress._bar.refresh()
    assert "hydra 4+4 x1 · phase [generate]" in stream.getvalue()
    progress.finish_case(SMALL, record("oom", "no [room]"))
    progress._bar.refresh()
    progress.end()
    assert "hydra 4+4 x1: oom: no [room]" in stream.getvalue()
    assert "1/2" in stream.getvalue()
    assert "1 oom" in stream.getvalue()


def time_a_block(progress):
    """Times a block of one of two cases, with the bar drawn before and after."""
    progress.begin_blocks(1, 5, 2)
    progress.start_block(LARGE)
    progress._bar.refresh()
    progress.finish_block(LARGE, {"error": None})
    progress._bar.refresh()
    progress.end()


def test_a_bar_goes_on_through_the_blocks(begun_bar):
    stream, progress = begun_bar
    progress.finish_case(SMALL, record())
    time_a_block(progress)
    assert "lora 8+8 x2 · block 2 of 5" in stream.getvalue()
    assert "1 ok" in stream.getvalue()


def test_blocks_of_cases_that_were_recorded_earlier_have_a_bar(bar):
    stream, progress = bar
    time_a_block(progress)
    assert "lora tiny 8+8 x2 · block 2 of 5" in stream.getvalue()
    assert "1/2" in stream.getvalue()


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


def with_options(case, **options):
    return dataclasses.replace(case, options=Options.of({name.replace("__", "."): v for name, v in options.items()}))


def test_a_title_that_stands_alone_names_the_model_and_all_but_the_defaults():
    title = Titles()
    assert title(LARGE) == "lora tiny 8+8 x2"
    paper = dataclasses.replace(LARGE, options=Options.of(SETTINGS["paper"]["options"]))
    assert title(paper) == "lora paper tiny 8+8 x2"
    assert title(dataclasses.replace(LARGE, dtype="bfloat16", seed=3)) == "lora tiny 8+8 x2 bfloat16 seed 3"
    assert title(with_options(LARGE, lora__r=4, ppo__kl_coef=0.5)) == "lora tiny 8+8 x2 lora.r=4 ppo.kl_coef=0.5"


@pytest.mark.parametrize(
    ("changes", "titles"),
    [
        ([{}, {"method": "hydra"}], ["lora 8+8 x2", "hydra 8+8 x2"]),
        ([{"seed": 0}, {"seed": 1}], ["lora 8+8 x2 seed 0", "lora 8+8 x2 seed 1"]),
        ([{"dtype": "float32"}, {"dtype": "float64"}], ["lora 8+8 x2 float32", "lora 8+8 x2 float64"]),
        ([{"device": "cpu"}, {"device": "cuda"}], ["lora 8+8 x2 cpu", "lora 8+8 x2 cuda"]),
        ([{"model": "/a/b/one"}, {"model": "gpt2"}], ["lora one 8+8 x2", "lora gpt2 8+8 x2"]),
        ([{"model": "org1/llama"}, {"model": "org2/llama"}], ["lora org1/llama 8+8 x2", "lora org2/llama 8+8 x2"]),
        (
            [{"model": "/runs/a/last"}, {"model": "runs/b/last"}, {"model": "/tmp/tiny"}],
            ["lora a/last 8+8 x2", "lora b/last 8+8 x2", "lora tmp/tiny 8+8 x2"],
        ),
        ([{"model": "/last"}, {"model": "last"}], ["lora /last 8+8 x2", "lora last 8+8 x2"]),
        ([{"dtype": "float64", "device": "cuda", "seed": 7}], ["lora 8+8 x2"]),
    ],
)
def test_a_title_names_what_varies_in_the_sweep_and_nothing_else(changes, titles):
    cases = [dataclasses.replace(LARGE, **change) for change in changes]
    title = Titles(cases)
    assert list(map(title, cases)) == titles


def test_options_that_vary_are_named():
    cases = [LARGE, with_options(LARGE, ppo__kl_coef=0.5), with_options(LARGE, lora__r=4)]
    title = Titles(cases)
    assert list(map(title, cases)) == [
        "lora 8+8 x2 lora.r=16",
        "lora 8+8 x2 lora.r=16 ppo.kl_coef=0.5",
        "lora 8+8 x2 lora.r=4",
    ]


def test_a_setting_stands_for_what_follows_from_it():
    paper = dataclasses.replace(LARGE, dtype="bfloat16", options=Options.of(SETTINGS["paper"]["options"]))
    title = Titles([LARGE, paper])
    assert [title(LARGE), title(paper)] == ["lora modern 8+8 x2", "lora paper 8+8 x2"]


def test_a_case_outside_the_sweep_names_how_it_differs():
    title = Titles([LARGE, SMALL])
    assert title.shared == "tiny · cpu · float32"
    assert title(dataclasses.replace(LARGE, seed=5, model="gpt2")) == "lora gpt2 8+8 x2 seed 5"
