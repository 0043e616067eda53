"""Steps of two phases over several ranks, as ``data.prompt_field`` of the case says; the last rank misbehaves."""

import os
import signal
import time

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
        if kind.startswith("ddp"):
            self._model = DistributedDataParallel(torch.nn.Linear(64, 64))

    def run(self, observer):
        self._num_steps += 1
        with observer.phase("score"):
            total = torch.ones(256, 256) @ torch.ones(256, 256)
            distributed.all_reduce(total)
        with observer.phase("update"):
            if self._is_last and self._num_steps >= TIMED:
                MISDEEDS.get(self._kind, lambda: None)()
            if self._kind.startswith("ddp"):
                self._model(torch.ones(8, 64)).sum().backward()
            else:
                (self._weight * 2).sum().backward()
                distributed.all_reduce(self._weight.grad)

    def persistent_tensors(self):
        # The last rank holds more.
        yield "base", self._weight
        if self._is_last:
            yield "optimizer", torch.ones(5000)

    def trained_parameters(self):
        return [self._weight]


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _run_out_of_memory():
    raise MemoryError("no room for it")


def _fail():
    raise ValueError("a wrong value")


def _sleep():
    time.sleep(1000)


def _spin():
    while True:
        pass


def _be_slow():
    time.sleep(0.2)


MISDEEDS = {
    "die": _die,
    "out-of-memory": _run_out_of_memory,
    "fail": _fail,
    "hang": _sleep,
    "ddp-hang": _sleep,
    "spin": _spin,
    "ddp-spin": _spin,
    "slow": _be_slow,
    "ddp-slow": _be_slow,
}


def make(case):
    return Step(case.options.data.prompt_field)
