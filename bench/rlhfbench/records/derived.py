"""Values that follow from a record's keys: columns of the frame that have no key of their own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlhfbench.cases.settings import changed_options
from rlhfkernels.methods.table import METHODS

_COMMA = re.compile(r",\s+")  # between options; none may be left in a value


def at(record: Any, path: str) -> Any:
    """The value at a dotted ``path``; ``None`` when any key of it is absent."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


def disturbed_seconds(record: Mapping[str, Any]) -> str | None:
    """The disturbances of the blocks behind the seconds; ``None`` if there were none, or enough others remain."""
    counted, disturbed = (at(record, f"latency.num_{kind}_blocks") or 0 for kind in ("counted", "disturbed"))
    among = counted > (num_whole_blocks(record) or 0) - disturbed
    return at(record, "latency.disturbed_by") if among else None


def method_title(record: Mapping[str, Any]) -> str | None:
    """The method as reports print it."""
    name = at(record, "case.method")
    return METHODS[name].title if name in METHODS else name  # a method may be gone


def family(record: Mapping[str, Any]) -> str | None:
    """The method's family; ``None`` for a method that is gone."""
    name = at(record, "case.method")
    return METHODS[name].family if name in METHODS else None


def same_work_as(record: Mapping[str, Any]) -> str | None:
    """The method that does the same work, if there is one."""
    name = at(record, "case.method")
    return METHODS[name].same_work_as if name in METHODS else None


def loads(record: Mapping[str, Any]) -> str | None:
    """The weights that the method loads, in words: ``1 model, 2 LoRA sets``."""
    method = METHODS.get(at(record, "case.method"))
    if method is None:
        return None
    counts = {"model": method.num_static_models, "LoRA set": len(method.adapter_sets)}
    return ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items() if count)


def options(record: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The options of a record's case, by group."""
    return at(record, "case.options") or {}


def zero_stage(record: Mapping[str, Any]) -> int | None:
    """The stage of DeepSpeed's ZeRO; ``None`` under another strategy."""
    parallel = at(record, "case.options.parallel") or {}
    return parallel.get("zero_stage") if parallel.get("strategy") == "deepspeed" else None


def strategy(record: Mapping[str, Any]) -> str:
    """The way in which the ranks of a case share a step, in words; empty for one process."""
    from rlhfreports.ranks import strategy_words  # it imports pandas, which takes half a second

    parallel = at(record, "case.options.parallel") or {}
    if parallel.get("strategy") is None:
        return ""
    return strategy_words(parallel["strategy"], zero_stage(record), f"parallel.gather={parallel.get('gather')}")


def world_size(record: Mapping[str, Any]) -> int:
    """The number of ranks of a record's case; 1 for a record from before there were several."""
    return at(record, "case.options.parallel.world_size") or 1


def rows_per_step(record: Mapping[str, Any]) -> int:
    """Data rows of a step over all ranks, which seconds per sample divide by."""
    batch_size: int = record["case"]["batch_size"]
    return batch_size * world_size(record)


def global_batch_size(record: Mapping[str, Any]) -> int | None:
    """Data rows of a step over all ranks; ``None`` without a batch size."""
    return None if at(record, "case.batch_size") is None else rows_per_step(record)


def place(names: Iterable[str], name: str | None) -> int | None:
    """The place of ``name`` in ``names``; ``None`` when it is not there."""
    return {name: place for place, name in enumerate(names)}.get(name or "")


def seq_len(record: Mapping[str, Any]) -> int | None:
    """Tokens of a prompt and its completion."""
    lengths = [at(record, "case.prompt_len"), at(record, "case.completion_len")]
    return None if None in lengths else sum(lengths)


def num_timed_steps(record: Mapping[str, Any]) -> int | None:
    """Timed steps of all blocks."""
    blocks = at(record, "latency.blocks") or ()
    steps = [max((len(samples) for samples in (block.get("phases") or {}).values()), default=0) for block in blocks]
    return sum(steps) if steps else None


def num_whole_blocks(record: Mapping[str, Any]) -> int | None:
    """Blocks without an error."""
    blocks = at(record, "latency.blocks")
    return None if blocks is None else sum(block.get("error") is None for block in blocks)


def ceiling(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Returns a function that reads a ceiling: the highest rate of any block, as for floors."""

    def read(record: Mapping[str, Any]) -> float | None:
        blocks = at(record, "latency.blocks") or ()
        return max((rate for block in blocks if (rate := at(block, f"ceilings.{name}")) is not None), default=None)

    return read


def process_peak_bytes(record: Mapping[str, Any]) -> int | None:
    """The peak of the process as a whole: the driver's on CUDA, the resident set on a CPU."""
    view = "host" if at(record, "case.device") == "cpu" else "driver"
    peak: int | None = at(record, f"memory.views.{view}_peak_bytes")
    return peak


def per_sequence(kind: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Returns a function that reads the seconds per sequence of ``kind``."""

    def read(record: Mapping[str, Any]) -> float | None:
        seconds, num = at(record, f"latency.{kind}_s_per_sample"), at(record, "latency.sequences_per_sample")
        return None if seconds is None or num is None else seconds / num

    return read


def options_text(record: Mapping[str, Any]) -> str:
    """The options that differ from the setting's, as ``name=value``."""
    changed = changed_options(options(record))
    return ", ".join(f"{name}={_COMMA.sub(',', str(value))}" for name, value in changed.items())
