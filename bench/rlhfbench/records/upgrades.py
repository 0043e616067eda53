"""Records of earlier schemas as records of today's."""

from __future__ import annotations

from typing import Any

from rlhfbench.records.derived import at
from rlhfbench.records.schema import SCHEMA, empty_record, filled
from rlhfkernels.config.options import RENAMED_OPTIONS


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` in schema 2. Schema 1 had flat options, and methods with one sequence per sample.

    Records from before there were blocks have the medians of one process: they become one block with the same figures.
    """
    record = _with_blocks(_renamed(record))
    if record["schema"] >= SCHEMA:
        return record
    found = filled(empty_record(), {**record, "schema": SCHEMA, "case": upgraded_case(record["case"])})
    if at(found, "latency.total_s_per_sample") is not None:
        found["latency"]["sequences_per_sample"] = 1
    return found


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with the keys of today: ``fast_paths`` was ``taken``."""
    if "taken" not in record:
        return record
    return {("fast_paths" if key == "taken" else key): value for key, value in record.items()}


def _with_blocks(record: dict[str, Any]) -> dict[str, Any]:
    phases = at(record, "latency.phases") or {}
    if not any("samples_s" in phase for phase in phases.values()):
        return record
    samples_s = {name: phase["samples_s"] for name, phase in phases.items()}
    latency = dict(record["latency"])
    latency["phases"] = {name: {"mean_s": phase["median_s"]} for name, phase in phases.items()}
    block = {"phases": samples_s, "stopped_because": latency.get("stopped_because"), "error": None}
    return {**record, "latency": {**latency, "num_blocks": 1, "blocks": [block]}}


def upgraded_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of schema 1 with its options in groups, the LoRA rank among them."""
    rank = case.get("lora_rank", 16)
    options = {**(case.get("options") or {}), "lora_rank": rank}
    # A value that equals a default of today is written as that default, since settings compare options by value.
    if "lora_scaling" in options:
        scaling = options["lora_scaling"]
        options["lora_scaling"] = None if scaling == 1 else scaling * rank
    if "critic_lr" in options and options["critic_lr"] == options.get("actor_lr"):
        options["critic_lr"] = None
    if options.get("attention") == "sdpa":
        options["attention"] = "auto"
    if "kv_cache" in options:
        options["kv_cache"] = {"preallocated": "static", "growing": "dynamic"}.get(options["kv_cache"])
    groups: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        group, _, field = RENAMED_OPTIONS.get(name, f"other.{name}").partition(".")
        groups.setdefault(group, {})[field] = value
    return {**{key: value for key, value in case.items() if key != "lora_rank"}, "options": groups}
