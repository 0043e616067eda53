"""Shared fixtures of the tests of several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rlhfkernels.parallel.deepspeed import _DeepSpeed, load


@pytest.fixture(scope="session")
def imported_deepspeed() -> Iterator[None]:
    """Imports DeepSpeed before any rank is forked: each of them would take 3 s. Its stage 3 divides small weights too.

    By default it keeps weights of less than 100,000 elements whole, and the models of these tests have no others.
    """
    pytest.importorskip("deepspeed")
    config = _DeepSpeed._config

    def divided(strategy: _DeepSpeed, dtype: torch.dtype) -> dict[str, Any]:
        found = config(strategy, dtype)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")
        patch.setattr(_DeepSpeed, "_config", divided)
        load(torch.device("cpu"))
        yield
