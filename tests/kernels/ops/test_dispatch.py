from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhfkernels.ops import dispatch
from rlhfkernels.ops.dispatch import takes_native, takes_triton


class CudaTensor:
    """The attributes of a CUDA tensor that dispatch reads."""

    dtype, is_cuda = torch.bfloat16, True


@pytest.mark.parametrize(
    ("backend", "is_installed", "on_cuda", "on_cpu"),
    [("auto", True, True, False), ("auto", False, False, False), ("torch", True, False, False)],
)
def test_auto_takes_triton_for_cuda_tensors_if_installed(
    monkeypatch: pytest.MonkeyPatch, backend: str, is_installed: bool, on_cuda: bool, on_cpu: bool
) -> None:
    monkeypatch.setattr(dispatch, "is_installed", lambda package: is_installed)
    assert takes_triton(CudaTensor(), backend) is on_cuda
    assert takes_triton(torch.zeros(1), backend) is on_cpu


def test_triton_is_taken_on_request_but_not_for_float64() -> None:
    assert takes_triton(torch.zeros(1), "triton")
    assert not takes_triton(torch.zeros(1, dtype=torch.float64), "triton")


def test_native_is_taken_for_float32_on_the_cpu() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    assert takes_native("native", x, weight)
    assert not takes_native("native", x, weight.double())
    assert not takes_native("native", x, weight.to("meta"))
    assert not any(takes_native(backend, x, weight) for backend in ("auto", "torch", "triton"))


def test_a_missing_device_is_a_reason_of_one_line() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    reason = dispatch.triton_unavailable_reason("cuda:99")
    assert reason is not None
    assert "\n" not in reason


def test_ops_on_the_cpu_do_not_import_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from rlhfkernels.ops.logit_transform import LogitTransform\n"
        "from rlhfkernels.ops.token_logprobs import token_logprobs\n"
        "from rlhfkernels.ops.rms_norm import rms_norm\n"
        "from rlhfkernels.ops.qkv_layout import RotaryPart\n"
        "from rlhfkernels.ops.rotary import rotary_\n"
        "from rlhfkernels.ops.swiglu import swiglu\n"
        "x = torch.ones(2, 4)\n"
        "rms_norm(swiglu(x), x[0, :2], 1e-5), rotary_(x, x[None], x[None], RotaryPart(1, 1, 1))\n"
        "token_logprobs(x, x, None, torch.zeros(2, dtype=torch.int64), LogitTransform())\n"
        "sys.exit(any(name.startswith('rlhfkernels.ops.triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ops_import_nothing_else_of_the_package() -> None:
    for path in Path(dispatch.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            outside = [name for name in names if name.startswith("rlhf") and not name.startswith("rlhfkernels.ops")]
            assert not outside, (path, outside)
