import subprocess
import sys
from pathlib import Path

import rlhfbench
from rlhfbench.runs import versions
from rlhfbench.runs.versions import version_problems


def test_each_node_that_differs_is_named_with_both_versions():
    here = ("1.0", "abc")
    assert version_problems(here, {"a": here}) == []
    problems = version_problems(here, {"a": ("2.0", "abc"), "b": here, "c": ("1.0", "def"), "d": None})
    assert [problem.removesuffix(": install the same on both.") for problem in problems] == [
        "node a has rlhfbench 2.0 and this machine rlhfbench 1.0",
        "node c has rlhfbench 1.0 (sources def) and this machine rlhfbench 1.0 (sources abc)",
        "node d has no rlhfbench and this machine rlhfbench 1.0",
    ]


def test_it_reads_the_sources_and_imports_only_the_standard_library(tmp_path):
    found = versions.installed()
    assert found is not None
    assert len(found[1]) == 8
    code = f"{Path(versions.__file__).read_text()}\nimport sys\nprint(installed(), 'rlhfbench' in sys.modules)"
    roots = [str(Path(rlhfbench.__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(roots)}
    )
    assert done.stdout == f"{found} False\n"
    for package in versions.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("x = 1\n")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert found[1] not in done.stdout


def test_an_editors_lock_is_no_source(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(versions, "folders", lambda: [tmp_path])
    found = versions.installed()
    (tmp_path / ".#module.py").symlink_to("nobody@nowhere.1")
    assert versions.installed() == found
