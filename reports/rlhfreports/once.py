"""Results that several parts of a report ask for, computed once for each frame."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Concatenate, ParamSpec, TypeVar

import pandas as pd

More = ParamSpec("More")
Result = TypeVar("Result")


def once_per_frame(
    function: Callable[Concatenate[pd.DataFrame, More], Result],
) -> Callable[Concatenate[pd.DataFrame, More], Result]:
    """Remembers the results of ``function`` for as long as their frame lives. Nothing writes into a frame of records.

    Slopes and gains stand in files, in the terminal and in the page: computing them anew took a tenth of a report.
    """
    found: dict[int, dict[Hashable, Result]] = {}

    @functools.wraps(function)
    def remembered(frame: pd.DataFrame, /, *args: More.args, **kwargs: More.kwargs) -> Result:
        if id(frame) not in found:
            found[id(frame)] = {}
            weakref.finalize(frame, found.pop, id(frame))
        of_frame, key = found[id(frame)], (args, *sorted(kwargs.items()))
        if key not in of_frame:
            of_frame[key] = function(frame, *args, **kwargs)
        return of_frame[key]

    return remembered
