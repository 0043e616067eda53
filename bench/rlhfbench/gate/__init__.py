"""The regression gate: whether a change made a step slower or larger, and how sure that is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rlhfbench.cases.sweep import Sweep
    from rlhfbench.gate.compare import GateOptions, Tell
    from rlhfbench.gate.findings import Finding

__all__ = ["compare_with"]


class Compared(NamedTuple):
    """Findings of a gate, and its sides in words.

    Attributes:
        findings: Of every case.
        base: The base.
        head: The head.
        note: A sentence to print beside the findings; may be empty.
    """

    findings: list[Finding]
    base: str
    head: str
    note: str = ""


def compare_with(
    base: str, sweep: Sweep, out: Path, options: GateOptions | None = None, tell: Tell = lambda line: None
) -> list[Finding]:
    """Compares the working tree with a revision, or a new run of its code with a stored one.

    Args:
        base: A revision of the repository that the working folder lies in, or the folder of a run.
        sweep: The cases. Those of a stored run are its own.
        out: A new or an empty folder for the runs.
        options: How to compare.
        tell: Receives a line after each look at the data.

    Raises:
        GateError: The two cannot be compared, ``out`` is not empty, or another gate runs on this machine.
    """
    return compare_in_words(base, sweep, out, options, tell).findings


def compare_in_words(
    base: str, sweep: Sweep, out: Path, options: GateOptions | None = None, tell: Tell = lambda line: None
) -> Compared:
    """Compares as ``compare_with`` does, and says what was compared."""
    from rlhfbench.errors import GateError
    from rlhfbench.gate import baseline, sides
    from rlhfbench.gate.compare import Comparison, GateOptions
    from rlhfbench.runs.folder import RunFolder

    options = options or GateOptions()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise GateError(f"out is '{out}': it must be a new or an empty folder.")
    with sides.only_gate():
        if RunFolder(base).is_run:
            findings = baseline.compare_with_run(Path(base), out, options)
            return Compared(findings, f"the run in {base}", baseline.run_title(out))
        root = sides.repository()
        roots = sides.module_roots(root, with_working_folder=options.step is not None)
        head = sides.head_side(root, roots, step=options.step)
        note = sides.sameness(base, root)  # before ``out`` may lie in the working tree
        with sides.unedited(root, roots), sides.checked_out(base, root, "base", roots, step=options.step) as side:
            findings = Comparison(side, head, sweep, out, options, tell).run()
        return Compared(findings, side.title, head.title, note)
