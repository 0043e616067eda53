from __future__ import annotations

import subprocess
import sys

_BUILT = """
import sys
from unittest import mock
import torch
import rlhfkernels.models.warm
import transformers.models.llama.modeling_llama
from rlhfkernels import Case
from rlhfkernels.training.step import build_step
from transformers import conversion_mapping

imported = set(sys.modules)
case = Case(method="hydra", model="tiny", prompt_len=2, completion_len=2, batch_size=1)
with mock.patch.object(conversion_mapping, "_build_checkpoint_conversion_mapping") as build:
    build_step(case)
print(build.called, *(name for name in sys.modules if name.startswith(("peft", "pydantic")) and name not in imported))
"""


def test_a_step_with_adapters_finds_done_what_a_process_does_once() -> None:
    """In a process of its own: other tests have done all of it."""
    ended = subprocess.run([sys.executable, "-c", _BUILT], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False"]
