"""The errors of rlhfbench.

RlhfBenchError
├── SweepError        a sweep or an option of its run breaks a rule: every problem, one sentence each
├── RunFolderError    an output folder cannot be used
├── RecordsError      records or timelines cannot be read or written
├── ForkServerError   the process that cases are forked from did not start
├── EvidenceError     a part of the evidence measured nothing
└── GateError         two revisions cannot be compared
"""

from __future__ import annotations

from collections.abc import Iterable


class RlhfBenchError(Exception):
    """The root of every error that this package raises on purpose."""


class SweepError(RlhfBenchError):
    """A sweep, or an option of its run, that breaks a rule.

    Attributes:
        problems: one sentence a problem, each naming the field, the value and the rule.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[SweepError], tuple[tuple[str, ...]]]:
        # Pickles the problems, where an exception would pickle its message.
        return type(self), (self.problems,)


class RunFolderError(RlhfBenchError):
    """An output folder that holds something else, is in use or cannot be written."""


class RecordsError(RlhfBenchError):
    """Records, or timelines beside them, that are malformed, come from a newer rlhfbench or cannot be written."""


class ForkServerError(RlhfBenchError):
    """The process that cases are forked from did not start; the message has the last line of its log."""


class EvidenceError(RlhfBenchError):
    """A part of the evidence none of whose cases could be measured."""


class GateError(RlhfBenchError):
    """Two revisions that cannot be compared: one does not exist, or the machine is not free."""
