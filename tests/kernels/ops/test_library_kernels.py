"""Ops of other libraries: how one is chosen, and the calls of liger-kernel and FlashAttention by stubs of both."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfkernels import Case, build_step
from rlhfkernels.engine.engine import Engine
from rlhfkernels.ops import causal_attention as attention_module
from rlhfkernels.ops import fast_paths, library_kernels, rms_norm
from rlhfkernels.ops.attention_mask import AttentionSpan, CausalMask
from rlhfkernels.ops.causal_attention import FLASH, causal_attention, causal_attention_reference
from rlhfkernels.ops.library_kernels import OURS, LibraryKernel, Tensors, measure
from rlhfkernels.ops.qkv_layout import QkvLayout
from rlhfkernels.ops.rms_norm import LIGER, rms_norm_reference

CPU = torch.device("cpu")


class Clock:
    """A clock that calls move on."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def taking(self, seconds: float, factor: float = 2.0) -> Callable[[Tensors], torch.Tensor]:
        """A call that multiplies by ``factor`` and takes so long."""

        def call(tensors: Tensors) -> torch.Tensor:
            self.now_s += seconds
            return tensors[0] * factor

        return call


@pytest.fixture(autouse=True)
def no_fast_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process measure steps, and ask for their fast paths."""
    monkeypatch.setattr(fast_paths, "_used", set())


def library_of(ours: Callable[[Tensors], torch.Tensor], theirs: Callable[[Tensors], torch.Tensor]) -> LibraryKernel:
    return LibraryKernel(
        op="double",
        package="library",
        ours=ours,
        theirs=theirs,
        inputs=lambda device, dtype: (torch.arange(1.0, 9.0, device=device).to(dtype),),
    )


@pytest.mark.parametrize("seconds", [0.1, 0.3])
def test_both_are_timed(seconds: float) -> None:
    clock = Clock()
    found = measure(library_of(clock.taking(0.2), clock.taking(seconds)), CPU, torch.float32, clock)
    assert found == pytest.approx({OURS: 0.2, "library": seconds})


def failing(tensors: Tensors) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


def test_a_library_that_fails_or_computes_something_else_is_not_used() -> None:
    clock = Clock()
    for theirs in (failing, clock.taking(0.1, factor=2.001)):
        found = measure(library_of(clock.taking(0.2), theirs), CPU, torch.float32, clock)
        assert found["library"] > 1000 * found[OURS]
        assert math.isfinite(found["library"])
    # The same error is rounding in bfloat16.
    found = measure(library_of(clock.taking(0.2), clock.taking(0.1, factor=2.001)), CPU, torch.bfloat16, clock)
    assert found["library"] == pytest.approx(0.1)


@pytest.mark.parametrize(("their_bytes", "is_used"), [(1000, True), (1010, True), (1100, False)])
def test_a_library_that_takes_more_memory_is_not_used(
    monkeypatch: pytest.MonkeyPatch, their_bytes: int, is_used: bool
) -> None:
    clock = Clock()
    library = library_of(clock.taking(0.2), clock.taking(0.1))
    sizes = {library.ours: 1000, library.theirs: their_bytes}
    monkeypatch.setattr(library_kernels, "_peak_bytes", lambda call, inputs, device: sizes[call])
    found = measure(library, CPU, torch.float32, clock)
    assert (found["library"] < found[OURS]) == is_used


@pytest.mark.parametrize(("seconds", "expected"), [(1e-9, True), (1e9, False)])
def test_a_choice_is_measured_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: bool
) -> None:
    measured: list[str] = []

    def measure(library: LibraryKernel, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        measured.append(library.op)
        return {OURS: 1e-3, library.package: seconds}

    monkeypatch.setattr(library_kernels, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        library = library_of(failing, failing)  # a new one: as in another process
        assert library.is_faster(CPU, torch.float32) == expected
        assert library.is_faster(CPU, torch.float32) == expected
    assert measured == ["double"]
    library.is_faster(CPU, torch.bfloat16)
    assert measured == ["double"] * 2


def test_a_device_without_memory_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clock = Clock()

    def full(tensors: Tensors) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for ours, theirs in ((clock.taking(0.2), full), (full, clock.taking(0.1))):
        library = library_of(ours, theirs)
        assert not library.is_faster(CPU, torch.float32)
        assert not library_kernels._path(library, CPU, torch.float32).exists()


def test_a_device_a_version_and_a_dtype_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(failing, failing)
    paths = [library_kernels._path(library, CPU, torch.float32), library_kernels._path(library, CPU, torch.bfloat16)]
    monkeypatch.setattr(library_kernels, "_version", lambda package: "2.0")
    paths.append(library_kernels._path(library, CPU, torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    paths.append(library_kernels._path(library, torch.device("cuda:0"), torch.float32))
    paths.append(library_kernels._path(dataclasses.replace(library, op="other"), CPU, torch.float32))
    assert len(set(paths)) == 5


def test_only_real_cuda_tensors_of_an_installed_library_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(failing, failing)
    monkeypatch.setattr(LibraryKernel, "is_faster", lambda self, device, dtype: True)
    monkeypatch.setattr(library_kernels, "is_installed", lambda package: package == "library")
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda:0"))
    assert library.applies_to(x, "triton")
    assert library.use_for(x, "triton")
    assert not dataclasses.replace(library, package="absent").use_for(x, "triton")
    assert fast_paths.fast_paths() == ["library"]
    assert not library.applies_to(x, "torch")
    assert not dataclasses.replace(library, package="absent").applies_to(x, "triton")
    assert not library.applies_to(SimpleNamespace(**{**vars(x), "dtype": torch.float64}), "triton")  # type: ignore[arg-type]
    assert not library.applies_to(torch.zeros(2), "triton")
    with FakeTensorMode():
        assert not library.applies_to(torch.empty(2, device="cuda:0"), "triton")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stubs of both libraries, which compute by the formula and are used; lists their calls."""
    calls: list[str] = []

    def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Any:
        calls.append("liger")
        assert (offset, mode, in_place) == (0.0, "llama", False)
        return rms_norm_reference(x, weight, eps)

    def flash(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool, window_size: Any
    ) -> torch.Tensor:
        calls.append("flash")
        assert causal
        k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], 2) for part in (k, v))
        scores = torch.einsum("bqhe,bphe->bhqp", q, k) * softmax_scale
        last = k.shape[1] - q.shape[1]  # the last query sees the last key
        distance = torch.arange(q.shape[1])[:, None] + last - torch.arange(k.shape[1])
        hidden = (distance < 0) | (distance > window_size[0] if window_size[0] >= 0 else torch.tensor(False))
        return torch.einsum("bhqp,bphe->bqhe", scores.masked_fill(hidden, -math.inf).softmax(-1), v)

    modules = {
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": SimpleNamespace(apply=norm)},
        "flash_attn": {"flash_attn_func": flash},
    }
    for name, contents in modules.items():
        for parent in (name.rpartition(".")[0].partition(".")[0], name.rpartition(".")[0]):
            if parent:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LibraryKernel, "applies_to", lambda self, x, backend: backend != "torch")
    return calls


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("start", [0, 4])
def test_attention_by_the_library_equals_the_reference(libraries: list[str], start: int, window: int | None) -> None:
    layout, b, t = QkvLayout(4, 2, 8), 2, 7
    qkv = torch.randn(b * t, layout.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_()
    mask = CausalMask(qkv[:, :1].view(b, t), None)
    span = AttentionSpan(start=start, window=window, scale=0.3)
    found = causal_attention(qkv, layout, mask, span)
    expected = causal_attention_reference(qkv, layout, mask, span)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert libraries == ["flash"]


def test_padding_is_left_to_torch(libraries: list[str]) -> None:
    layout = QkvLayout(2, 2, 8)
    qkv = torch.randn(6, layout.width, generator=torch.Generator().manual_seed(0))
    mask = CausalMask(qkv[:, :1].view(2, 3), torch.tensor([[0, 1, 1], [1, 1, 1]]))
    causal_attention(qkv, layout, mask, AttentionSpan(start=0, window=None, scale=0.3))
    assert libraries == []


@pytest.mark.parametrize(("head_size", "calls"), [(256, ["flash"]), (264, [])])
def test_heads_that_the_library_refuses_are_left_to_torch(
    libraries: list[str], head_size: int, calls: list[str]
) -> None:
    layout = QkvLayout(1, 1, head_size)
    qkv = torch.randn(3, layout.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = CausalMask(qkv[:, :1].view(1, 3), None)
    causal_attention(qkv, layout, mask, AttentionSpan(start=0, window=None, scale=0.3))
    assert libraries == calls


def test_the_norm_of_the_library_is_used_where_a_backward_follows(libraries: list[str]) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.rand(8, dtype=torch.float64)
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert libraries == ["liger"]
    rms_norm.rms_norm(x.detach(), weight, 1e-5)
    rms_norm.rms_norm(x, weight, 1e-5, backend="torch")
    assert libraries == ["liger"]


@pytest.mark.parametrize("library", [LIGER, FLASH], ids=lambda library: library.op)
def test_what_is_measured_is_ours_and_theirs(
    libraries: list[str], monkeypatch: pytest.MonkeyPatch, library: LibraryKernel
) -> None:
    for module in (rms_norm, attention_module):
        monkeypatch.setattr(module, "_MEASURED_ROWS", 2)
    monkeypatch.setattr(attention_module, "_MEASURED_LEN", 8)
    monkeypatch.setattr(library_kernels, "_ROUNDS", 1)
    found = measure(library, CPU, torch.float32)
    assert 0 < found[library.package] < 100
    assert len(libraries) == 2  # its values, then its time; only CUDA has a peak of memory


def test_the_checks_of_a_loaded_model_are_no_fast_paths_of_a_step(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_check_models", lambda engine: fast_paths.note_fast_path("flash_attn"))
    build_step(make_case("sft"))
    assert fast_paths.fast_paths() == []
