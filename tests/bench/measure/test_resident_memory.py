"""The ledger against views that are not the ledger: the process's resident memory, and CUDA's allocator.

The resident set says as much as the ledger only if freed memory leaves the process at once. glibc's environment
variables have it do so: allocations from 64 KiB on are mappings of their own, and the heap is trimmed.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhfbench.measure.announcer import Announcer
from rlhfbench.measure.ledger import Ledger, block_bytes
from rlhfbench.measure.memory import run_under_ledger
from rlhfkernels import Case, Options
from rlhfkernels.observer import Observer
from rlhfkernels.training.step import build_step

MIB = 2**20
BATCH_SIZES = (1, 5)
PHASES = ("generate", "score", "update_actor", "update_critic", "optimize")
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}
# ``full`` has gradients of 70 MiB, which the ends of its update phases show. A static KV cache is resident only as far
# as it has been written, so this one grows.
SPEC = {
    "method": "full",
    "model": "tiny",
    "prompt_len": 96,
    "completion_len": 32,
    "batch_sizes": BATCH_SIZES,
    "options": {
        "engine.backend": "torch",
        "engine.attn_implementation": "eager",
        "engine.cache_implementation": "dynamic",
        "engine.logprob_chunk_size": 0,
    },
}


@pytest.fixture(scope="module")
def views():
    """``views[batch][phase]["peak" or "end"]`` is (resident, ledger), in bytes above the start of the step."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc's allocator can be told to give memory back at once")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system has no /proc/self/clear_refs, which resets the peak of the resident memory")
    child = Path(__file__).with_name("resident_child.py")
    process = subprocess.run(
        [sys.executable, str(child), json.dumps(SPEC)],
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return {int(batch_size): phases for batch_size, phases in json.loads(process.stdout).items()}


def close(size):
    """Within 3 %. Small sums are within 1 MiB: buffers of libraries and of Python come and go."""
    return pytest.approx(size, rel=0.03, abs=MIB)


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_larger_batch_adds_to_a_phase_is_resident(views, phase):
    for small, large in itertools.pairwise(BATCH_SIZES):
        resident, counted = (views[large][phase]["peak"][i] - views[small][phase]["peak"][i] for i in (0, 1))
        assert resident == close(counted), (small, large)
        if phase.startswith("update"):
            assert counted > 50 * MIB, "large enough for 3 % to mean something"


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("moment", ["peak", "end"])
def test_every_phase_has_the_resident_memory_that_the_ledger_counts(views, batch_size, moment):
    found = {phase: views[batch_size][phase][moment] for phase in PHASES}
    assert {phase: resident for phase, (resident, _) in found.items()} == {
        phase: close(counted) for phase, (_, counted) in found.items()
    }


def test_gradients_stay_resident_until_the_optimizer_has_stepped(views):
    for phases in views.values():
        assert phases["update_actor"]["end"][0] > 35 * MIB
        assert phases["update_critic"]["end"][0] > 65 * MIB
        assert phases["optimize"]["end"][0] < 5 * MIB


class AllocatorPeaks(Observer):
    """The CUDA allocator's peak of each phase."""

    def __init__(self):
        self.peaks = {}

    def enter_phase(self, name):
        torch.cuda.reset_peak_memory_stats()

    def exit_phase(self, name):
        self.peaks[name] = torch.cuda.max_memory_allocated()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_larger_batch_adds_is_what_the_cuda_allocator_hands_out():
    counted, allocated = {}, {}
    options = Options.of(SPEC["options"])
    lengths = {"prompt_len": SPEC["prompt_len"], "completion_len": SPEC["completion_len"]}
    for batch_size in BATCH_SIZES:
        case = Case(method="full", model="tiny", **lengths, batch_size=batch_size, device="cuda", options=options)
        step = build_step(case)
        step.run()
        ledger, allocator = Ledger("cuda", block_bytes=block_bytes("cuda")), AllocatorPeaks()
        run_under_ledger(step, ledger, Announcer(lambda name: None, ledger, allocator))
        counted[batch_size] = {phase: peak.total_bytes for phase, peak in ledger.peaks.items()}
        allocated[batch_size] = allocator.peaks
    for small, large in itertools.pairwise(BATCH_SIZES):
        for phase in PHASES:
            added = counted[large][phase] - counted[small][phase]
            assert allocated[large][phase] - allocated[small][phase] == close(added), (phase, small, large)
