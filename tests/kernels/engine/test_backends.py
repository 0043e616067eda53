from __future__ import annotations

import ctypes

import pytest
import torch

from rlhfkernels import CaseError
from rlhfkernels.engine import backends
from rlhfkernels.engine.backends import select_backend
from rlhfkernels.ops.native import matmul


@pytest.mark.parametrize(
    ("is_installed", "reason", "sentence"),
    [
        (True, None, None),
        (False, None, "engine.backend is 'triton': it needs triton, which is not installed."),
        (
            True,
            "RuntimeError: No compiler.",
            "engine.backend is 'triton': no kernel of it can be compiled and started here (RuntimeError: "
            "No compiler.).",
        ),
    ],
)
def test_cuda_selects_triton_if_it_runs(
    monkeypatch: pytest.MonkeyPatch, is_installed: bool, reason: str | None, sentence: str | None
) -> None:
    monkeypatch.setattr(backends, "is_installed", lambda package: is_installed)
    monkeypatch.setattr(backends, "triton_unavailable_reason", lambda device: reason)
    measured: list[object] = []
    monkeypatch.setattr(backends, "_measure_library_kernels", lambda *which: measured.append(which))
    assert select_backend("torch", "cuda", "bfloat16") == "torch"
    assert not measured
    if sentence is None:
        assert select_backend("auto", "cuda", "bfloat16") == select_backend("triton", "cuda", "bfloat16") == "triton"
        assert measured == [(torch.device("cuda"), torch.bfloat16)] * 2
        return
    assert select_backend("auto", "cuda", "bfloat16") == "torch"
    with pytest.raises(CaseError) as caught:
        select_backend("triton", "cuda", "bfloat16")
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        (None, None),
        ("no cc is installed", "engine.backend is 'native': its C cannot be compiled here (no cc is installed)."),
    ],
)
def test_the_cpu_selects_native_if_it_compiles(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, sentence: str | None
) -> None:
    monkeypatch.setattr(backends.build, "unavailable_reason", lambda: reason)
    monkeypatch.setattr(backends, "beats_torch", lambda: True)
    assert select_backend("torch", "cpu", "float32") == "torch"
    if sentence is None:
        assert select_backend("auto", "cpu", "float32") == select_backend("native", "cpu", "float32") == "native"
        return
    assert select_backend("auto", "cpu", "float32") == "torch"
    with pytest.raises(CaseError) as caught:
        select_backend("native", "cpu", "float32")
    assert caught.value.problems == (sentence,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_on_the_cpu_select_torch_without_compiling(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(backends.build, "unavailable_reason", lambda: pytest.fail("it compiled"))
    assert select_backend("auto", "cpu", dtype) == "torch"


def test_a_wrong_matmul_in_the_environment_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL
) -> None:
    monkeypatch.setattr(matmul, "_fastest", matmul._fastest.__wrapped__)
    monkeypatch.setenv("RLHFBENCH_CPU_MATMUL", "mkl")
    with pytest.raises(CaseError) as caught:
        select_backend("auto", "cpu", "float32")
    assert caught.value.problems == ("RLHFBENCH_CPU_MATMUL is 'mkl': it must be native, torch or auto.",)
