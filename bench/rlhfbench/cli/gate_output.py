"""Output of ``gate``: the table or JSON on standard output, and ``--summary``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhfbench.errors import GateError
from rlhfbench.files import check_writable

if TYPE_CHECKING:
    from rlhfbench.gate.findings import Finding


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """Destinations of what a gate says.

    Attributes:
        summary: File of the table; ``None`` for none.
        as_json: Print JSON in place of the table.
        out: Folder that keeps the runs; ``None`` for none.
    """

    summary: str | None
    as_json: bool
    out: str | None

    def check(self) -> None:
        """Checks the file and the folder before anything is measured.

        Raises:
            GateError: ``--summary`` cannot be written, or ``--out`` is no empty or new folder.
            RunFolderError: ``--out`` cannot be written.
        """
        if self.summary is not None:
            path = Path(self.summary)
            if path.is_dir():
                raise GateError(f"--summary '{path}' is a folder: name a file.")
            if not path.parent.is_dir():
                raise GateError(f"--summary '{path}' cannot be written: there is no folder '{path.parent}'.")
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise GateError(f"--summary '{path}' cannot be written: permission denied.")
        if self.out is not None:
            folder = Path(self.out)
            if os.path.lexists(folder) and not folder.is_dir():
                raise GateError(f"--out '{folder}' is not a folder: name an empty or a new one.")
            check_writable("--out", folder)
            if folder.is_dir() and any(folder.iterdir()):
                raise GateError(f"--out '{folder}' holds files: a gate needs an empty or a new folder.")

    def tell(self, line: str) -> None:
        """Prints a line that is no part of the JSON."""
        print(line, file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def finish(self, findings: Sequence[Finding], base: str, head: str, *, note: str = "", **more: Any) -> int:
        """Prints and stores the answer, and returns the exit code.

        Args:
            findings: Of all cases.
            base: The base in words.
            head: The head in words.
            note: A sentence below the table.
            **more: Further fields of the JSON.
        """
        from rlhfbench.gate.output import exit_code, markdown, to_json

        table = markdown(findings, base, head) + (f"\n{note}\n" if note else "")
        self.store(table)
        if self.as_json:
            print(json.dumps(to_json(findings, base=base, head=head, note=note or None, **more)))
        else:
            print(table, end="")
        return exit_code(findings)

    def store(self, text: str) -> None:
        """Writes ``text`` to ``--summary``. A failure is told and leaves the answer of the gate as it is."""
        if self.summary is None:
            return
        try:
            Path(self.summary).write_text(text, encoding="utf-8", errors="replace")
        except OSError as error:
            print(f"--summary '{self.summary}' cannot be written: {error.strerror}.", file=sys.stderr)


def progress(line: str) -> None:
    """Prints a line on how far a gate is."""
    print(line, file=sys.stderr, flush=True)
