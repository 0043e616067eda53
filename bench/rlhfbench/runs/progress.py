"""Progress of a run on standard error: a bar in a terminal, one line a case elsewhere."""

from __future__ import annotations

import collections
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from rlhfbench.runs.titles import Titles
from rlhfkernels.config.case import Case

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Progress(Protocol):
    """Receives the events of a run."""

    def begin(self, cases: list[Case], num_recorded: int) -> None:
        """The run starts with ``cases``; ``num_recorded`` others were recorded earlier."""

    def start_case(self, case: Case) -> None:
        """``case`` starts."""

    def doing(self, what: str) -> None:
        """The case enters the stage ``what``, such as ``timing``."""

    def finish_case(self, case: Case, record: dict[str, Any]) -> None:
        """``case`` ended with ``record``."""

    def begin_blocks(self, number: int, num_blocks: int, num_cases: int) -> None:
        """Block ``number`` (from 0) of ``num_blocks`` is timed next, for ``num_cases`` cases."""

    def start_block(self, case: Case) -> None:
        """A block of ``case`` starts."""

    def finish_block(self, case: Case, block: dict[str, Any]) -> None:
        """The block of ``case`` ended."""

    def notice(self, text: str) -> None:
        """A message for the user."""

    def end(self) -> None:
        """The run ended."""


class Silent:
    """Progress that shows nothing."""

    def _ignore(self, *args: object, **kwargs: object) -> None: ...

    begin = start_case = doing = finish_case = begin_blocks = start_block = finish_block = notice = end = _ignore


def make_progress(stream: TextIO | None = None) -> Progress:
    """The progress for ``stream``, standard error by default."""
    stream = stream or sys.stderr
    return BarProgress(stream) if stream.isatty() else LineProgress(stream)


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class TimeLeft:
    """Estimates the time left from seconds per token of the cases that have run."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}
        self._done = 0
        self._spent_s = 0.0

    def begin(self, cases: list[Case]) -> None:
        """Sets the cases of the run."""
        self._left = {case.id: case.seq_len * case.batch_size for case in cases}

    def finish(self, case: Case, spent_s: float, *, ran: bool) -> None:
        """Notes that ``case`` ended after ``spent_s``. A case that did not run changes no estimate."""
        tokens = self._left.pop(case.id, 0)
        if ran:
            self._done += tokens
            self._spent_s += spent_s

    @property
    def seconds(self) -> float | None:
        """Estimated seconds left; ``None`` before the first case has run."""
        if not self._done:
            return None
        return self._spent_s / self._done * sum(self._left.values())


class _Counting:
    """Base of both kinds of progress: counts outcomes and times the current case."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._outcomes: collections.Counter[str] = collections.Counter()
        self._time_left = TimeLeft()
        self._title = Titles()
        self._num_cases = 0
        self._num_running = 0
        self._since_s = 0.0  # when the last case ended, or the first of several at once started

    def begin(self, cases: list[Case], num_recorded: int) -> None:
        """Notes the cases of the run."""
        self._num_cases = len(cases)
        self._title = Titles(cases)
        self._time_left.begin(cases)

    def start_case(self, case: Case) -> None:
        """Starts timing ``case``. Several may run at once, on a cluster."""
        if self._num_running == 0:
            self._since_s = time.monotonic()
        self._num_running += 1

    def finish_case(self, case: Case, record: dict[str, Any]) -> None:
        """Counts the outcome of ``case``."""
        self._outcomes[record["outcome"]] += 1
        self._num_running -= 1
        now_s = time.monotonic()
        self._time_left.finish(case, now_s - self._since_s, ran=record["outcome"] != "skipped")
        self._since_s = now_s

    def begin_blocks(self, number: int, num_blocks: int, num_cases: int) -> None:
        """Starts counting the blocks."""
        self._block = f"block {number + 1} of {num_blocks}"
        self._blocks_started_s = time.monotonic()
        self._num_blocks_left = num_cases

    def start_block(self, case: Case) -> None:
        """Shows nothing."""

    def finish_block(self, case: Case, block: dict[str, Any]) -> None:
        """Counts the block, and tells of one that failed."""
        self._num_blocks_left -= 1
        if block["error"] is not None:
            self.notice(f"{self._title(case)}, {self._block}: {block['error']['outcome']}: {block['error']['message']}")

    def notice(self, text: str) -> None:
        """Shows ``text``."""
        raise NotImplementedError

    def _left(self) -> str:
        seconds = self._time_left.seconds
        return "" if seconds is None else f"{clock(seconds)} left"

    def _counts(self) -> str:
        return ", ".join(f"{number} {outcome}" for outcome, number in self._outcomes.items())


class LineProgress(_Counting):
    """One line a case, for logs and pipes."""

    def begin(self, cases: list[Case], num_recorded: int) -> None:
        """Notes the cases of the run."""
        super().begin(cases, num_recorded)
        recorded = f", {num_recorded} already recorded" if num_recorded else ""
        self._print(f"{len(cases)} {'case' if len(cases) == 1 else 'cases'} to run{recorded} ({self._title.shared})")

    def doing(self, what: str) -> None:
        """Prints nothing."""

    def finish_case(self, case: Case, record: dict[str, Any]) -> None:
        """Counts the outcome of ``case``."""
        super().finish_case(case, record)
        number = self._outcomes.total()
        words = [f"[{number}/{self._num_cases}]", self._title(case), record["outcome"], f"{record['wall_s']:.1f} s"]
        if number < self._num_cases:
            words.append(self._left())
        if record["error"] is not None:
            words.append("· " + record["error"]["message"])
        self._print(" ".join(word for word in words if word))

    def finish_block(self, case: Case, block: dict[str, Any]) -> None:
        """Prints a line after the block of the last case."""
        super().finish_block(case, block)
        if self._num_blocks_left == 0:
            self._print(f"{self._block} timed for every case, {time.monotonic() - self._blocks_started_s:.1f} s")

    def notice(self, text: str) -> None:
        """Prints ``text``."""
        self._print(text)

    def end(self) -> None:
        """Prints nothing."""

    def _print(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a closed standard error ends no run
            print(text, file=self._stream, flush=True)


class BarProgress(_Counting):
    """A bar with the current case, the outcomes and the time left."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def begin(self, cases: list[Case], num_recorded: int) -> None:
        """Notes the cases of the run, and starts the bar."""
        super().begin(cases, num_recorded)
        self._draw("starting", total=len(cases) + num_recorded, completed=num_recorded)
        self.notice(f"All cases: {self._title.shared}")

    def _draw(self, description: str, *, total: int, completed: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        # Drawn once a second: on a machine with few cores the drawing would slow down what is timed.
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            TextColumn("{task.fields[counts]}", markup=False),
            console=Console(file=self._stream),
            refresh_per_second=1,
            transient=True,
        )
        self._task = self._bar.add_task(description, total=total, completed=completed, left="", counts="")
        self._bar.start()

    def start_case(self, case: Case) -> None:
        """Starts timing ``case``."""
        super().start_case(case)
        others = f" and {self._num_running - 1} others" if self._num_running > 1 else ""
        self._case_title = self._title(case) + others
        self._update(description=self._case_title)

    def doing(self, what: str) -> None:
        """Shows the stage of the case."""
        self._update(description=f"{self._case_title} · {what}")

    def finish_case(self, case: Case, record: dict[str, Any]) -> None:
        """Counts the outcome of ``case``."""
        super().finish_case(case, record)
        self._update(advance=1, left=self._left(), counts=self._counts())
        if record["error"] is not None and record["outcome"] != "skipped":
            self.notice(f"{self._title(case)}: {record['outcome']}: {record['error']['message']}")

    def begin_blocks(self, number: int, num_blocks: int, num_cases: int) -> None:
        """Starts the bar again, for the blocks."""
        super().begin_blocks(number, num_blocks, num_cases)
        if self._bar is None or self._task is None:  # every case was recorded earlier
            self._draw(self._block, total=num_cases)
        else:
            # reset() replaces all fields.
            self._bar.reset(self._task, total=num_cases, description=self._block, left="", counts=self._counts())

    def start_block(self, case: Case) -> None:
        """Shows the case."""
        self._case_title = f"{self._title(case)} · {self._block}"
        self._update(description=self._case_title)

    def finish_block(self, case: Case, block: dict[str, Any]) -> None:
        """Advances the bar."""
        super().finish_block(case, block)
        self._update(advance=1)

    def notice(self, text: str) -> None:
        """Prints ``text``."""
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def end(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _update(self, **fields: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, **fields)
