"""Packages that cases need, for a source tree that no installer has checked. Imports the standard library alone."""

from __future__ import annotations

import importlib
import importlib.util

# Names to import, and what pip calls them. Drawing needs more.
_FOUND = ("torch", "transformers", "peft", "safetensors", "numpy", "scipy", "psutil")  # importing them takes seconds
_IMPORTED = ("typer", "rich", "pydantic", "annotated_types", "tomli_w")


def check_packages() -> str | None:
    """Returns one sentence that names the packages that cases lack here, or ``None``."""
    missing = [name for name in _FOUND if importlib.util.find_spec(name) is None]
    for name in _IMPORTED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # the package, or one that it needs
            missing.append(error.name or name)
    names = [name.replace("_", "-") for name in dict.fromkeys(missing)]
    if not names:
        return None
    return f"rlhfbench needs {', '.join(names)}: install or put on PYTHONPATH what is missing here."
