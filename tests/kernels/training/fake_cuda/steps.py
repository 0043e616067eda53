"""Runs whole steps on fake CUDA tensors and prints what a GPU would refuse or wait for, as JSON.

A program of its own: the fake device must be loaded before torch.

Arguments: the compiled ``library.cpp``, and a JSON list of [label, case, options of this program] with cases as in
records.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent))
from watch import Watch, caller

from rlhfkernels import Case, build_step
from rlhfkernels.engine.engine import Engine


class Launches:
    """Stands for a Triton kernel: a launch checks where its tensors are, and computes nothing."""

    def __init__(self, watch: Watch, name: str) -> None:
        self._watch, self._name = watch, name

    def __getitem__(self, grid: object) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._watch.num_launches += 1
            if any(isinstance(a, torch.Tensor) and a.device != self._watch.device for a in (*args, *kwargs.values())):
                self._watch.problems.append(f"host tensor: {self._name}")

        return launch


def with_triton(stack: ExitStack, watch: Watch) -> None:
    """Replaces every Triton kernel by ``Launches``, and what asks whether Triton can run."""
    from rlhfkernels.ops import triton as package

    stack.enter_context(mock.patch("rlhfkernels.engine.backends.triton_unavailable_reason", return_value=None))
    for name in ("rms_norm", "rotary", "swiglu", "token_logprobs"):
        module = __import__(f"{package.__name__}.{name}", fromlist=[name])
        stack.enter_context(mock.patch.object(module, "on_device_of", return_value=nullcontext()))
        for kernel in [key for key in vars(module) if key.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(module, kernel, Launches(watch, f"{name}.{kernel}")))


def make_engine(reads_file: bool, case: Case, **options: object) -> Engine:
    """Makes an engine without weights, whose data are random or of a file."""
    engine = Engine(case, with_weights=False, check=False)
    engine.with_weights = reads_file
    return engine


def checked_attention(watch: Watch, attention: Any) -> Any:
    """Wraps torch's attention: with ``enable_gqa``, CUDA has only the math kernel for a mask and for float32.

    It keeps all scores.
    """

    def attend(*args: Any, attn_mask: Any = None, enable_gqa: bool = False, **kwargs: Any) -> Any:
        if enable_gqa and (attn_mask is not None or args[0].dtype == torch.float32):
            watch.problems.append(f"math kernel: attention at {caller()}")
        return attention(*args, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    return attend


def run(case: Case, *, reads_file: bool) -> Watch:
    """Runs one step of ``case`` without weights, with every decode step."""
    watch = Watch(torch.device(case.device), wide=case.dtype == "float64")
    with ExitStack() as stack:
        if case.options.engine.backend == "triton":
            with_triton(stack, watch)
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        stack.enter_context(FakeTensorMode())
        functions = torch.nn.functional
        attention = checked_attention(watch, functions.scaled_dot_product_attention)
        stack.enter_context(mock.patch.object(functions, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch("rlhfkernels.training.step.Engine", functools.partial(make_engine, reads_file)))
        step = build_step(case)
        step.engine.with_weights = True  # every decode step
        with watch:
            step.run(watch)
    return watch


def main() -> None:
    found = {}
    for label, fields, reads_file in json.loads(Path(sys.argv[2]).read_text()):
        try:
            watch = run(Case.from_dict(fields), reads_file=reads_file)
        except Exception as error:
            traceback.print_exc()
            found[label] = {"problems": [f"{type(error).__name__}: {error}"], "waits": [], "ops": 0, "launches": 0}
        else:
            found[label] = {
                "problems": watch.problems,
                "waits": watch.waits,
                "ops": watch.num_ops,
                "launches": watch.num_launches,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
