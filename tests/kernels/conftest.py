"""What tests of the kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from rlhfkernels.engine import Engine
from rlhfkernels.ops.native import build


@pytest.fixture
def shake() -> Callable[[Engine], None]:
    """Gives every adapter weight a value, so that an adapter that is on shows."""

    def shake(engine: Engine) -> None:
        torch.manual_seed(3)
        with torch.no_grad():
            for adapters in engine.adapters.values():
                for parameter in adapters.parameters():
                    parameter.normal_(std=0.2)

    return shake


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The compiled ops."""
    failure = build.why_not()
    if failure is not None:
        pytest.skip(f"the C cannot be compiled here: {failure}")
    return build.library()
