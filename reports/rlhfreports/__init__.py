"""Reports of runs: a data frame of records in, tables and pictures out.

    frame = rlhfbench.records_frame(rlhfbench.read_records("runs/mine"))
    rlhfreports.table(frame).markdown()
    rlhfreports.plots.latency(frame, "latency")

``rlhfreports.columns`` lists the columns that a frame must have.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhfreports import plots
    from rlhfreports.gain import gain_table
    from rlhfreports.memory import table
    from rlhfreports.slopes import slope_table

__all__ = ["gain_table", "plots", "slope_table", "table"]

_MODULES = {"gain_table": "gain", "slope_table": "slopes", "table": "memory"}


def __getattr__(name: str) -> Any:
    # On first use: pandas and matplotlib take most of a second to import.
    if name == "plots":
        return importlib.import_module("rlhfreports.plots")
    if name in _MODULES:
        return getattr(importlib.import_module(f"rlhfreports.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'rlhfreports' has no attribute {name!r}")
