from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rlhfbench.cli import main as cli
from rlhfbench.runs import page

RESULT = Path(__file__).parents[3] / "reports" / "results" / "default-cpu"


def test_watch_serves_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text((RESULT / "sweep.toml").read_text())
    command = [sys.executable, "-m", "rlhfbench", "watch", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.fullmatch(
            r"Serving .* at (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", process.stdout.readline()
        )
        assert found is not None
        with urllib.request.urlopen(found[1], timeout=60) as answer:
            assert "The run has no records yet." in answer.read().decode()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)
    assert (process.returncode, *rest) == (0, "", "")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("absent",), "run 'absent' cannot be watched: there is no such folder."),
        ((".",), "run '.' cannot be watched: there is no run in it."),
        ((), "Missing argument 'RUN'."),
        ((".", "--port", "x"), "--port is 'x': it must be an integer."),
    ],
)
def test_a_wrong_command_is_one_sentence(
    flags: tuple[str, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.invoke(["watch", *flags]) == 2
    assert capsys.readouterr() == ("", sentence + "\n")


def test_a_page_without_its_libraries_cannot_be_watched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "missing_libraries", lambda: ["altair"])
    assert cli.invoke(["watch", str(RESULT)]) == 2
    assert capsys.readouterr().err == f"run '{RESULT}' cannot be watched: the page needs pip install altair.\n"
