"""Steps of two phases over several ranks, as ``data.prompt_field`` of the case says; the last rank misbehaves."""

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

TIMED = 3  # a step that is timed: one or two warm up


class Step:
    phases = (("score", "inference"), ("update", "update"))

    def __init__(self, kind):
        self._kind = kind
        self._num_steps = 0
        self._is_last = distributed.get_rank() == distributed.get_world_size() - 1
        self._weight = torch.ones(1000, requires_grad=True)
        self._states = torch.ones(5000 if self._is_last else 0)  # the last rank holds more
        if kind in ("build-hang", "build-die") and self._is_last:
            MISDEEDS[kind.removeprefix("build-")]()
        if kind.startswith("ddp"):
            self._model = DistributedDataParallel(torch.nn.Linear(64, 64))

    def run(self, observer):
        self._num_steps += 1
        instruments = {type(inner).__name__ for inner in getattr(observer, "_inner", ())}
        with observer.phase("score"):
            total = torch.ones(256, 256) @ torch.ones(256, 256)
            distributed.all_reduce(total)
        with observer.phase("update"):
            if self._num_steps >= TIMED and (self._is_last or self._kind.startswith("all-")):
                MISDEEDS.get(self._kind, lambda: None)()
            if self._is_last and self._kind in {f"die-under-{name}" for name in instruments}:
                _die()
            if self._kind.startswith("ddp"):
                self._model(torch.ones(8, 64)).sum().backward()
            else:
                (self._weight * 2).sum().backward()
                distributed.all_reduce(self._weight.grad)

    def persistent_tensors(self):
        yield "base", self._weight
        yield "optimizer", self._states

    def trained_parameters(self):
        return [self._weight]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_server():
    os.kill(os.getppid(), signal.SIGKILL)  # which kills this process too
    time.sleep(1000)


def _cut_link():
    """Cuts this host off, then waits for the others as if nothing had been."""
    Path(os.environ["CUT_FILE"]).write_text(str(time.monotonic()))
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


def _run_out_of_memory():
    raise MemoryError("no room for it")


def _fail():
    raise ValueError("a wrong value")


def _sleep():
    time.sleep(1000)


def _sleep_in_a_profile():
    if torch._C._autograd._profiler_enabled():
        _sleep()


def _spin():
    """Keeps the CPU busy enough to count as awake, and leaves most of it to other tests."""
    while True:
        sum(range(200_000))
        time.sleep(0.01)


def _be_slow():
    time.sleep(0.2)


MISDEEDS = {
    "cut": _cut_link,
    "die": _die,
    "kill-server": _kill_server,
    "out-of-memory": _run_out_of_memory,
    "fail": _fail,
    "hang": _sleep,
    "all-hang": _sleep,
    "all-spin": _spin,
    "all-profile": _sleep_in_a_profile,  # which the first rank alone writes
    "ddp-hang": _sleep,
    "spin": _spin,
    "ddp-spin": _spin,
    "slow": _be_slow,
    "ddp-slow": _be_slow,
}


def make(case):
    return Step(case.options.data.prompt_field)
