"""What tests of the kernels share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rlhfkernels.engine import Engine


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
