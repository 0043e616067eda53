"""The layers: which folder of the three source roots may import which."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    name: ROOT / folder / name
    for folder, name in (("bench", "rlhfbench"), ("kernels", "rlhfkernels"), ("reports", "rlhfreports"))
}
# Ops know tensors only.
ABOVE_OPS = ("algorithms", "config", "data", "engine", "methods", "models", "training")


def folder_of(module: str) -> str:
    """``package.folder`` of a module; a module directly in its package is a folder of its own, as is the package."""
    return ".".join(module.split(".")[:2])


def module_of(path: Path, package: str) -> str:
    relative = path.relative_to(PACKAGES[package].parent).with_suffix("")
    return ".".join(part for part in relative.parts if part != "__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions and under ``TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from package import name` imports a module where there is one of that name.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def existing_module(name: str) -> str | None:
    """The longest part of a dotted name that is a module of the three packages."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for end in range(len(parts), 1, -1):
        path = PACKAGES[parts[0]].parent.joinpath(*parts[:end])
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(parts[:end])
    return parts[0]


def graph() -> dict[str, dict[str, str]]:
    """Folder to the folders that it imports, each with one of the files that does."""
    found: dict[str, dict[str, str]] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            source = folder_of(module_of(path, package))
            edges = found.setdefault(source, {})
            for name in imported_modules(path):
                module = existing_module(name)
                if module is not None and folder_of(module) != source:
                    edges.setdefault(folder_of(module), str(path.relative_to(ROOT)))
    return found


GRAPH = graph()


def test_the_graph_has_every_folder_and_every_kind_of_import() -> None:
    assert {"rlhfbench.cli", "rlhfbench.errors", "rlhfkernels.ops", "rlhfreports.plots"} <= set(GRAPH)
    assert "rlhfkernels.config" in GRAPH["rlhfbench.cases"]
    assert "rlhfreports.plans" in GRAPH["rlhfbench.cli"]  # inside a function
    assert "rlhfbench.runs" in GRAPH["rlhfbench"]  # under TYPE_CHECKING


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_imports_itself_through_another(package: str) -> None:
    edges = {folder: targets for folder, targets in GRAPH.items() if folder.split(".")[0] == package}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        cycle = error.args[1][::-1]  # graphlib lists a node after what it depends on
        steps = [f"{a} imports {b} ({edges[a][b]})" for a, b in itertools.pairwise(cycle)]
        pytest.fail("; ".join(steps))


@pytest.mark.parametrize(
    ("package", "others"),
    [("rlhfkernels", ("rlhfbench", "rlhfreports")), ("rlhfreports", ("rlhfbench", "rlhfkernels"))],
)
def test_kernels_and_reports_import_neither_the_harness_nor_each_other(package: str, others: tuple[str, ...]) -> None:
    wrong = {
        f"{file} imports {target}"
        for folder, targets in GRAPH.items()
        if folder.split(".")[0] == package
        for target, file in targets.items()
        if target.split(".")[0] in others
    }
    assert not wrong


def test_ops_know_no_case_no_head_and_no_model() -> None:
    wrong = {
        f"{file} imports {target}"
        for target, file in GRAPH["rlhfkernels.ops"].items()
        if target.removeprefix("rlhfkernels.") in ABOVE_OPS
    }
    assert not wrong


def test_only_the_command_line_knows_the_cluster_and_only_the_cluster_knows_ray() -> None:
    assert {folder for folder, targets in GRAPH.items() if "rlhfbench.cluster" in targets} == {"rlhfbench.cli"}
    importers = {
        folder_of(module_of(path, package))
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported_modules(path))
    }
    assert importers == {"rlhfbench.cluster"}
