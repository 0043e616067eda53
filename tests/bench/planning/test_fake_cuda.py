"""Plans for CUDA against the ledger of steps on fake CUDA tensors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.planning.predict import plan_case
from rlhfkernels import Case, Options

PROGRAM = Path(__file__).with_name("fake_cuda_ledger.py")
# Method, architecture, options. All have grouped heads but ``full``.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hydra": ("hydra", "wide-llama", {}),
    "full": ("full", "wide-gpt2", {}),
    "window": ("hydra", "wide-mistral", {}),
    "padded prompts": ("lora", "wide-llama", {"data.prompts": "prompts.jsonl"}),
    "padded pairs": ("dpo-lora", "wide-llama", {"data.pairs": "pairs.jsonl"}),
    "checkpointing": ("sft", "wide-qwen2", {"engine.gradient_checkpointing": True}),
    "plain trunk": ("hydra", "wide-llama", {"engine.trunk": "plain"}),
}


@pytest.fixture(scope="module")
def cases(checkpoint: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    (folder / "pairs.jsonl").write_text('{"prompt": "ab", "chosen": "cde", "rejected": "f"}\n')
    fixed = {"lora.r": 3, "engine.backend": "torch", "engine.cuda_graphs": "off"}
    found = {}
    for label, (method, architecture, options) in CASES.items():
        files = {name: str(folder / value) for name, value in options.items() if name.startswith("data.")}
        found[label] = Case(
            method=method,
            model=checkpoint(architecture),
            prompt_len=24,
            completion_len=24,
            batch_size=4,
            dtype="bfloat16",
            device="cuda:0",
            options=Options.of(fixed | options | files),
        )
    return found


@pytest.fixture(scope="module")
def measured(fake_cuda: Path, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bytes by phase and part of the steps, by label."""
    path = tmp_path_factory.mktemp("cases") / "cases.json"
    path.write_text(json.dumps([case.to_dict() for case in cases.values()]))
    command = [sys.executable, str(PROGRAM), str(fake_cuda), str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("label", CASES)
def test_the_plan_is_what_the_ledger_sees_on_fake_cuda_tensors(
    cases: dict[str, Case], measured: dict[str, Any], label: str
) -> None:
    """Flash attention keeps the state of its random numbers, some bytes a layer, which the CPU's kernel has not."""
    planned = plan_case(cases[label]).memory["phases"]
    assert planned.keys() == measured[label].keys()
    for name, parts in measured[label].items():
        assert planned[name]["total_bytes"] == pytest.approx(sum(parts.values()), rel=0.002), name


def test_graphs_add_their_pool_alone(cases: dict[str, Case], measured: dict[str, Any]) -> None:
    """Nothing is captured on fake tensors; the scratch of so small a step lies in one segment of 2 MiB."""
    case = cases["hydra"]
    options = case.options.replace({"engine.cuda_graphs": "auto"})
    planned = plan_case(dataclasses.replace(case, options=options)).memory["phases"]
    for name, parts in list(measured["hydra"].items())[1:]:
        assert planned[name]["total_bytes"] - 2 * 2**20 == pytest.approx(sum(parts.values()), rel=0.002), name
