from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhfbench.cli.main import invoke
from rlhfbench.evidence import collect
from rlhfbench.evidence.request import MINIATURE


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--parts", "0"], "--parts has '0': it must be numbers from 1 to 7, joined by commas."),
        (["--budget-min", "0"], "--budget-min is 0: it must be above 0 and at most 1440."),
        (["--budget-min", "nan"], "--budget-min is nan: it must be above 0 and at most 1440."),
        (["--blocks", "0"], "blocks is 0: it must be an integer from 1 to 1000 or none."),
        (["--budget-min", "x"], "--budget-min is 'x': it must be a number."),
        (["--device", "tpu"], "device 'tpu' is unknown: did you mean"),
        (["--model", "no-such"], "model 'no-such' is unknown: Valid"),
    ],
)
def test_a_wrong_command_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], sentence: str
) -> None:
    defaults = [] if "--device" in flags else ["--device", "cpu"]
    assert invoke(["evidence", "--out", str(tmp_path / "out"), *defaults, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(sentence)
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("outcome", "code"), [("done", 0), ("failed", 3), ("timeout", 3)])
def test_the_exit_code_says_whether_every_part_is_done(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str, code: int
) -> None:
    part = {"outcome": outcome, "wall_s": 1.0, "error": None}
    asked: list[tuple[int, float]] = []

    def run(folder: Path, number: int, left_s: float) -> dict[str, Any]:
        asked.append((number, left_s))
        return part

    monkeypatch.setattr(collect, "_run_part", run)
    command = ["evidence", "--out", str(tmp_path / "out"), "--device", "cpu", "--parts", "5,2", "--budget-min", "60"]
    assert invoke(command) == code
    assert capsys.readouterr().out.startswith("# Evidence: tiny on ")
    assert asked == [(5, 480.0), (2, 480.0)]
    assert invoke([*command, "--json"]) == code
    assert json.loads(capsys.readouterr().out) == {"parts": {"5": part, "2": part}}


def test_a_model_that_is_too_short_for_part_4_is_found_before_anything_runs(
    checkpoint: Callable[[str], str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = dataclasses.replace(MINIATURE, seq_lens=(16, 65, 80))
    monkeypatch.setattr("rlhfbench.evidence.request.MINIATURE", sizes)
    monkeypatch.setattr(collect, "_run_part", lambda *arguments: {"outcome": "done", "wall_s": 1.0, "error": None})
    model = checkpoint("llama")
    command = ["evidence", "--out", str(tmp_path / "out"), "--device", "cpu", "--model", model]
    assert invoke(command) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"a length of 65 (33 + 32) is too long for model '{model}': it has 64 positions.",
        f"a length of 80 (40 + 40) is too long for model '{model}': it has 64 positions.",
    ]
    assert not (tmp_path / "out").exists()
    assert invoke([*command, "--parts", "3,5"]) == 0
