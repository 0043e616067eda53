"""The command ``rlhfbench``, and ``python -m rlhfbench`` from a source tree, where packages may be missing."""

from __future__ import annotations

import sys

from rlhfbench.packages import check_packages


def run() -> None:
    """Runs the command line. A package that is missing is one sentence, and Ctrl-C during imports no traceback."""
    try:
        from rlhfbench.cli.main import main  # here, as it imports what may be missing

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError:
        problem = check_packages()
        if problem is None:
            raise
        print(problem, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
