"""The process of one part: ``python -m rlhfbench.evidence.part_process DIR NUMBER SECONDS``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import Request
from rlhfbench.processes import die_with_parent


def main(folder: str, number: str, left_s: str) -> None:
    """Runs part ``number`` of the request in ``folder``."""
    PARTS[int(number)].load()(Request.read(Path(folder)), Path(folder), float(left_s))


if __name__ == "__main__":
    die_with_parent(os.getppid(), signal.SIGTERM)
    main(*sys.argv[1:])
