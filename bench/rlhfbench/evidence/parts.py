"""The parts in the order of what matters most. Imports no torch: a part's module is imported in its own process."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

from rlhfbench.evidence.request import Request

MAX_PART_S = 480.0


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One part.

    Attributes:
        title: one line.
        module: in ``rlhfbench.evidence``, with the function.
        function: takes the request, the folder and the seconds that are left.
    """

    title: str
    module: str
    function: str

    def load(self) -> Callable[[Request, Path, float], None]:
        """Imports the function."""
        found: Callable[[Request, Path, float], None] = getattr(
            importlib.import_module(f"rlhfbench.evidence.{self.module}"), self.function
        )
        return found


PARTS: dict[int, Part] = {
    1: Part("A small model against transformers and PEFT", "checks", "run_checks"),
    2: Part("Every op against its reference and other libraries", "ops", "run_ops"),
    3: Part("The PPO methods, with predicted memory", "sweeps", "run_methods"),
    4: Part("Seconds per sample by sequence length", "sweeps", "run_lengths"),
    5: Part("Decoding against the bandwidth floor", "decode", "run_decode"),
    6: Part("The paper's setting and the modern one", "sweeps", "run_settings"),
    7: Part("A profile", "sweeps", "run_profile"),
}
