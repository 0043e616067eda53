"""The rlhfbench that a machine has, and the check that all machines of a run have the same.

It imports the standard library only. ``installed`` is sent to nodes by value: a node may have another version of this
module, or none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("rlhfbench", "rlhfkernels")
_SUFFIXES = (".py", ".c", ".h")  # the C backend is compiled when it is first used

Installed = tuple[str, str] | None  # version and a hash of the sources


def folders() -> list[Path]:
    """Folders of the sources of the installed package; empty if there is none."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return []
        found.append(Path(next(iter(spec.submodule_search_locations))))
    return found


def installed() -> Installed:
    """Version and a hash of the sources of the installed package; ``None`` if there is none."""
    digest, roots = hashlib.sha256(), folders()
    if not roots:
        return None
    for root in roots:
        for path in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES and path.is_file()):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        version = importlib.metadata.version(PACKAGES[0])
    except importlib.metadata.PackageNotFoundError:
        version = "of no version"
    return version, digest.hexdigest()[:8]


def version_problems(here: Installed, there: Mapping[str, Installed]) -> list[str]:
    """One sentence for each machine whose package differs.

    Args:
        here: what this machine has.
        there: what the others have, by their names.
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
