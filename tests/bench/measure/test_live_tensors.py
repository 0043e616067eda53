"""The tensors that live and are newer than a moment."""

from __future__ import annotations

import gc

import torch

from rlhfbench.measure.live_tensors import TensorsSince


def test_newer_tensors_that_live_are_found_and_older_ones_are_not() -> None:
    older = torch.ones(1)
    since = TensorsSince()
    assert since.live() == []
    held = {"a": [torch.ones(2)], "b": torch.nn.Parameter(torch.ones(3))}
    gone = torch.ones(4)
    del gone
    assert sorted(tensor.numel() for tensor in since.live()) == [2, 3]
    del held["a"]
    gc.collect()
    assert [tensor.numel() for tensor in since.live()] == [3]
    assert older.numel() == 1


def test_what_was_noted_is_found_behind_a_freeze() -> None:
    since = TensorsSince()
    built = torch.ones(5)
    since.note()
    gc.freeze()
    try:
        later = torch.ones(6)
        assert sorted(tensor.numel() for tensor in since.live()) == [5, 6]
        since.note()
        assert sorted(tensor.numel() for tensor in since.live()) == [5, 6]
    finally:
        gc.unfreeze()
    assert built.numel() + later.numel() == 11
