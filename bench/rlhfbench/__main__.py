"""``python -m rlhfbench``: the command line, from a source tree too, where packages may be missing."""

from __future__ import annotations

import sys

from rlhfbench.packages import check_packages


def run() -> None:
    """Runs the command line; a package that is missing is one sentence."""
    try:
        from rlhfbench.cli.main import main  # here, as it imports what may be missing

        main()
    except ModuleNotFoundError:
        problem = check_packages()
        if problem is None:
            raise
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
