"""The check that every node has the version of the package that this machine has."""

from __future__ import annotations

from collections.abc import Mapping

Installed = tuple[str, str] | None  # version and a hash of the sources


def version_problems(here: Installed, there: Mapping[str, Installed]) -> list[str]:
    """One sentence for each node whose package differs.

    Args:
        here: what this machine has.
        there: what the nodes have, by their names.
    """
    return [
        f"node {name} has {_words(found, here)} and this machine {_words(here, found)}: install the same on both."
        for name, found in there.items()
        if found != here
    ]


def _words(installed: Installed, other: Installed) -> str:
    """``rlhfbench 0.2.0``, with the hash of the sources where both have that version."""
    if installed is None:
        return "no rlhfbench"
    version, sources = installed
    same_version = other is not None and other[0] == version
    return f"rlhfbench {version}" + (f" (sources {sources})" if same_version else "")
