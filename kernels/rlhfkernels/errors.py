"""The errors of rlhfkernels.

RlhfKernelsError
├── CaseError        a case that is wrong by itself: every problem, one sentence each
├── ModelError       a model that is unknown, absent or cannot be loaded
├── DataError        a data file, or a reward function's scores, that cannot be used
└── NumericalError   a step whose numbers are not finite
"""

from __future__ import annotations

from collections.abc import Sequence


class RlhfKernelsError(Exception):
    """The root of every error that this package raises on purpose."""


class CaseError(RlhfKernelsError):
    """A case that is wrong by itself.

    Attributes:
        problems: one sentence a problem, each naming the field, the value and the rule.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(" ".join(self.problems))

    def __reduce__(self) -> tuple[type[CaseError], tuple[tuple[str, ...]]]:
        # Pickles the problems, where an exception would pickle its message.
        return type(self), (self.problems,)


class ModelError(RlhfKernelsError):
    """A model that is unknown, absent or cannot be loaded."""


class DataError(RlhfKernelsError):
    """A data file that is missing, empty or malformed, or scores of a reward function in a wrong shape."""


class NumericalError(RlhfKernelsError):
    """A step whose loss or gradient norm is not finite."""
