"""Adds files from outside ``docs/`` to the site: pictures of kept runs, and the changelog.

Pages link to them by their place in the repository, so that the links work there too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
RESULTS = "../reports/results/"


def on_files(files: Files, config: Any) -> Files:
    """Adds the changelog as a page, and every picture of ``reports/results``."""
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for path in sorted((ROOT / "reports" / "results").rglob("*.png")):
        uri = f"results/{path.relative_to(ROOT / 'reports' / 'results').as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links at the places of those files in the site."""
    return markdown.replace(f"({RESULTS}", "(results/").replace("(../CHANGELOG.md", "(changelog.md")
