"""Captures steps on the device of ``tests/null_cuda`` and prints what became of them as JSON."""

import json
import os
import warnings

import torch

from rlhfkernels import Observer
from rlhfkernels.engine.fast.capture import CudaGraphs

DEVICE = torch.device("cuda:0")


def main() -> None:
    x = torch.ones(256, 256, device=DEVICE)
    y = torch.empty_like(x)

    def step() -> None:
        torch.mm(x * 2, x, out=y)

    def waits() -> None:
        step()
        y.sum().item()

    graphs = [CudaGraphs(DEVICE, Observer(), is_required=True)(step)]

    def drops() -> None:
        """Leaves a graph to the garbage collector, and enough objects for it to run."""
        step()
        if torch.cuda.is_current_stream_capturing():
            cycle: list[object] = [graphs.pop()]
            cycle.append(cycle)
            del cycle
            _ = [[] for _ in range(10_000)]

    def capture(function: object = step) -> str:
        with warnings.catch_warnings(record=True) as caught:
            replay = CudaGraphs(DEVICE, Observer(), is_required=False)(function)
        torch.randn(3, device=DEVICE)
        if replay is None:
            return str(caught[-1].message)
        replay()
        return "captured"

    found = {"first": capture(), "waits": capture(waits), "after it": capture()}
    os.environ["NULL_CUDA_FAIL_AT"] = "2"
    found["fails"] = capture()
    del os.environ["NULL_CUDA_FAIL_AT"]
    found["last"] = capture()
    found["drops"] = capture(drops)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
