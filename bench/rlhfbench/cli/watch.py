"""``rlhfbench watch``: serves the page of a run while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhfbench.cli.common import DONE, epilog, name_text, number, path_text
from rlhfbench.errors import RunFolderError
from rlhfbench.launch import refuse_launcher

EPILOG = epilog(
    "rlhfbench watch my-run",
    "rlhfbench watch my-run --port 8000",
    codes="Exit codes: 0 ended by Ctrl-C, 2 the command is wrong.",
)


def watch(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", parser=path_text("RUN"), help="Folder of a run.")],
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            parser=name_text("--host"),  # an empty one would be all addresses of the machine
            help="Address to listen on. With any but 127.0.0.1, everyone who reaches it can read the run.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", parser=number("--port", int), help="Port; 0 for any that is free.")
    ] = 0,
) -> int:
    """Serve the page of a run while it goes on.

    Prints the address for a browser; the page follows as records come. Ctrl-C ends it.
    """
    refuse_launcher("rlhfbench watch")
    from rlhfbench.runs.page import missing_libraries
    from rlhfbench.runs.watch import make_server

    missing = missing_libraries()
    if missing:
        raise RunFolderError(f"run '{run_dir}' cannot be watched: the page needs pip install {' '.join(missing)}.")
    with make_server(Path(run_dir), host, port) as server:
        name = f"[{server.server_name}]" if ":" in server.server_name else server.server_name
        print(f"Serving {run_dir} at http://{name}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return DONE
    return DONE
