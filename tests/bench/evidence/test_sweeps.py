from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhfbench.errors import EvidenceError
from rlhfbench.evidence import sweeps
from rlhfbench.evidence.request import MINIATURE, Request

REQUEST = Request(model="tiny", device="cpu", sizes=MINIATURE)


def run_part(monkeypatch: pytest.MonkeyPatch, folder: Path, *outcomes: str) -> dict[str, Any]:
    """Runs part 4 where cases end with ``outcomes``; returns how its sweep was run."""
    asked: dict[str, Any] = {}
    records = [{"outcome": outcome, "error": {"message": f"{outcome} at {i}"}} for i, outcome in enumerate(outcomes)]

    def run_sweep(*arguments: Any, **how: Any) -> SimpleNamespace:
        asked.update(how)
        return SimpleNamespace(records=records, num_ok=outcomes.count("ok"))

    monkeypatch.setattr(sweeps, "run_sweep", run_sweep)
    sweeps.run_lengths(REQUEST, folder, 60.0)
    return asked


def test_a_part_without_a_measured_case_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EvidenceError) as error:
        run_part(monkeypatch, tmp_path, "oom", "crashed")
    assert str(error.value) == f"no case of '{tmp_path / 'runs' / 'lengths'}' could be measured: crashed: crashed at 1"
    with pytest.raises(EvidenceError, match="none was reached"):
        run_part(monkeypatch, tmp_path)


def test_what_a_killed_process_left_is_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(run_part(monkeypatch, tmp_path, "oom", "ok")["retry"]) == {"crashed", "timeout"}
