from __future__ import annotations

import subprocess
import sys

import pytest

import rlhfreports


def test_tables_and_plots_are_drawn_from_a_frame(make_frame, tmp_path):
    frame = make_frame({"method": "lora"}, {"method": "hydra"}, {"method": "hydra", "batch_size": 2})
    assert rlhfreports.table(frame).rows[0][0] == "LoRA-PPO"
    assert "shared passes" in rlhfreports.gain_table(frame).markdown()
    assert len(rlhfreports.slope_table(frame).rows) == 1
    for draw in (rlhfreports.plots.latency, rlhfreports.plots.throughput):
        assert [path.name for path in draw(frame, str(tmp_path / "a"))] == ["a.png", "a.svg"]
        assert (tmp_path / "a.png").stat().st_size > 0


def test_every_public_name_is_there_and_documented():
    assert rlhfreports.__all__ == sorted(rlhfreports.__all__)
    for name in rlhfreports.__all__:
        assert getattr(rlhfreports, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'pictures'"):
        _ = rlhfreports.pictures


@pytest.mark.parametrize("module", ["rlhfreports.memory", "rlhfreports.plots", "rlhfreports.tables"])
def test_no_import_of_a_module_hides_a_public_name(module):
    code = f"import sys, {module}, rlhfreports; sys.exit(not callable(rlhfreports.table))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_it_imports_nothing_heavy():
    code = "import sys, rlhfreports; sys.exit(bool({'pandas', 'matplotlib', 'rlhfbench', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reports_import_neither_the_harness_nor_the_kernels():
    code = (
        "import pkgutil, importlib, sys, rlhfreports\n"
        "[importlib.import_module(f'rlhfreports.{m.name}') for m in pkgutil.iter_modules(rlhfreports.__path__)]\n"
        "sys.exit(any(name.split('.')[0] in ('rlhfbench', 'rlhfkernels') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
