"""Asks a node which rlhfbench it has. Sent by value: the node may have another version of this module, or none.

It imports the standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

PACKAGES = ("rlhfbench", "rlhfkernels")


def installed() -> tuple[str, str] | None:
    """Version and a hash of the sources of the installed package; ``None`` if there is none."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    try:
        version = importlib.metadata.version(PACKAGES[0])
    except importlib.metadata.PackageNotFoundError:
        version = "of no version"
    return version, digest.hexdigest()[:8]
