from __future__ import annotations

import subprocess
import sys

_ASKED = """
import gc, sys
import rlhfbench.planning.preload
from transformers.utils import is_scipy_available
print("rlhfbench.planning.predict" in sys.modules, "scipy.optimize" in sys.modules, is_scipy_available())
print("rlhfkernels.models.warm" in sys.modules)
print(gc.isenabled(), gc.get_freeze_count() > 0)
"""


def test_the_planner_is_imported_without_what_it_does_not_need() -> None:
    """In a process of its own: other tests have imported all of it."""
    ended = subprocess.run([sys.executable, "-c", _ASKED], capture_output=True, text=True, check=True)
    assert not ended.stderr  # such as Triton's list of what it calls leaked
    assert ended.stdout.split() == ["True", "False", "True", "True", "True", "True"]
