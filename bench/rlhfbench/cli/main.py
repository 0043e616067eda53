"""The application: its verbs, and errors turned into one sentence and an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from typing import Annotated, Any, TextIO

import typer

from rlhfbench.cli import evidence, gate, methods, models, plan, report, run, verify, watch
from rlhfbench.cli.common import DONE, INTERRUPTED, NOTHING, WRONG, SectionedCommand, epilog
from rlhfbench.errors import ForkServerError, RlhfBenchError
from rlhfkernels.errors import RlhfKernelsError

_MAX_LINE_CHARS = 1000
_OF_FOLDERS = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # also without the name of a file

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for _verb, _epilog in (
    (run.run, run.EPILOG),
    (plan.plan, plan.EPILOG),
    (report.report, report.EPILOG),
    (watch.watch, watch.EPILOG),
    (gate.gate, gate.EPILOG),
    (verify.verify, verify.EPILOG),
    (evidence.evidence, evidence.EPILOG),
    (methods.methods, methods.EPILOG),
    (models.models, models.EPILOG),
):
    app.command(cls=SectionedCommand, epilog=_epilog)(_verb)


class _Pipe(io.FileIO):
    """A standard stream that goes on after its reader has left, as in ``rlhfbench run | head -1``, or its disk is full.

    The command ends with its own exit code, and a run with all of its files. Typer and rich exit with 1 instead.

    Attributes:
        fault: why something was lost, such as a full disk; ``None`` where nothing was, or where its reader has left.
    """

    fault: str | None = None

    def write(self, data: Any) -> int:
        """Writes ``data``, into nothing after the first error."""
        try:
            return super().write(data)
        except OSError as error:
            self.fault = None if isinstance(error, BrokenPipeError) else error.strerror
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.fileno())
            os.close(nothing)
            return len(data)


def _open_text(pipe: _Pipe, before: TextIO | None) -> TextIO:
    encoding = None if before is None else before.encoding  # which PYTHONIOENCODING may have set
    return io.TextIOWrapper(io.BufferedWriter(pipe), encoding, line_buffering=pipe.fileno() == 2)


def main() -> None:
    """Runs the command line and exits with its code."""
    for descriptor in range(3):  # the next file to be opened would take the place of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    output, errors = (_Pipe(descriptor, "w", closefd=False) for descriptor in (1, 2))
    if sys.stdout is None or not sys.stdout.isatty():
        sys.stdout = _open_text(output, sys.stdout)
    if sys.stderr is None or not sys.stderr.isatty():
        sys.stderr = _open_text(errors, sys.stderr)
    code = invoke(sys.argv[1:])
    sys.stdout.flush()
    if output.fault is not None:
        _complain(f"standard output cannot be written: {output.fault}.")
        code = code or WRONG
    sys.exit(code)


def invoke(arguments: list[str]) -> int:
    """Runs ``rlhfbench`` with ``arguments`` and returns its exit code; prints a user's mistake to standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Paths that are no UTF-8 hold surrogates, and an ASCII terminal has no dots and lines.
            stream.reconfigure(errors="replace")
    # Transformers imports DeepSpeed where it is installed, which logs to standard output: it would spoil ``--json``.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    os.environ["MPLBACKEND"] = "agg"  # pictures need no display, and a name that it does not know stops Matplotlib
    try:
        code = app(arguments or ["--help"], prog_name="rlhfbench", standalone_mode=False)
    except (RlhfBenchError, RlhfKernelsError) as error:
        _complain(str(error))
        return NOTHING if isinstance(error, ForkServerError) else WRONG
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        # Of a file that no verb foresaw: a name that is too long, a folder without permission, a full disk.
        if error.filename is None and error.errno not in _OF_FOLDERS:
            raise
        if error.filename is None:
            _complain(f"the working folder or the temporary folder cannot be used: {error.strerror}.")
            return WRONG
        _complain(f"'{os.fsdecode(error.filename)}' cannot be used: {error.strerror}.")
        return WRONG
    except Exception as error:
        # An error of click, recognised by its method: newer versions of typer carry a private copy of click.
        if not hasattr(error, "format_message"):
            raise
        _complain(_sentence(error.format_message()))
        return WRONG
    return code if isinstance(code, int) else DONE


def _complain(text: str) -> None:
    """Prints the sentences of a mistake to standard error, each cut to a readable length."""
    lines = [line if len(line) <= _MAX_LINE_CHARS else f"{line[:_MAX_LINE_CHARS]}..." for line in text.splitlines()]
    print("\n".join(lines), file=sys.stderr)


def _sentence(text: str) -> str:
    """The text on one line, ended by a full stop or a question mark."""
    text = " ".join(text.split())
    return text if text.endswith((".", "?")) else text + "."


def _show_version(value: bool) -> None:
    if value:
        from rlhfbench import __version__

        print(f"rlhfbench {__version__}")
        raise typer.Exit


@app.callback(
    epilog=epilog(
        "rlhfbench run",
        "rlhfbench plan --model llama-7b --gpu a100-80gb",
        "rlhfbench run --help",
        codes="Exit codes: 0 done, 1 the answer is no, 2 the command is wrong, 3 nothing could be measured or decided, "
        "130 interrupted.",
    )
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure what each RLHF method costs in memory and time."""
