"""What the benchmarks of the ops share: two models' sizes, the forms that are compared, and the timing.

``pytest benchmarks --benchmark`` times them (and the plugin's small sweep; ``-k test_`` leaves that out). Each file has
``FORMS``: the op and its reference, with the same arguments. It may have ``LIGER``, which is compared too where
liger-kernel is installed and the device is a CUDA device. On a processor with a C compiler the form in C is compared
too, as ``native``: ``IN_C``, with the same arguments; and where a step of decoding is timed, which has no gradient, the
function ``native``, which writes it on a tape.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfkernels.ops.native import build
from rlhfkernels.ops.native.tape import Tape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WITH_LIGER = DEVICE == "cuda" and importlib.util.find_spec("liger_kernel") is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The size of a model, and of what it is given: ``rows`` positions at full length, ``few`` rows in decoding."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rows: int = 512
    few: int = 4
    rank: int = 16

    @property
    def qkv(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value projections."""
        return self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size


SIZES = {
    "tiny": Size(hidden=256, intermediate=688, heads=8, kv_heads=8, head_size=32, vocabulary=8192),
    "smollm2-135m": Size(hidden=576, intermediate=1536, heads=9, kv_heads=3, head_size=64, vocabulary=49152),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--benchmark`` nothing is timed."""
    if not config.getoption("rlhfbench", False):
        skip = pytest.mark.skip(reason="these are benchmarks: add --benchmark")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One benchmark a size and form; and a direction, where the op has a gradient."""
    forms = dict(metafunc.module.FORMS)
    if WITH_LIGER:
        forms |= getattr(metafunc.module, "LIGER", {})
    if DEVICE == "cpu" and metafunc.config.getoption("rlhfbench", False) and build.why_not() is None:
        on_tape = None if "direction" in metafunc.fixturenames else getattr(metafunc.module, "native", None)
        forms["native"] = on_tape or metafunc.module.IN_C
    metafunc.parametrize("form", forms.values(), ids=forms, indirect=True)
    metafunc.parametrize("size", SIZES.values(), ids=SIZES)
    if "direction" in metafunc.fixturenames:
        metafunc.parametrize("direction", ["forward", "forward+backward"])


@pytest.fixture(scope="session", autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def form(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The form, called with the arguments of the reference."""
    written: Callable[..., Any] = request.param
    if written is not getattr(request.module, "native", None):
        return written
    tapes: dict[tuple[int, ...], tuple[Tape, Any, dict[str, Any], Any]] = {}

    def replay(*arguments: Any, **options: Any) -> Any:
        """What is written down the first time is replayed for the same tensors, as in decoding."""
        key = tuple(map(id, arguments))
        if key not in tapes:
            tape = Tape()
            tapes[key] = tape, *written(tape, *arguments, **options), arguments
        tape, out, state, _ = tapes[key]
        tape.run(**state)
        return out

    return replay


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """Random numbers of a shape, of the size that products leave, on the device in the dtype."""
    return lambda *shape: torch.randn(*shape).to(DEVICE, DTYPE)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a call with pytest-benchmark; its table stands the forms of an op beside each other.

    ``timed(call, inputs)``: ``call`` takes no argument and gives one tensor or several; ``inputs`` are what their
    gradient is asked for, from ones, where the direction is ``forward+backward``.
    """
    parameters = request.node.callspec.params
    direction = parameters.get("direction", "forward")
    size = next(name for name, size in SIZES.items() if size is parameters["size"])
    op = request.node.originalname.removeprefix("test_")
    benchmark.group = f"{op} {size} {DEVICE} {str(DTYPE).removeprefix('torch.')} {direction}"

    def run(call: Callable[[], Any], inputs: list[torch.Tensor] | None = None) -> None:
        with_graph = direction != "forward"
        for tensor in inputs or ():
            tensor.requires_grad_(with_graph)

        def once() -> None:
            with torch.set_grad_enabled(with_graph):
                outputs = call()
                if with_graph:
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        once()  # kernels are compiled, memory is allocated
        benchmark(once)

    return run
