"""Steps of growing batches in one process: the ledger's bytes beside the resident memory. Prints one JSON object.

Both are relative to the moment before the step. As a program, so that the allocator's environment is read anew.
"""

import gc
import json
import sys
from pathlib import Path

import psutil
import torch

from rlhfbench.measure import host
from rlhfbench.measure.announcer import Announcer
from rlhfbench.measure.ledger import Ledger
from rlhfbench.measure.memory import run_under_ledger
from rlhfkernels import Case, Options
from rlhfkernels.observer import Observer
from rlhfkernels.training.step import build_step


def resident_bytes():
    """Returns the resident set size of this process."""
    return psutil.Process().memory_info().rss


def reset_peak():
    """Has Linux start the peak of the resident set anew; False where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class Views(Observer):
    """Peak and end of each phase in both views."""

    def __init__(self, ledger):
        self._ledger = ledger
        self.starts, self.phases = None, {}

    def enter_phase(self, name):
        if self.starts is None:
            self.starts = resident_bytes(), self._ledger.total_bytes
        reset_peak()

    def exit_phase(self, name):
        resident, counted = self.starts
        self.phases[name] = {
            "peak": [host.peak_resident_bytes() - resident, self._ledger.peaks[name].total_bytes - counted],
            "end": [resident_bytes() - resident, self._ledger.total_bytes - counted],
        }


def views_of(case):
    step = build_step(case)
    step.run()  # makes the optimizer's states and the libraries' buffers
    gc.collect()
    ledger = Ledger("cpu")
    views = Views(ledger)
    run_under_ledger(step, ledger, Announcer(lambda name: None, ledger, views)).check_finite()
    return views.phases


def main():
    spec = json.loads(sys.argv[1])
    options = Options.of(spec.pop("options"))
    torch.set_num_threads(1)
    gc.disable()  # a collection inside the step would free cycles of an earlier one
    batch_sizes = spec.pop("batch_sizes")
    found = {}
    for batch_size in (batch_sizes[0], *batch_sizes):  # the first round's Python objects, 2 MiB, stay in the heap
        found[batch_size] = views_of(Case(**spec, batch_size=batch_size, options=options))
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
