"""Copies of modules."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def clone_module(module: M) -> M:
    """A copy that owns the storage of its tensors, ties kept; ``copy.deepcopy`` alone cannot copy fake tensors."""
    tensors = {id(t): t for each in module.modules() for t in _tensors_of(each)}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        twin = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[key] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(module, memo)


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
