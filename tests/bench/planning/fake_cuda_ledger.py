"""Runs steps on fake CUDA tensors under the ledger and prints the bytes of their phases by part, as JSON.

A program of its own: the fake device must be loaded before torch.

Arguments: the compiled ``library.cpp``, and a JSON list of cases as in records.
"""

from __future__ import annotations

import ctypes
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rlhfbench.measure.ledger import Ledger, block_bytes
from rlhfbench.measure.memory import run_under_ledger
from rlhfkernels import Case, build_step

aten = torch.ops.aten


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Calls the kernel that torch's attention takes on CUDA; torch's CPU build has the math kernel alone there."""
    if attn_mask is None:
        out: torch.Tensor = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return out
    assert not enable_gqa
    mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    with_graph = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, mask, with_graph, dropout_p, is_causal, scale=scale
    )[0]


def run(case: Case) -> dict[str, dict[str, int]]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.nn.functional.scaled_dot_product_attention", attend))
        stack.enter_context(mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None))
        stack.enter_context(FakeTensorMode())
        step = build_step(case, with_weights=False)
        ledger = Ledger("cuda", block_bytes=block_bytes(case.device))
        run_under_ledger(step, ledger, ledger)
        return {name: peak.parts for name, peak in ledger.peaks.items()}


def main() -> None:
    cases: list[dict[str, Any]] = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps([run(Case.from_dict(fields)) for fields in cases]))


if __name__ == "__main__":
    main()
