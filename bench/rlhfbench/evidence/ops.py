"""Part 2: every op against its reference in float64, and its time beside torch's and other libraries'."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhfbench.evidence.items import Items, worst
from rlhfbench.evidence.op_table import OP_CASES, OpCase, OpSize, Tensors
from rlhfbench.evidence.request import Request
from rlhfbench.measure.clock import StepClock
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.models.configuration import read_config
from rlhfkernels.ops.table import OPS

_NUM_TIMED = 7
_DECODE_ROWS = 16
Call = Callable[[Tensors], Any]


def run_ops(request: Request, folder: Path, left_s: float) -> None:
    """Keeps errors and seconds of every op and implementation in ``ops.json``."""
    items = Items(folder / "ops.json")
    size = _size(request)
    backend = select_backend("auto", request.device, request.sizes.dtype)
    for name, case in OP_CASES.items():
        items.add(name, functools.partial(_compare, request, name, case, size, backend))


def _size(request: Request) -> OpSize:
    config = read_config(request.model)
    heads = int(config.num_attention_heads)
    return OpSize(
        hidden=int(config.hidden_size),
        inner=int(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab=int(config.vocab_size),
        rows=request.sizes.op_rows,
        decode_rows=_DECODE_ROWS,
        rank=request.sizes.rank,
    )


def _compare(request: Request, name: str, case: OpCase, size: OpSize, backend: str) -> dict[str, Any]:
    """Returns ``backend``, and by implementation ``error``, ``gradient_error`` and ``s``, or ``failed``."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, request.sizes.dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(request.device, dtype)

    inputs = case.inputs(draw, size)
    op = OPS[name]
    calls: dict[str, Call] = {
        "ours": lambda t: case.call(op.function, t, size, backend=backend),
        "torch": lambda t: case.call(op.function, t, size, backend="torch"),
        "reference": lambda t: case.call(op.reference, t, size),
        **{other: functools.partial(_swapped, call, size) for other, call in case.others.items()},
    }
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    expected = _values(calls["reference"], wide, case.num_differentiated)
    found: dict[str, Any] = {}
    working: dict[str, Call] = {}
    for label, call in calls.items():
        try:
            errors = _errors(_values(call, inputs, case.num_differentiated), expected)
        except Exception as error:  # one implementation must not hide the others
            found[label] = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        else:
            found[label] = errors
            working[label] = call
    for label, seconds in _times(working, inputs, case.num_differentiated, request.device).items():
        found[label]["s"] = seconds
    return {"backend": backend, "implementations": found}


def _swapped(call: Callable[[Tensors, OpSize], Any], size: OpSize, tensors: Tensors) -> Any:
    return call(tensors, size)


def _values(call: Call, inputs: Tensors, num_differentiated: int) -> list[torch.Tensor]:
    """Returns the result, then the gradients of the first inputs for a gradient of alternating signs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs[:num_differentiated]]
    # Libraries start their kernels on the current device.
    device = torch.cuda.device_of(inputs[0])  # type: ignore[no-untyped-call]
    with device, torch.set_grad_enabled(num_differentiated > 0):
        out: torch.Tensor = call((*leaves, *inputs[num_differentiated:]))
        if not leaves:
            return [out]
        signs = torch.ones_like(out).flatten()
        signs[::2] = -1
        return [out.detach(), *torch.autograd.grad(out, leaves, signs.view_as(out))]


def _errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float | None]:
    """Returns the relative errors in the norm, of the result and the largest of the gradients: NaN if any is."""
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]
    return {"error": errors[0], "gradient_error": worst(errors[1:])}


def _times(calls: dict[str, Call], inputs: Tensors, num_differentiated: int, device: str) -> dict[str, float]:
    """Returns the median seconds of each call with its gradients; the calls take turns."""
    clock = StepClock(device)
    samples: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(1 + _NUM_TIMED):
        for label, call in calls.items():
            with clock.phase(label):
                _values(call, inputs, num_differentiated)
            samples[label].append(clock.take()[label])
    return {label: statistics.median(taken[1:]) for label, taken in samples.items()}
