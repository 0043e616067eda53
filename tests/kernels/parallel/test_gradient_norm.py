"""The norm of gradients in bfloat16, and that of ranks that average their gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhfkernels.parallel.zero_optimizers import ReplicatedOptimizer


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_norm_over_ranks_is_not_rounded_to_bfloat16(dtypes: tuple[torch.dtype, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    module = nn.ParameterList(torch.zeros(100, dtype=dtype) for dtype in dtypes)
    for parameter in module:
        parameter.grad = torch.randn(100, generator=generator).to(parameter.dtype)
    expected = sum(float(p.grad.double().square().sum()) for p in module if p.grad is not None) ** 0.5
    engine = SimpleNamespace(
        module=module,
        basic_optimizer=SimpleNamespace(param_groups=[{}]),
        allreduce_gradients=lambda: None,
        step=lambda: None,
    )
    norm = ReplicatedOptimizer(engine, lambda num_steps: 0.1).step()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
