"""The record: every field, its place, and its column in the data frame of a run.

``FIELDS`` is the only list of them: ``make_record`` takes the keys from it, ``records_frame`` the columns. A new column
is one row here. Bytes are integers, seconds floats; names end in their unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from rlhfbench.cases.settings import setting_of
from rlhfbench.records import derived
from rlhfbench.records.derived import at
from rlhfkernels.config.settings import SETTINGS
from rlhfkernels.methods.table import METHODS
from rlhfkernels.observer import PARTS

SCHEMA = 2
KINDS = ("inference", "update")  # of phases; their sum is the total
OUTCOMES = ("ok", "oom", "timeout", "crashed", "invalid", "skipped")


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """One row of the schema: a key of the record, a column of the frame, or both.

    Attributes:
        source: the dotted path of the key, or a function of the record for a column that has no key.
        dtype: the nullable pandas dtype of the column, or ``list`` for a column of lists of numbers. A key without a
            column is an ``object``, ``null`` when absent, or a ``map``, ``{}`` when empty.
        meaning: one line for the documentation.
        name: the name of the column, if it is not the last key of the path.
        in_plan: ``plan`` has the key too, and the frame a column ``predicted_…`` if there is one.
    """

    source: str | Callable[[Mapping[str, Any]], Any]
    dtype: Literal["string", "Int64", "Float64", "list", "object", "map"]
    meaning: str
    name: str = ""
    in_plan: bool = False

    @property
    def column(self) -> str | None:
        """The name of the column, ``None`` for a key without one."""
        return None if self.dtype in ("object", "map") else self.name or str(self.source).rpartition(".")[2]

    def value(self, record: Mapping[str, Any]) -> Any:
        """The field's value in ``record``, ``None`` when absent."""
        return self.source(record) if callable(self.source) else at(record, self.source)


_MEASURED: tuple[Field, ...] = (
    # The case.
    Field("case.id", "string", "stable id of the case", name="case_id"),
    Field("case.method", "string", "method, as the command line names it"),
    Field(derived.method_title, "string", "method, as reports print it", name="method_title"),
    Field(
        lambda record: derived.place(METHODS, at(record, "case.method")),
        "Int64",
        "row of the method in METHODS: reports sort and color by it",
        name="method_order",
    ),
    Field(derived.family, "string", "family of the method; gains are taken within one", name="family"),
    Field(derived.loads, "string", "weights that the method loads, in words", name="loads"),
    Field(
        derived.same_work_as,
        "string",
        "method that does the same work: what the two differ by is the noise of a run",
        name="same_work_as",
    ),
    Field("case.model", "string", "preset, checkpoint folder, .gguf file or Hugging Face model id"),
    Field("case.prompt_len", "Int64", "tokens per prompt"),
    Field("case.completion_len", "Int64", "tokens per completion"),
    Field(derived.seq_len, "Int64", "prompt_len + completion_len", name="seq_len"),
    Field("case.batch_size", "Int64", "data rows (samples) per step; of one rank where there are several"),
    Field("case.device", "string", "device of the step"),
    Field("case.dtype", "string", "dtype of the weights"),
    Field("case.options.lora.r", "Int64", "rank of the adapters", name="lora_rank"),
    Field("case.seed", "Int64", "random seed"),
    Field(
        lambda record: setting_of(derived.options(record)),
        "string",
        "named setting that the case's options match; custom where they match none",
        name="setting",
    ),
    Field(
        lambda record: derived.place(SETTINGS, setting_of(derived.options(record))),
        "Int64",
        "row of the setting in SETTINGS, 0 is the default; absent for custom",
        name="setting_order",
    ),
    Field(
        derived.options_text,
        "string",
        "options that differ from the setting's, as name=value; empty when none",
        name="options",
    ),
    Field("case.options.parallel.world_size", "Int64", "ranks of the case", name="world_size"),
    Field("case.options.parallel.strategy", "string", "how ranks share a step: ddp, fsdp, deepspeed", name="parallel"),
    Field(
        derived.zero_stage,
        "Int64",
        "stage of DeepSpeed's ZeRO",
        name="zero_stage",
    ),
    Field(derived.global_batch_size, "Int64", "batch_size over all ranks", name="global_batch_size"),
    Field("world", "object", "what the ranks of the case measured, each of them and together"),
    Field("world.worst_rank", "Int64", "rank with the highest total: the memory columns are its own"),
    Field(
        "world.slowest_rank",
        "Int64",
        "rank whose timed steps took the longest in the first block: in a later one it may be another",
    ),
    Field("world.communication_calls", "Int64", "collectives of one step, on rank 0"),
    Field("world.communication_bytes", "Int64", "bytes of the tensors that these collectives work on, on rank 0"),
    Field(
        "world.waiting_share",
        "Float64",
        "share of a step that ranks wait in collectives, the mean of all; absent on CUDA",
    ),
    Field(
        "world.imbalance",
        "Float64",
        "seconds without waiting of the busiest rank, relative to the mean of all, minus 1; absent on CUDA",
    ),
    # The outcome.
    Field("outcome", "string", f"{', '.join(OUTCOMES[:-1])} or {OUTCOMES[-1]}"),
    Field("error", "object", "why the outcome is not ok"),
    Field("error.kind", "string", "exception or signal", name="error_kind"),
    Field("error.message", "string", "the error in one sentence", name="error"),
    Field("error.phase", "string", "phase in which it happened, if known", name="error_phase"),
    # Memory.
    Field(
        "memory.model_bytes",
        "Int64",
        "base + adapters + heads + gradients + optimizer, at the highest total of the step",
        in_plan=True,
    ),
    Field(
        "memory.activation_bytes",
        "Int64",
        "kv_cache + activations + gathered + buckets + temporary, at that moment",
        in_plan=True,
    ),
    Field("memory.rollout_bytes", "Int64", "rollout, at that moment", in_plan=True),
    Field("memory.total_bytes", "Int64", "model_bytes + activation_bytes + rollout_bytes", in_plan=True),
    Field(
        "memory.persistent_model_bytes",
        "Int64",
        "largest sum of weights, gradients and optimizer states at any phase's peak: the papers' model memory",
        in_plan=True,
    ),
    Field("memory.peak_phase", "string", "phase of the highest total", in_plan=True),
    Field("memory.parts", "map", "bytes by part, at the highest total", in_plan=True),
    *(
        Field(f"memory.parts.{part}", "Int64", f"part {part}, at the highest total", name=f"{part}_part_bytes")
        for part in PARTS
    ),
    Field("memory.phases", "map", "total_bytes and parts at the highest total of each phase", in_plan=True),
    Field("memory.largest_tensor", "object", "largest tensor that the step allocated: bytes, shape, op"),
    Field(
        "memory.largest_tensor.bytes", "Int64", "largest tensor that the step allocated", name="largest_tensor_bytes"
    ),
    Field("memory.views.ledger_peak_bytes", "Int64", "sum over live tensor storages"),
    Field("memory.views.allocator_peak_bytes", "Int64", "CUDA allocator, peak allocated"),
    Field("memory.views.allocator_reserved_bytes", "Int64", "CUDA allocator, peak reserved"),
    Field("memory.views.allocator_rest_bytes", "Int64", "allocator_peak_bytes - ledger_peak_bytes - workspace_bytes"),
    Field("memory.views.workspace_bytes", "Int64", "CUDA memory held as workspace by libraries such as cuBLAS"),
    Field("memory.views.driver_peak_bytes", "Int64", "NVML, sampled from another process from the build on"),
    Field(
        "memory.views.host_peak_bytes",
        "Int64",
        "largest resident set of the case's process until its last timed step, or until it failed",
    ),
    Field(
        derived.process_peak_bytes,
        "Int64",
        "the process as a whole: driver_peak_bytes on CUDA, host_peak_bytes on a CPU",
        name="process_peak_bytes",
    ),
    # Time.
    Field(
        "latency.inference_s_per_sample",
        "Float64",
        "seconds of the inference phases per sample; absent for a method without one",
    ),
    Field(
        "latency.update_s_per_sample",
        "Float64",
        "seconds of the update phases per sample; absent for a method without one",
    ),
    Field("latency.total_s_per_sample", "Float64", "inference + update"),
    *(
        Field(
            f"latency.{kind}_half_width_s_per_sample",
            "Float64",
            f"half the width of the 95 % interval of {kind}_s_per_sample; absent for one block",
        )
        for kind in (*KINDS, "total")
    ),
    *(
        Field(
            f"latency.{kind}_block_s_per_sample",
            "list",
            f"{kind}_s_per_sample of each block; null where it does not count",
        )
        for kind in (*KINDS, "total")
    ),
    Field("latency.num_blocks", "Int64", "blocks that the case is timed in, each in a process of its own"),
    Field(derived.num_whole_blocks, "Int64", "blocks that were timed", name="num_timed_blocks"),
    Field("latency.num_disturbed_blocks", "Int64", "blocks beside which something else used the machine"),
    Field("latency.num_counted_blocks", "Int64", "blocks behind the seconds: the undisturbed ones if there are three"),
    Field("latency.disturbed_by", "string", "what disturbed the most disturbed block; absent if nothing did"),
    Field("latency.blocks", "object", "start, steps, interference, ceilings and floors of each block"),
    Field(
        "latency.prepare_s_per_sample",
        "Float64",
        "seconds of the phase prepare, once a data set, per data row of it; no part of total; absent without one",
    ),
    Field(
        "latency.sequences_per_sample",
        "Int64",
        "sequences in one sample: 2 for a preference pair, n for best-of-n, else 1",
    ),
    *(
        Field(
            derived.per_sequence(kind),
            "Float64",
            f"{kind}_s_per_sample / sequences_per_sample",
            name=f"{kind}_s_per_sequence",
        )
        for kind in (*KINDS, "total")
    ),
    Field("latency.phases", "map", "kind, mean_s, half_width_s and block_s of each phase, for one step"),
    Field(
        derived.num_timed_steps, "Int64", "timed steps of all blocks, also of disturbed ones", name="num_timed_steps"
    ),
    Field(
        "latency.stopped_because",
        "string",
        "why timing ended, the least sure of the blocks that count: precise, steady or budget",
    ),
    Field("work.phases", "map", "flops, bytes, written_bytes and floor_s of each phase"),
    Field("work.floor_fraction", "Float64", "roofline time / measured time"),
    *(
        Field(derived.ceiling(name), "Float64", f"{meaning}, the highest of any block", name=name)
        for name, meaning in (
            ("matmul_flops_per_s", "FLOP/s of a large matmul"),
            ("copy_bytes_per_s", "bytes/s of a large copy, read and written"),
            ("read_bytes_per_s", "bytes/s of a large read"),
        )
    ),
    # The rest.
    Field("stats", "map", "losses, KL and ratio error of the first step"),
    Field(
        "engine", "object", "trunk that ran: fast or plain; both, the actor's first, if a reward model takes the other"
    ),
    Field("attention", "object", "attention implementation that ran: sdpa or eager, or both likewise"),
    Field("kernels", "object", "backend that ran: torch, triton or native"),
    Field("fast_paths", "string", "what else ran: cuda_graphs, packages whose kernels did; empty where nothing did"),
    Field("prompts", "object", "source and sizes of the training data"),
    Field(
        "prompts.num_truncated",
        "Int64",
        "data rows that were cut to the lengths of the case",
        name="num_prompts_truncated",
    ),
    Field("plan", "object", "the same memory, predicted without running"),
)
FIELDS: tuple[Field, ...] = (
    *_MEASURED,
    *(
        Field(
            row.source.replace("memory.", "plan."),
            row.dtype,
            f"{row.column}, predicted",
            name=f"predicted_{row.column}",
        )
        for row in _MEASURED
        if row.in_plan and row.column and isinstance(row.source, str)
    ),
    Field("plan.error.message", "string", "why the prediction failed, in one sentence", name="plan_error"),
    Field("run.id", "string", "id of the run, the same in all its segments", name="run_id"),
    Field("run.segment", "Int64", "0 for the first start of the run, n for its n-th resumption", name="run_segment"),
    Field("run.host", "string", "name of the machine", name="host"),
    Field("num_threads", "Int64", "threads within an op that the case used"),
    Field("started_at", "string", "start of the case, UTC, ISO 8601"),
    Field("wall_s", "Float64", "seconds of the whole case"),
)
# Columns that the frame has for every phase of its records.
PHASE_FIELDS: tuple[Field, ...] = (
    Field("memory.phases.{phase}.total_bytes", "Int64", "highest total in the phase", name="{phase}_phase_peak_bytes"),
    Field("latency.phases.{phase}.mean_s", "Float64", "seconds of the phase in one step", name="{phase}_phase_s"),
    Field("latency.phases.{phase}.block_s", "list", "the same, of each block", name="{phase}_phase_block_s"),
    Field("latency.phases.{phase}.kind", "string", "inference or update", name="{phase}_phase_kind"),
    Field("work.phases.{phase}.flops", "Int64", "FLOPs that the phase cannot avoid", name="{phase}_phase_flops"),
    Field("work.phases.{phase}.bytes", "Int64", "bytes that it cannot avoid", name="{phase}_phase_bytes"),
    Field("work.phases.{phase}.floor_s", "Float64", "its least time at the ceilings", name="{phase}_phase_floor_s"),
)


def columns(phases: Iterable[str] = ()) -> dict[str, Field]:
    """The columns of a frame whose records have ``phases``, in order: field by name."""
    per_phase = (
        dataclasses.replace(row, source=str(row.source).format(phase=phase), name=row.name.format(phase=phase))
        for phase in phases
        for row in PHASE_FIELDS
    )
    return {row.column: row for row in (*FIELDS, *per_phase) if row.column}


def columns_markdown() -> str:
    """The table of ``docs/columns.md``: name, dtype, place in the record and meaning of every column."""
    import pandas as pd

    rows = [
        (f"`{row.column}`", row.dtype, f"`{row.source}`" if isinstance(row.source, str) else "derived", row.meaning)
        for row in (*FIELDS, *PHASE_FIELDS)
        if row.column
    ]
    return str(pd.DataFrame(rows, columns=["column", "dtype", "in the record", "meaning"]).to_markdown(index=False))


def empty_record() -> dict[str, Any]:
    """The keys of a record, those of its case left out, with no value."""
    return _empty(FIELDS)


def empty_plan() -> dict[str, Any]:
    """The keys of a record's ``plan``, with no value."""
    return {**_empty(row for row in FIELDS if row.in_plan)["memory"], "error": None}


def _empty(rows: Iterable[Field]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    opaque = {"case"}  # objects that are absent or empty as a whole
    for row in rows:
        if not isinstance(row.source, str) or any(row.source.startswith(f"{path}.") for path in opaque):
            continue
        *path, key = row.source.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[key] = {} if row.dtype == "map" else None
        if row.dtype in ("object", "map"):
            opaque.add(row.source)
    return tree


def filled(empty: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with the keys of ``empty`` that it lacks."""
    return {
        key: filled(empty[key], value) if isinstance(empty.get(key), dict) and isinstance(value, dict) else value
        for key, value in {**empty, **given}.items()
    }
