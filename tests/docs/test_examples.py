"""The examples in the docstrings of the public API run."""

from __future__ import annotations

import doctest
from collections.abc import Iterator

import pytest
import torch

import rlhfbench
import rlhfkernels
import rlhfkernels.functional
import rlhfreports

MODULES = (rlhfbench, rlhfkernels, rlhfkernels.functional, rlhfreports)
NAMES = {"torch": torch} | {name: getattr(module, name) for module in MODULES for name in module.__all__}


def examples() -> Iterator[doctest.DocTest]:
    """The docstrings of public names and of their methods that have an example."""
    finder = doctest.DocTestFinder()
    for name, value in NAMES.items():
        if callable(value):
            yield from (found for found in finder.find(value, name, module=False, globs=NAMES) if found.examples)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_the_example_of_a_docstring_runs(example: doctest.DocTest) -> None:
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", rlhfkernels.functional.__all__)
def test_every_function_has_an_example_and_says_its_shapes(name: str) -> None:
    value = getattr(rlhfkernels.functional, name)
    if isinstance(value, type):
        return
    text = value.__doc__ or ""
    assert "Example:" in text
    assert name == "kl_bound" or "[" in text.partition("Example:")[0]
