"""The dtypes of a step in bfloat16, op by op: float32 where sums, heads, losses and optimizers need it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhfkernels import METHODS, Case, TrainingStep, build_step
from rlhfkernels.training.optimizers import AdamW

aten = torch.ops.aten
# Ops that sum or normalize.
REDUCTIONS = ("sum", "mean", "norm", "cumsum", "logsumexp", "softmax", "var", "std", "dot", "prod", "logcumsumexp")
# Their results that may be narrow, by op and file: attention and the gradient of a norm's weight are summed in float32
# inside the op and rounded once.
NARROW_SUMS = ("scaled_dot_product", "ops/rms_norm.py")
# Ops that only hand on or store what was computed in float32.
MOVES = {aten.detach.default, aten.t.default, aten.clone.default, aten._foreach_copy_.default, aten.copy_.default}
# Where nothing is computed in bfloat16: losses and advantages, sampling, the scalar heads, the optimizers.
WIDE_PLACES = ("algorithms/", "ops/sample.py", "models/heads.py", "training/optimizers.py", "training/quantities.py")


class Dtypes(TorchDispatchMode):
    """Lists what is narrower than it should be, as "kind: op at file:line"."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_ops += 1
        file, line = place()
        results = [leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for kind in self._kinds(func, file, results):
            self.found.add(f"{kind}: {func} at {file}:{line}")
        return out

    def _kinds(self, func: Any, file: str, results: list[torch.dtype]) -> Iterator[str]:
        if torch.float64 in results:
            yield "float64"
        if torch.bfloat16 not in results or func in MOVES:
            return
        if file.startswith(WIDE_PLACES):
            yield "narrow"
        name = func._schema.name.removeprefix("aten::")
        if any(word in name.split("_") for word in REDUCTIONS) and not any(n in name or n in file for n in NARROW_SUMS):
            yield "narrow sum"


def place() -> tuple[str, int]:
    """File and line of the nearest frame of the package; ``backward`` where autograd's thread has none."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/rlhfkernels/" in name:
            return name.rsplit("/rlhfkernels/")[-1], frame.f_lineno
        frame = frame.f_back
    return "backward", 0


def dtypes_of(step: TrainingStep) -> Dtypes:
    """A step after the first, in which optimizers allocate."""
    step.run()
    with Dtypes() as mode:
        step.run()
    return mode


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16_sums_and_decides_in_float32(make_case: Callable[..., Case], method: str) -> None:
    mode = dtypes_of(build_step(make_case(method, dtype="bfloat16")))
    assert mode.found == set()
    assert mode.num_ops > 300  # the whole step was seen


@pytest.mark.parametrize(
    "options",
    [
        {"lora__dtype": "float32"},
        {"engine__trunk": "plain"},
        {"engine__gradient_checkpointing": True},
        {"engine__micro_batch_size": 2, "ppo__num_mini_batches": 2, "ppo__entropy_coef": 0.1},
        {"rollout__temperature": 0.7, "rollout__stop_token_id": 3, "ppo__bootstrap_truncated": True},
        {"optimizer__name": "sgd"},
    ],
    ids=["float32 adapters", "plain trunk", "checkpointing", "mini-batches", "stop token", "sgd"],
)
def test_options_make_nothing_narrow(make_case: Callable[..., Case], options: dict[str, Any]) -> None:
    assert dtypes_of(build_step(make_case(dtype="bfloat16", **options))).found == set()


@pytest.mark.parametrize(("asked", "dtype"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_adapters_have_the_dtype_of_the_case_or_their_own_and_the_rest_stays_float32(
    make_case: Callable[..., Case], asked: str | None, dtype: torch.dtype
) -> None:
    step = build_step(make_case(dtype="bfloat16", lora__dtype=asked))
    step.run()
    engine = step.engine
    assert {p.dtype for adapters in engine.adapters.values() for p in adapters.parameters()} == {dtype}
    assert {p.dtype for base in engine.method.bases for p in engine.base_parameters(base)} == {torch.bfloat16}
    assert {head.weight.dtype for head in engine.scalar_heads.values()} == {torch.bfloat16}
    states = [state for optimizer in step.optimizers.values() for state in optimizer.tensors()]
    assert {state.dtype for state in states} == {torch.float32}


def test_the_norm_of_bfloat16_gradients_is_that_of_their_values() -> None:
    """In bfloat16 the norm would be off by up to 0.4 %, and so would every clipped gradient."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(n, generator=generator).bfloat16()) for n in (1000, 3, 70)]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
    grads = [parameter.grad.double() for parameter in parameters if parameter.grad is not None]
    expected = torch.linalg.vector_norm(torch.cat(grads))
    optimizer = AdamW(parameters, weight_decay=0.0, eps=1e-8, lr=0.1, warmup_steps=0, total_steps=10, max_grad_norm=0.7)
    norm = optimizer.step()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)
    # The first moment is a tenth of the clipped gradient, rounded to float32 only.
    for moment, grad in zip(optimizer.first, grads, strict=True):
        torch.testing.assert_close(moment.double(), 0.1 * grad * (0.7 / (expected + 1e-6)), rtol=1e-6, atol=1e-9)
