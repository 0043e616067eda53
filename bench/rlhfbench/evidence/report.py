"""The report of the evidence, in Markdown, from the files of the parts alone. Needs no drawing library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlhfbench.cases.settings import setting_of
from rlhfbench.errors import RecordsError
from rlhfbench.evidence.goals import GOALS, Measured, plan_error
from rlhfbench.evidence.items import BATCHES_NAME, read_items, worst
from rlhfbench.evidence.parts import PARTS
from rlhfbench.evidence.request import GIB, PPO_METHODS, Request
from rlhfbench.evidence.reserve import fit_reserve
from rlhfbench.measure.options import SNAPSHOT_NAME
from rlhfbench.planning.devices import Accelerator
from rlhfbench.planning.max_batch import with_batch
from rlhfbench.records.derived import at, disturbed_seconds
from rlhfbench.records.file import Record, read_records
from rlhfkernels.methods.table import METHODS

# Hydra-RLHF (arXiv:2309.00754), Table 1: Llama-7B, 400 + 400 tokens, rank 128, 8 GPUs of 80 GB with ZeRO-1. Batch;
# model, activation and total in GiB; inference, update and total in seconds a sample.
PAPER: dict[str, tuple[float | None, ...]] = {
    "full": (1, 111.8, 101.3, 220, None, None, None),
    "lora": (1, 53.2, 12.5, 68.0, 17.23, 1.52, 18.75),
    "joined-hydra": (4, 14.3, 51.4, 67.9, 4.63, 0.38, 5.01),
    "hydra": (4, 15.9, 52.8, 71.1, 4.88, 1.59, 6.47),
}
_MISSING = "–"
_DISTURBED = "!"  # after the seconds of a case beside which something else used the machine


def report(folder: Path, found: dict[str, Any]) -> str:
    """Returns the report.

    Args:
        folder: of the evidence.
        found: the content of ``evidence.json``.
    """
    settings = found["environment"]["settings"]
    runs = {name: _records(folder / "runs" / name) for name in ("methods", "lengths", "settings", "profile")}
    decode, unfit = read_items(folder / "decode.json"), _unfit(folder)
    goals = Measured(
        on_cuda=settings["device"] != "cpu",
        records=runs["methods"],
        decode=decode,
        methods=[name for name in PPO_METHODS if name not in unfit],
        decode_batches=Request.read(folder).sizes.decode_batches,
    )
    sections = [
        f"# Evidence: {settings['model']} on {_device(found['environment'], settings['device'])}",
        _about(found["environment"]),
        "## Goals",
        _table(("goal", "found", "verdict"), [(goal.text, *goal.verdict(goals)) for goal in GOALS]),
        "## Parts",
        _table(("part", "what", "outcome", "s", "said"), _parts(found["parts"])),
        "## Table 1, beside the paper's",
        "GiB and seconds a sample. The model column is the persistent one, as the paper's. The paper divides the "
        "optimizer among 8 GPUs; here it is whole.",
        _table(_TABLE_1, _table_1(runs["methods"], unfit)),
        _disturbed(runs["methods"]),
        "## Plan, allocator, driver",
        _table(_MEMORY, [_memory(record) for record in _ok(runs["methods"])]),
        _reserve(_ok(runs["methods"]), found["environment"], settings["device"]),
        "## Seconds per sample by length",
        _table(_TIMES, [_times(record) for record in runs["lengths"]]),
        _disturbed(runs["lengths"]),
        "## Decoding",
        _table(_DECODE, [_decode(key, item) for key, item in decode.items() if key.startswith("batch ")]),
        "## Settings",
        _table(("setting", *_TIMES), [(_setting(record), *_times(record)) for record in runs["settings"]]),
        _disturbed(runs["settings"]),
        "## Ops",
        "Relative errors against the reference in float64; seconds with gradients where the op has them.",
        _table(_OPS, _ops(read_items(folder / "ops.json"))),
        "## Against transformers and PEFT",
        _table(("dtype", "checks", "wrong", "largest error / tolerance"), _verify(read_items(folder / "verify.json"))),
        "## Profile",
        _profile(folder, runs["profile"], read_items(folder / "profile.json")),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _records(run: Path) -> list[Record]:
    """The records of a run; none where it has not begun or cannot be read."""
    try:
        return read_records(run) if (run / "records.jsonl").is_file() else []
    except RecordsError:
        return []


def _ok(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record["outcome"] == "ok"]


def _device(environment: dict[str, Any], device: str) -> str:
    gpus = environment.get("gpus") or []
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and index < len(gpus):
        return str(gpus[index]["name"])
    return str(at(environment, "cpu.model") or device)


def _about(environment: dict[str, Any]) -> str:
    names = ("torch", "transformers", "triton")
    versions = ", ".join(f"{name} {at(environment, f'versions.{name}') or 'absent'}" for name in names)
    commit = at(environment, "source.commit") or "unknown"
    dirty = " with changes" if at(environment, "source.dirty") else ""
    return f"{environment['started_at']}, Python {environment['python']}, {versions}, commit {commit}{dirty}."


def _parts(parts: dict[str, Any]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for number, part in PARTS.items():
        entry = parts.get(str(number), {"outcome": "not run", "wall_s": None, "error": None})
        rows.append((number, part.title, entry["outcome"], _number(entry["wall_s"], 0), entry["error"] or ""))
    return rows


_TABLE_1 = ("method", "", "batch", "model", "activation", "total", "inference s", "update s", "total s", "outcome")


def _unfit(folder: Path) -> set[str]:
    """Methods whose case of part 3 does not fit with even one row. Other parts keep their batches in the same file."""
    request = Request.read(folder)
    return {
        item["method"]
        for case_id, item in read_items(folder / BATCHES_NAME).items()
        if item["batch_size"] == 0 and case_id == with_batch(request.case(item["method"]), 1).id
    }


def _table_1(records: Sequence[Record], unfit: set[str]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    by_method = {record["case"]["method"]: record for record in records}
    for name in PAPER | by_method | dict.fromkeys(unfit):
        if name in by_method:
            rows.append((METHODS[name].title, "here", *_measured(by_method[name])))
        elif name in unfit:
            rows.append((METHODS[name].title, "here", *[_MISSING] * 7, "does not fit, by plan"))
        if name in PAPER:
            rows.append((METHODS[name].title, "paper", *(_number(value, 2) for value in PAPER[name]), ""))
    return rows


def _measured(record: Record) -> Sequence[Any]:
    memory = [at(record, f"memory.{name}_bytes") for name in ("persistent_model", "activation", "total")]
    return (
        record["case"]["batch_size"],
        *(_number(None if value is None else value / GIB, 2) for value in memory),
        *_seconds(record),
        _outcome(record),
    )


def _seconds(record: Record) -> list[str]:
    """Seconds a sample of inference, update and both, with half of the 95 % interval where blocks give one.

    Those of a disturbed case are marked.
    """
    shown, mark = [], "" if disturbed_seconds(record) is None else _DISTURBED
    for name in ("inference", "update", "total"):
        half = at(record, f"latency.{name}_half_width_s_per_sample")
        mean = _number(at(record, f"latency.{name}_s_per_sample"), 4)
        shown.append((mean if half is None else f"{mean} ± {half:.4f}") + mark)
    return shown


def _disturbed(records: Sequence[Record]) -> str:
    """One sentence on the cases whose seconds are marked; empty without one."""
    found = [by for record in records if (by := disturbed_seconds(record)) is not None]
    if not found:
        return ""
    return (
        f"{_DISTURBED}: {len(found)} of {len(records)} cases {'was' if len(found) == 1 else 'were'} timed while "
        f"something else used the machine: {'; '.join(dict.fromkeys(found))}."
    )


def _outcome(record: Record) -> str:
    message = at(record, "error.message")
    return record["outcome"] if message is None else f"{record['outcome']}: {message}"


_MEMORY = ("method", "batch", "plan GiB", "ledger GiB", "allocator GiB", "reserved GiB", "driver GiB", "plan error")


def _memory(record: Record) -> Sequence[Any]:
    views = ("ledger_peak_bytes", "allocator_peak_bytes", "allocator_reserved_bytes", "driver_peak_bytes")
    values = [at(record, "plan.total_bytes"), *(at(record, f"memory.views.{name}") for name in views)]
    error = plan_error(record)
    return (
        record["case"]["method"],
        record["case"]["batch_size"],
        *(_number(None if value is None else value / GIB, 3) for value in values),
        _MISSING if error is None else f"{100 * error:+.2f} %",
    )


def _reserve(records: Sequence[Record], environment: dict[str, Any], device: str) -> str:
    """The reserve that these records call for, beside the one that plans keep of the device."""
    found = fit_reserve(records)
    gpus, index = environment.get("gpus") or [], int(device.partition(":")[2] or 0)
    if found is None or index >= len(gpus):
        return ""
    memory_bytes = gpus[index]["memory_bytes"]
    kept = Accelerator(name=device, memory_bytes=memory_bytes).reserve_bytes
    needed = found.bytes_of(memory_bytes)
    return (
        f"Reserve: the context and library workspaces take at most {found.context_bytes / GIB:.2f} GiB by the driver's "
        f"count, and the allocator reserves at most {100 * found.fragmentation:.1f} % beyond the plan. Of this "
        f"device that is {needed / GIB:.2f} GiB; plans keep {kept / GIB:.2f} GiB, which is "
        f"{'enough' if kept >= needed else 'too little'}. The allocator keeps freed blocks while there is room, so "
        "the second figure is an upper bound."
    )


_TIMES = ("method", "length", "batch", "inference s", "update s", "total s", "total GiB", "outcome")


def _times(record: Record) -> Sequence[Any]:
    case, total = record["case"], at(record, "memory.total_bytes")
    return (
        case["method"],
        case["prompt_len"] + case["completion_len"],
        case["batch_size"],
        *_seconds(record),
        _number(None if total is None else total / GIB, 3),
        _outcome(record),
    )


_DECODE = ("", "lengths", "ms a token", "floor / measured", "backend")


def _decode(key: str, item: dict[str, Any]) -> Sequence[Any]:
    if "failed" in item:
        return key, _MISSING, _MISSING, _MISSING, item["failed"]
    lengths = f"{item['prompt_len']} + {item['completion_len']}"
    return key, lengths, _number(item["ms_per_token"], 3), _number(item["floor_fraction"], 3), item["backend"]


def _setting(record: Record) -> str:
    return setting_of(record["case"]["options"])


_OPS = ("op", "by", "error", "gradient error", "ms", "")


def _ops(items: dict[str, Any]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for name, item in items.items():
        for label, found in item["implementations"].items():
            by = f"ours, {item['backend']}" if label == "ours" else label
            errors = ["" if found.get(key) is None else f"{found[key]:.1e}" for key in ("error", "gradient_error")]
            seconds = found.get("s")
            rows.append((name, by, *errors, _number(seconds and 1000 * seconds, 3), found.get("failed", "")))
    return rows


def _verify(items: dict[str, Any]) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for dtype, checks in items.items():
        shares = [check["error"] / check["tolerance"] for check in checks if check["tolerance"]]
        wrong = ", ".join(check["name"] for check in checks if check["outcome"] == "wrong") or "none"
        rows.append((dtype, len(checks), wrong, _number(worst(shares), 2)))
    return rows


def _profile(folder: Path, records: Sequence[Record], items: dict[str, Any]) -> str:
    if not records:
        return ""
    said = ["Traces of the phases are in `runs/profile/traces`."]
    if (folder / SNAPSHOT_NAME).is_file():
        said.append(f"The allocator's history is `{SNAPSHOT_NAME}`.")
    if (step := items.get("step")) is not None:
        said.append(f"Waits inside phases: {step['num_waits']} ({', '.join(step['waits']) or 'none'}).")
    return " ".join(said)


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return _MISSING
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "Not measured."
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
