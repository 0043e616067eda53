from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from rlhfbench.evidence.ops import _size
from rlhfbench.evidence.request import MINIATURE, Request


def test_the_heads_are_as_wide_as_those_of_the_model(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16).save_pretrained(tmp_path)
    wide = _size(Request(model=str(tmp_path), device="cpu", sizes=MINIATURE))
    assert (wide.layout.head_size, wide.layout.width) == (16, (4 + 2 + 2) * 16)
    # GPT-2's configuration has no such field: 768 elements in 12 heads.
    assert _size(Request(model="gpt2", device="cpu", sizes=MINIATURE)).layout.head_size == 64
