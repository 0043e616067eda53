from __future__ import annotations

import torch

from rlhfkernels.models.cache import PreallocatedLayer


def test_it_gives_back_what_concatenation_would_and_allocates_once() -> None:
    told: list[torch.Tensor] = []
    layer = PreallocatedLayer(7, told.extend)
    torch.manual_seed(0)
    pieces = [(torch.randn(2, 3, q, 4), torch.randn(2, 3, q, 5)) for q in (4, 1, 1, 1)]
    seen = 0
    for i, (keys, values) in enumerate(pieces):
        q = keys.shape[2]
        assert layer.get_mask_sizes(q) == (seen + q, 0)
        all_keys, all_values = layer.update(keys, values)
        seen += q
        assert layer.get_seq_length() == seen
        assert torch.equal(all_keys, torch.cat([k for k, _ in pieces[: i + 1]], 2))
        assert torch.equal(all_values, torch.cat([v for _, v in pieces[: i + 1]], 2))
    assert layer.get_max_length() == 7
    assert [tuple(t.shape) for t in told] == [(2, 3, 7, 4), (2, 3, 7, 5)]


def test_one_position_is_written_by_one_copy() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 2, 3, 6, 4)
    layer = PreallocatedLayer(6, lambda tensors: None)
    layer.update(*states[:, :, :, :4])
    for t in (4, 5):
        layer.append(states[:, :, :, t])
    assert layer.get_seq_length() == 6
    keys, values = layer.written
    assert torch.equal(keys, states[0])
    assert torch.equal(values, states[1])
