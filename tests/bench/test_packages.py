"""A source tree on a machine that lacks packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlhfbench import packages

ROOT = Path(__file__).parents[2]
# What only drawing needs, and the driver's figures.
OTHERS = {"pandas", "tabulate", "matplotlib", "altair", "vl-convert-python", "itables", "jinja2", "nvidia-ml-py"}
_BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {names} else find(name, *rest)
"""


def run_without(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """Runs ``rlhfbench evidence`` from the source tree where packages are missing."""
    (folder / "sitecustomize.py").write_text(_BLOCKER.format(names=names))
    roots = [str(ROOT / name) for name in ("bench", "kernels", "reports")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *roots])}
    command = [sys.executable, "-m", "rlhfbench", "evidence", "--out", str(folder / "out"), "--device", "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "missing",
    [
        ["annotated-types"],  # imported with the command line
        ["pydantic", "tomli-w"],  # imported when they are used
        ["typing-inspection"],  # which pydantic needs
        ["psutil", "typer", "annotated-types"],
    ],
)
def test_missing_packages_are_one_sentence(tmp_path: Path, missing: list[str]) -> None:
    done = run_without(tmp_path, *(name.replace("-", "_") for name in missing))
    assert done.returncode == 2
    assert done.stdout == ""
    found = re.fullmatch(r"rlhfbench needs (.*): install or put on PYTHONPATH what is missing here\.\n", done.stderr)
    assert found is not None, done.stderr
    assert set(found[1].split(", ")) >= set(missing)
    assert not (tmp_path / "out").exists()


def test_nothing_is_missing_here() -> None:
    assert packages.check_packages() is None


def test_the_packages_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=]", text)[0] for text in project["dependencies"]}
    needed = {name.replace("_", "-") for name in (*packages._FOUND, *packages._IMPORTED)}
    assert needed | OTHERS == declared
    assert not needed & OTHERS
