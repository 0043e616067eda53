"""The check of a checkpoint's weights against its architecture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhfkernels.errors import ModelError

# Tensors of a checkpoint that no forward pass of a causal language model misses, beside those that transformers itself
# lists: masks and rotary tables that older versions saved and newer ones compute, and heads for other tasks.
_HARMLESS_TENSORS = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
    r"|^(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head)\."
)


def check_weights(name: str, model: Any, info: Mapping[str, Iterable[str]], with_lm_head: bool) -> None:
    """Refuses a checkpoint whose weights are not the model's: transformers fills gaps at random and drops the rest."""
    head = model.get_output_embeddings()
    is_unread = head is not None and not with_lm_head
    unread = {id(parameter) for parameter in head.parameters()} if is_unread else set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = info["missing_keys"]
    lacking = sorted(key for key in missing if key not in parameters or id(parameters[key]) not in unread)
    if lacking:
        raise ModelError(f"model {name!r} lacks weights: its checkpoint has no {_some(lacking)}.")
    owner = next((f"{key}." for key, module in model.named_modules() if module is head), "") if is_unread else ""
    surplus = sorted(
        key
        for key in info["unexpected_keys"]
        if not _HARMLESS_TENSORS.search(key) and not (owner and key.startswith(owner))
    )
    if surplus:
        raise ModelError(
            f"model {name!r} has weights that {type(model).__name__} has no place for: {_some(surplus)}; "
            "its config.json must describe its checkpoint."
        )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
