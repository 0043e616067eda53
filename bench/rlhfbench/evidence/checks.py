"""Part 1: a small model against transformers and PEFT, in bfloat16 and in float32."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from rlhfbench.evidence.items import Items
from rlhfbench.evidence.request import Request

DTYPES = ("bfloat16", "float32")


def run_checks(request: Request, folder: Path, left_s: float) -> None:
    """Keeps the checks of ``rlhfbench verify`` in ``verify.json`` by dtype.

    Raises:
        ModelError: the model cannot be loaded.
    """
    items = Items(folder / "verify.json")
    for dtype in DTYPES:
        items.add(dtype, functools.partial(_verify, request, dtype))


def _verify(request: Request, dtype: str) -> list[dict[str, Any]]:
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    from rlhfkernels.engine.verify import verify

    logging.disable_progress_bar()
    checks = verify(request.sizes.verify_model, dtype=dtype, device=request.device)
    return [dataclasses.asdict(check) for check in checks]
