"""Groups of options that verbs share."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rlhfbench.cli.common import SectionedCommand
from rlhfbench.cli.groups import with_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A group of two options."""

    width: Annotated[int, typer.Option(rich_help_panel="Sizes", help="How wide.")] = 3
    height: Annotated[int | None, typer.Option(rich_help_panel="Sizes", help="How high.")] = None


def command(**kwargs: Any) -> tuple[TyperCommand, list[Any]]:
    """A verb with a group between two options of its own, and what it is called with."""
    seen: list[Any] = []

    @with_groups
    def verb(
        *,
        first: Annotated[bool, typer.Option("--first", rich_help_panel="Own")] = False,
        sizes: Sizes,
        last: Annotated[str | None, typer.Option(rich_help_panel="Own")] = None,
    ) -> int:
        """Draw."""
        seen.append((first, sizes, last))
        return 7

    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(cls=SectionedCommand, **kwargs)(verb)
    made = typer.main.get_command(app)
    assert isinstance(made, TyperCommand)
    return made, seen


def test_a_verb_is_called_with_its_groups() -> None:
    verb, seen = command()
    assert verb(["--height", "5", "--first"], standalone_mode=False) == 7
    assert verb([], standalone_mode=False) == 7
    assert seen == [(True, Sizes(width=3, height=5), None), (False, Sizes(), None)]


def test_the_options_of_a_group_stand_where_it_stands() -> None:
    verb, _ = command()
    names = [param.name for param in verb.params]
    assert names == ["first", "width", "height", "last"]


def test_the_help_of_a_group_is_that_of_its_fields() -> None:
    verb, _ = command()
    text = verb.get_help(verb.make_context("verb", []))
    assert "Draw." in text
    assert text.index("How wide.") < text.index("How high.")
    assert "sizes" not in text.replace("Sizes:", "")
