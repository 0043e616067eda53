"""``docs/options.md`` is current. ``python tests/docs/test_options_page.py`` writes it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

from rlhfbench.cli.methods import option_rows
from rlhfkernels.config.options import Options

PAGE = Path(__file__).parents[2] / "docs" / "options.md"
HEAD = """# Options

`--option GROUP.NAME=VALUE` sets one option, and may be repeated. In a [sweep file](sweeps.md) they are a table,
`[options]`. `none` stands for no value. A record has every option of its case.

```sh
rlhfbench run --methods hydra --option ppo.kl_coef=0.05 --option lora.target_modules=q_proj,v_proj
rlhfbench methods --options
```

In Python:

```python
from rlhfkernels import Options

options = Options.of({"ppo.kl_coef": 0.05, "engine.gradient_checkpointing": True})
print(options.ppo.kl_coef, options.flat()["lora.r"])
```

Names follow TRL, PEFT and transformers where these have one. A value that breaks a rule is reported before anything
runs, with field, value and rule.
"""


def test_the_options_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run python tests/docs/test_options_page.py"


def options_page() -> str:
    """The text of the page."""
    return "\n".join([HEAD, *_groups()])


def _groups() -> Iterator[str]:
    defaults = Options()
    rows = option_rows()
    for group in dataclasses.fields(Options):
        title = (inspect.getdoc(getattr(defaults, group.name)) or "").splitlines()[0]
        title = title.replace("``", "`")
        yield f"## `{group.name}`\n\n{title}\n\n| option | default | rule | meaning |\n| --- | --- | --- | --- |"
        for row in rows:
            if row["name"].startswith(f"{group.name}."):
                cells = (f"`{row['name']}`", f"`{_text(row['default'])}`", row["rule"], row["meaning"])
                yield f"| {' | '.join(cell.replace('``', '`').replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""


def _text(value: object) -> str:
    """A value as the command line takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(options_page(), encoding="utf-8")
