"""The plans that ``rlhfbench plan --out`` writes, read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhfbench.errors import RecordsError
from rlhfbench.records.checks import wrong_type
from rlhfbench.records.derived import at

PLAN_NAME = "plan.json"


def read_plans(folder: Path) -> list[dict[str, Any]]:
    """The plans in ``folder``, each with ``case`` and ``memory`` as a record has them.

    Raises:
        RecordsError: the file cannot be read, or holds no plans.
    """
    path = folder / PLAN_NAME
    try:
        plans = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordsError(f"'{path}' cannot be read: {error}.") from error
    if not isinstance(plans, list) or not all(isinstance(at(each, "case"), Mapping) for each in plans):
        raise RecordsError(f"'{path}' holds no plans: it must be a file of plan --out.")
    for each in plans:
        problem = wrong_type(each)
        if problem is not None:
            raise RecordsError(f"'{path}' holds no plan: {problem}")
    return plans
