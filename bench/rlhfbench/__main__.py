"""``python -m rlhfbench``: the command line, from a source tree too."""

from rlhfbench.cli.main import main

if __name__ == "__main__":
    main()
