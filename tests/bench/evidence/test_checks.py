from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhfbench.evidence import checks
from rlhfbench.evidence.request import MINIATURE, Request


def test_the_checks_of_verify_are_kept_by_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "DTYPES", ("float32",))
    request = Request(model="tiny", device="cpu", sizes=MINIATURE)
    checks.run_checks(request, tmp_path, 60.0)
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found.keys() == {"float32"}
    assert len(found["float32"]) > 10
    assert {check["outcome"] for check in found["float32"]} == {"ok"}
    monkeypatch.setattr(checks, "_verify", lambda *arguments: pytest.fail("it ran again"))
    checks.run_checks(request, tmp_path, 60.0)
