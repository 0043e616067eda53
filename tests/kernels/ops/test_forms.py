from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from rlhfkernels import Case, CaseError, Options
from rlhfkernels.ops import forms
from rlhfkernels.ops.forms import kernels_of, takes_native, takes_triton

ON_CPU = Case(method="hydra", model="tiny", prompt_len=4, completion_len=4, batch_size=4)
ON_CUDA = dataclasses.replace(ON_CPU, device="cuda")


class OfCuda:
    """What is asked of a tensor on a CUDA device."""

    dtype, is_cuda = torch.bfloat16, True


@pytest.mark.parametrize(
    ("kernels", "installed", "on_cuda", "on_cpu"),
    [("auto", True, True, False), ("auto", False, False, False), ("torch", True, False, False)],
)
def test_the_form_goes_by_the_tensor_and_the_package(
    monkeypatch: pytest.MonkeyPatch, kernels: str, installed: bool, on_cuda: bool, on_cpu: bool
) -> None:
    monkeypatch.setattr(forms, "is_installed", lambda package: installed)
    assert takes_triton(OfCuda(), kernels) is on_cuda
    assert takes_triton(torch.zeros(1), kernels) is on_cpu


def test_what_is_asked_for_is_taken_but_there_are_no_kernels_in_float64() -> None:
    assert takes_triton(torch.zeros(1), "triton")
    assert not takes_triton(torch.zeros(1, dtype=torch.float64), "triton")


@pytest.mark.parametrize(
    ("installed", "failure", "sentence"),
    [
        (True, None, None),
        (False, None, "engine.backend is 'triton': it needs triton, which is not installed."),
        (
            True,
            "RuntimeError: No compiler.",
            "engine.backend is 'triton': no kernel of it can be compiled and started here (RuntimeError: No "
            "compiler.).",
        ),
    ],
)
def test_a_case_takes_triton_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, installed: bool, failure: str | None, sentence: str | None
) -> None:
    monkeypatch.setattr(forms, "is_installed", lambda package: installed)
    monkeypatch.setattr(forms, "why_not", lambda device: failure)
    asked = dataclasses.replace(ON_CUDA, options=Options.of({"engine.backend": "triton"}))
    assert kernels_of(dataclasses.replace(ON_CUDA, options=Options.of({"engine.backend": "torch"}))) == "torch"
    if sentence is None:
        assert kernels_of(ON_CUDA) == kernels_of(asked) == "triton"
        return
    assert kernels_of(ON_CUDA) == "torch"
    with pytest.raises(CaseError) as caught:
        kernels_of(asked)
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (None, None),
        (
            "no cc is installed",
            "engine.backend is 'native': its C cannot be compiled here (no cc is installed).",
        ),
    ],
)
def test_a_case_on_a_processor_takes_the_c_where_it_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, failure: str | None, sentence: str | None
) -> None:
    monkeypatch.setattr(forms.build, "why_not", lambda: failure)
    asked = dataclasses.replace(ON_CPU, options=Options.of({"engine.backend": "native"}))
    assert kernels_of(dataclasses.replace(ON_CPU, options=Options.of({"engine.backend": "torch"}))) == "torch"
    if sentence is None:
        assert kernels_of(ON_CPU) == kernels_of(asked) == "native"
        return
    assert kernels_of(ON_CPU) == "torch"
    with pytest.raises(CaseError) as caught:
        kernels_of(asked)
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_there_is_no_c_in_another_dtype(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(forms.build, "why_not", lambda: pytest.fail("compiled what nobody needs"))
    assert kernels_of(dataclasses.replace(ON_CPU, dtype=dtype)) == "torch"


def test_the_c_is_taken_for_float32_on_a_processor() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    assert takes_native("native", x, weight)
    assert not takes_native("native", x, weight.double())
    assert not takes_native("native", x, weight.to("meta"))
    assert not any(takes_native(kernels, x, weight) for kernels in ("auto", "torch", "triton"))


def test_a_device_that_is_not_there_is_a_reason_of_one_line() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    failure = forms.why_not("cuda:99")
    assert failure is not None
    assert "\n" not in failure


def test_on_a_processor_the_ops_do_without_the_package() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from rlhfkernels.models.heads import LmHead\n"
        "from rlhfkernels.ops.logprobs import token_logprobs\n"
        "from rlhfkernels.ops.rms_norm import rms_norm\n"
        "from rlhfkernels.ops.heads import RotaryPart\n"
        "from rlhfkernels.ops.rotary import rotary_\n"
        "from rlhfkernels.ops.swiglu import swiglu\n"
        "x = torch.ones(2, 4)\n"
        "rms_norm(swiglu(x), x[0, :2], 1e-5), rotary_(x, x[None], x[None], RotaryPart(1, 1, 1))\n"
        "token_logprobs(x, LmHead(torch.nn.Parameter(x)), torch.zeros(2, dtype=torch.int64))\n"
        "sys.exit(any(name.startswith('rlhfkernels.ops.triton') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
