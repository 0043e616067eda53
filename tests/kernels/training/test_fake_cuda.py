"""The whole step of every method on fake CUDA tensors: forward, backward and optimizer, without a GPU.

No result is computed. What is held: that no tensor, index, generator or dtype is one that a GPU would refuse, and which
ops of the timed phases wait for the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfkernels import METHODS, Case, Options
from rlhfkernels.config.settings import SETTINGS

FOLDER = Path(__file__).parent / "fake_cuda"
NEEDS = {"triton": "triton"}
PAPER = {key.replace(".", "__"): value for key, value in SETTINGS["paper"]["options"].items()} | {"lora__r": 3}
# Label to method, architecture and options; each row has grouped heads and no more layers than it takes.
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    # Whole and with adapters, generating and not: the plain trunk tells methods apart by no more.
    **{f"{name}, paper's setting": {"method": name, **PAPER} for name in ("full", "hydra", "sft", "dpo-lora")},
    "plain trunk": {"engine__trunk": "plain"},
    "float32": {"dtype": "float32", "lora__dtype": "float32"},
    "float32 adapters": {"lora__dtype": "float32"},
    "gpt_neox": {"architecture": "gpt_neox"},
    "gpt2": {"architecture": "gpt2"},
    "opt": {"architecture": "opt"},
    "window": {"architecture": "mistral", "completion_len": 8},
    "without graphs": {"engine__cuda_graphs": "off"},
    "window, without graphs": {"architecture": "mistral", "completion_len": 8, "engine__cuda_graphs": "off"},
    "checkpointing": {"engine__gradient_checkpointing": True},
    "whole logits": {"engine__logprob_chunk_size": 0},
    "mini-batches": {
        "ppo__num_mini_batches": 2,
        "ppo__num_ppo_epochs": 2,
        "engine__micro_batch_size": 1,
        "ppo__entropy_coef": 0.1,
        "ppo__bootstrap_truncated": True,
    },
    "stop token": {"rollout__stop_token_id": 3, "completion_len": 40},
    "sgd": {"optimizer__name": "sgd"},
    "padded prompts": {"model": "tiny", "data__prompts": "prompts.jsonl"},
    "padded prompts, without graphs": {
        "model": "tiny",
        "data__prompts": "prompts.jsonl",
        "engine__cuda_graphs": "off",
    },
    "padded pairs": {"method": "dpo-lora", "model": "tiny", "data__pairs": "pairs.jsonl"},
    "prepared pairs": {
        "method": "dpo-lora",
        "model": "tiny",
        "data__pairs": "pairs.jsonl",
        "dpo__precompute_ref_log_probs": True,
    },
    "padded prompts, plain trunk": {"model": "tiny", "data__prompts": "prompts.jsonl", "engine__trunk": "plain"},
    "triton": {"engine__backend": "triton"},
}
# Ops that wait, by label.
WAITS = {
    # Every sixteenth of 40 tokens looks whether all sequences have ended.
    "stop token": {"generate: aten._local_scalar_dense.default at engine/generation.py": 2},
}


@pytest.fixture(scope="module")
def found(
    fake_cuda: Path, checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Results of the program, by label."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "abcdefgh"}\n')
    (folder / "pairs.jsonl").write_text('{"prompt": "ab", "chosen": "cde", "rejected": "f"}\n')
    cases = folder / "cases.json"
    cases.write_text(json.dumps([_row(label, checkpoint, folder) for label in VARIANTS]))
    return dict(json.loads(_run([sys.executable, str(FOLDER / "steps.py"), str(fake_cuda), str(cases)])))


def _row(label: str, checkpoint: Callable[[str], str], folder: Path) -> tuple[str, dict[str, Any], bool]:
    fields = {"method": "hydra", "prompt_len": 5, "completion_len": 4, "batch_size": 4, "dtype": "bfloat16"}
    fields |= {key: value for key, value in VARIANTS[label].items() if "__" not in key}
    fields = {"model": checkpoint(fields.pop("architecture", "llama")), **fields}
    options = {key.replace("__", "."): value for key, value in VARIANTS[label].items() if "__" in key}
    files = {key: str(folder / value) for key, value in options.items() if key.startswith("data.")}
    options = Options.of({"lora.r": 3, **options, **files})
    return label, Case(**fields, device="cuda:0", options=options).to_dict(), bool(files)


def _run(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("label", VARIANTS)
def test_a_step_has_nothing_that_a_gpu_refuses(found: dict[str, Any], label: str) -> None:
    if label in NEEDS:
        pytest.importorskip(NEEDS[label])
    assert found[label]["problems"] == []
    assert found[label]["ops"] > 500  # the whole step was seen


@pytest.mark.parametrize("label", [label for label in VARIANTS if label not in NEEDS])
def test_the_timed_phases_do_not_wait_for_the_device(found: dict[str, Any], label: str) -> None:
    waits = Counter(wait.rpartition(":")[0] for wait in found[label]["waits"])
    assert waits == WAITS.get(label, {})


def test_the_kernels_of_triton_get_tensors_of_the_device(found: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    assert found["triton"]["launches"] > 50
    assert found["triton"]["waits"] == []
