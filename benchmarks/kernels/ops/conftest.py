"""Sizes, implementations and timing that the benchmarks of the ops share.

``pytest benchmarks --benchmark`` times them, beside the plugin's small sweep (``-k test_`` leaves that out). A file is
named after its op in ``rlhfkernels.ops.table``, whose reference, dispatching function (``torch``; on CUDA it takes the
Triton kernel if there is one) and C backend are compared. A file may define:

- ``adapt``: wraps one of these functions, if the benchmark calls it with other arguments.
- ``record_<benchmark>``: records the op in a ``Program``, which is how decode steps run it in C.
- ``liger``: the same computation by liger-kernel, compared on CUDA if installed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfkernels.ops.native import build
from rlhfkernels.ops.native.program import Program
from rlhfkernels.ops.table import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
WITH_LIGER = DEVICE == "cuda" and importlib.util.find_spec("liger_kernel") is not None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Sizes of a model and of its inputs: ``rows`` positions of full sequences, ``decode_rows`` of a decode step."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    rows: int = 512
    decode_rows: int = 4
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
    """Skips the benchmarks without ``--benchmark``."""
    if not config.getoption("rlhfbench", False):
        skip = pytest.mark.skip(reason="these are benchmarks: add --benchmark")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one benchmark per implementation and size, and per direction if the op has a gradient."""
    module, benchmark = metafunc.module, metafunc.function.__name__.removeprefix("test_")
    name = Path(module.__file__).stem.removeprefix("test_")
    op, adapt = OPS[name], getattr(module, "adapt", lambda function: function)
    implementations = {"torch": adapt(op.function), "reference": adapt(op.reference)}
    if WITH_LIGER and hasattr(module, "liger"):
        implementations["liger"] = module.liger
    is_timed = metafunc.config.getoption("rlhfbench", False)
    if DEVICE == "cpu" and "native" in op.backends and is_timed and build.unavailable_reason() is None:
        record = getattr(module, f"record_{benchmark}", None)
        native = Recorded(record) if record else adapt(functools.partial(op.function, backend="native"))
        implementations["native"] = native
    metafunc.parametrize("run_op", implementations.values(), ids=implementations)
    metafunc.parametrize("size", SIZES.values(), ids=SIZES)
    if "direction" in metafunc.fixturenames:
        metafunc.parametrize("direction", ["forward", "forward+backward"])


class Recorded:
    """Records an op for given tensors at the first call and replays it at later calls, as decoding does.

    Args:
        record: called with an empty program and the op's arguments; records the op and returns its result and the
            arguments of ``Program.run``.
    """

    def __init__(self, record: Callable[..., tuple[Any, dict[str, Any]]]) -> None:
        self._record = record
        # The arguments are kept, so that their ids stay theirs.
        self._programs: dict[tuple[int, ...], tuple[Program, Any, dict[str, Any], Any]] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Runs the op."""
        key = tuple(map(id, arguments))
        if key not in self._programs:
            program = Program()
            self._programs[key] = program, *self._record(program, *arguments, **options), arguments
        program, out, step, _ = self._programs[key]
        program.run(**step)
        return out


@pytest.fixture(scope="session", autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def draw() -> Callable[..., torch.Tensor]:
    """Draws a random tensor of a shape, on the device in the dtype."""
    return lambda *shape: torch.randn(*shape).to(DEVICE, DTYPE)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a call with pytest-benchmark, whose tables compare the implementations of an op.

    ``timed(call, inputs)``: ``call`` takes no argument and returns one tensor or several. If the direction is
    ``forward+backward``, the gradient of ``inputs`` is timed too, for output gradients of ones.
    """
    parameters = request.node.callspec.params
    direction = parameters.get("direction", "forward")
    size = next(name for name, size in SIZES.items() if size is parameters["size"])
    name = request.node.originalname.removeprefix("test_")
    benchmark.group = f"{name} {size} {DEVICE} {str(DTYPE).removeprefix('torch.')} {direction}"

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

        once()  # compiles kernels and allocates memory
        benchmark(once)

    return run
