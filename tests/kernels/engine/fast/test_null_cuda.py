"""Captures by torch's own code for CUDA, on a device that computes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("capture_steps.py")


@pytest.fixture(scope="module")
def found(null_cuda: dict[str, str]) -> dict[str, str]:
    done = subprocess.run([sys.executable, str(PROGRAM)], env=null_cuda, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_step_is_captured(found: dict[str, str]) -> None:
    assert found["first"] == "captured"


@pytest.mark.parametrize("reason", ["waits", "fails"])
def test_a_step_that_cannot_be_captured_says_so(found: dict[str, str], reason: str) -> None:
    assert found[reason].startswith("decode steps run without CUDA graphs: ")


def test_captures_and_random_numbers_go_on_after_one_that_failed(found: dict[str, str]) -> None:
    assert (found["after it"], found["last"]) == ("captured", "captured")


def test_no_garbage_is_collected_during_a_capture(found: dict[str, str]) -> None:
    assert found["drops"] == "captured"
