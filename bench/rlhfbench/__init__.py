"""The harness: what to run, running it, measuring it, keeping it, judging it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.errors import ForkServerError, RecordsError, RlhfBenchError, RunFolderError, SweepError
    from rlhfbench.measure.ledger import Ledger
    from rlhfbench.records.file import read_records
    from rlhfbench.records.frame import records_frame
    from rlhfbench.runs.runner import RunSettings, run_sweep

    __version__: str

__all__ = [
    "ForkServerError",
    "Ledger",
    "RecordsError",
    "RlhfBenchError",
    "RunFolderError",
    "RunSettings",
    "Sweep",
    "SweepError",
    "__version__",
    "read_records",
    "records_frame",
    "run_sweep",
]

_ROOMS = {
    "ForkServerError": "errors",
    "Ledger": "measure.ledger",
    "RecordsError": "errors",
    "RlhfBenchError": "errors",
    "RunFolderError": "errors",
    "RunSettings": "runs.runner",
    "Sweep": "cases.sweep",
    "SweepError": "errors",
    "read_records": "records.file",
    "records_frame": "records.frame",
    "run_sweep": "runs.runner",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: `import rlhfbench` is on the way of every `--help` and of every forked case.
    if name == "__version__":
        from importlib.metadata import version

        return version("rlhfbench")
    if name in _ROOMS:
        return getattr(importlib.import_module(f"rlhfbench.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'rlhfbench' has no attribute {name!r}")
