"""Device for tests of the Triton kernels: a GPU, or the CPU by Triton's interpreter."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

WITH_KERNELS = ("launch", "token_logprobs", "rms_norm", "rotary", "swiglu")


@pytest.fixture(scope="package")
def device() -> Iterator[str]:
    """Returns ``cuda``, or ``cpu`` after a new import of the kernels, which decides that they are interpreted."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        yield "cuda"
        return
    if isinstance(triton.language.sum, triton.runtime.JITFunction):
        pytest.skip("triton was imported before it could be told to interpret")
    names = [f"rlhfkernels.ops.triton.{name}" for name in WITH_KERNELS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _read_scalars(patch)
        for name in names:
            sys.modules.pop(name, None)
            importlib.import_module(name)
        yield "cpu"
    for name in names:
        del sys.modules[name]


def _read_scalars(patch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter of Triton 3.6 read a scalar, an array of one element, with NumPy 2.5 as newer ones do."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(interpreter, "_patch_lang_tensor", patched)
