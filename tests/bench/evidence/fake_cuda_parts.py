"""Runs on fake CUDA tensors what parts of the evidence run on a device, and prints what became of it as JSON.

A program of its own: the fake device must be loaded before torch. No result is computed: every number is 0.

Arguments: the compiled ``library.cpp``, the folder with ``steps.py``, and an empty folder.
"""

from __future__ import annotations

import ctypes
import functools
import json
import pickle
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, sys.argv[2])
from steps import make_engine
from watch import zero_of

from rlhfbench.evidence import decode, ops, snapshot
from rlhfbench.evidence.request import Request, Sizes
from rlhfbench.measure import MeasurementOptions, measure_case

DEVICE = "cuda:0"
SIZES = Sizes(
    prompt_len=5,
    completion_len=4,
    seq_lens=(8,),
    rank=3,
    dtype="bfloat16",
    verify_model="tiny",
    op_rows=16,
    decode_batches=(2,),
    profile_len=4,
    batch_size=2,
    time_budget_s=0.05,
)
REQUEST = Request(model="tiny", device=DEVICE, sizes=SIZES)
# What torch says of a device: a peak of 1,000 bytes, of 2,000 reserved.
ANSWERS = {
    "synchronize": None,
    "reset_peak_memory_stats": None,
    "set_sync_debug_mode": None,
    "max_memory_allocated": 1000,
    "max_memory_reserved": 2000,
    "get_allocator_backend": "native",
    "device_of": nullcontext(),
}


class Zeros(TorchDispatchMode):
    """Numbers that the host asks for are 0: fake tensors have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return zero_of(args[0].dtype)
        if func is torch.ops.aten.equal.default:
            return True
        return func(*args, **(kwargs or {}))


def dump_snapshot(path: str) -> None:
    Path(path).write_bytes(pickle.dumps({"segments": [], "device_traces": []}))


def run_ops(folder: Path) -> object:
    ops.run_ops(REQUEST, folder, 60.0)
    return json.loads((folder / "ops.json").read_text())


def run_decode(folder: Path) -> object:
    decode.run_decode(REQUEST, folder, 60.0)
    return json.loads((folder / "decode.json").read_text())


def run_measurements(folder: Path) -> object:
    options = MeasurementOptions(time_budget_s=0.05, timeline=True, num_blocks=1)
    found = measure_case(REQUEST.case("hydra"), options, lambda name: None)
    found.pop("timeline")
    return found


def run_snapshot(folder: Path) -> object:
    return snapshot.watch_step(REQUEST.case("hydra"), folder / "snapshot.pickle")


ON_FAKE_TENSORS: dict[str, Callable[[Path], object]] = {
    "ops": run_ops,
    "decode": run_decode,
    "measurements": run_measurements,
    "snapshot": run_snapshot,
}


def on_fake_tensors(run: Callable[[Path], object], folder: Path) -> object:
    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", create=True))
        stack.enter_context(mock.patch.object(torch.cuda.memory, "_record_memory_history"))
        stack.enter_context(mock.patch.object(torch.cuda.memory, "_dump_snapshot", dump_snapshot))
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        stack.enter_context(mock.patch("rlhfkernels.training.step.Engine", functools.partial(make_engine, False)))
        for module in (ops, decode):
            stack.enter_context(mock.patch.object(module, "_NUM_TIMED", 1))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Zeros())
        return run(folder)


def main() -> None:
    found = {}
    for name, run in ON_FAKE_TENSORS.items():
        folder = Path(sys.argv[3]) / name
        folder.mkdir()
        try:
            found[name] = on_fake_tensors(run, folder)
        except Exception as error:
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
