"""Readings of a Chrome trace of the torch profiler: time by op, and time by stack for a flame graph. Needs no torch.

On CUDA a kernel counts to the op, and to the stack, that launched it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]

NATIVE_PREFIX = "native::"  # of the ops in C, which the profiler alone would not see
OPS = ("cpu_op", "user_annotation")
CUDA_CALLS = ("cuda_runtime", "cuda_driver")
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
PYTHON = "python_function"

MAX_OPS = 40
MAX_NODES = 600
# Narrower nodes cannot be seen in a picture of a thousand pixels.
MIN_SHARE = 0.001
_MAX_NAME_CHARS = 160
# Frames of the instrument itself, with all that they call.
_INSTRUMENT = re.compile(r"^(rlhfkernels/observer\.py|torch/profiler/)")
# Frames that only pass a call on: their children take their place. A named op begins in a frame of
# torch/autograd/profiler.py and outlasts it.
_WRAPPER = re.compile(
    r"^(<built-in |rlhfbench/|torch/autograd/profiler\.py|torch/_ops\.py|autograd::engine::evaluate_function)"
    r"|: (decorate_context|_wrapped_call_impl|_call_impl)$"
)
_CHAIN_SHARE = 0.95


@dataclasses.dataclass(slots=True)
class _Span:
    """An event with its place among the others of its thread, in microseconds."""

    event: Event
    end_us: float
    self_us: float
    parent: _Span | None


def _spans(events: Iterable[Event]) -> list[_Span]:
    """Nests the events of each thread by time, parents first.

    Clocks of ops and of Python frames differ by less than a microsecond: an event that begins inside another is its
    child, and ends with it at the latest.
    """
    spans: list[_Span] = []
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    for found in threads.values():
        open_spans: list[_Span] = []
        for event in sorted(found, key=lambda event: (event["ts"], -event["dur"])):
            while open_spans and open_spans[-1].end_us <= event["ts"]:
                open_spans.pop()
            parent = open_spans[-1] if open_spans else None
            end_us = event["ts"] + event["dur"]
            if parent is not None:
                end_us = min(end_us, parent.end_us)
                parent.self_us -= end_us - event["ts"]
            span = _Span(event, end_us, end_us - event["ts"], parent)
            open_spans.append(span)
            spans.append(span)
    return spans


def _complete(events: Iterable[Event], categories: Sequence[str]) -> list[Event]:
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]


def _kernels_us(events: Iterable[Event]) -> dict[Any, float]:
    """Microseconds of kernels and copies by the correlation of the CUDA call that launched them."""
    found: dict[Any, float] = defaultdict(float)
    for event in _complete(events, KERNELS):
        found[(event.get("args") or {}).get("correlation")] += event["dur"]
    return found


def _kind(event: Event) -> str:
    if event["cat"] in CUDA_CALLS:
        return "CUDA call"
    if event["cat"] == PYTHON:
        return "Python"
    return "native op" if event["name"].startswith(NATIVE_PREFIX) else "torch op"


def _short(name: str) -> str:
    name = name.removeprefix(NATIVE_PREFIX)
    return re.sub(r"(?<=^nn\.Module: )(\w+?)_\d+$", r"\1", name)[:_MAX_NAME_CHARS]


def read_trace(path: Path) -> list[Event]:
    """The events of a Chrome trace that torch wrote, compressed."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    return events


def num_ops(events: Iterable[Event]) -> int:
    """The number of ops in a trace."""
    return len(_complete(events, OPS))


def ops_table(events: Sequence[Event], wall_s: float) -> dict[str, Any]:
    """Time by op and by kernel.

    Args:
        events: Of the trace.
        wall_s: Seconds of the stretch.

    Returns:
        ``ops``: the largest ``MAX_OPS``, each ``name``, ``kind``, ``count``, ``self_s`` (on the CPU, without the ops
        that it calls) and ``device_s`` (of the kernels that it launched itself); ``kernels``: those of the device,
        each ``name``, ``count`` and ``device_s``; ``outside_s``: Seconds in no op, which is Python.
    """
    kernels_us = _kernels_us(events)
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    busy_us: dict[Any, float] = defaultdict(float)
    for span in _spans(_complete(events, (*OPS, *CUDA_CALLS))):
        row = rows[_short(span.event["name"]), _kind(span.event)]
        row[0] += 1
        row[1] += span.self_us
        busy_us[span.event.get("tid")] += span.self_us
        if span.event["cat"] in CUDA_CALLS:
            launcher = span.event if span.parent is None else span.parent.event
            launched_us = kernels_us.get((span.event.get("args") or {}).get("correlation"), 0.0)
            rows[_short(launcher["name"]), _kind(launcher)][2] += launched_us
    ops: list[dict[str, Any]] = [
        {"name": name, "kind": kind, "count": int(count), "self_s": self_us / 1e6, "device_s": device_us / 1e6}
        for (name, kind), (count, self_us, device_us) in rows.items()
    ]
    ops.sort(key=lambda row: -max(row["self_s"], row["device_s"]))
    return {
        "ops": ops[:MAX_OPS],
        "kernels": _kernel_rows(events),
        "outside_s": max(0.0, wall_s - max(busy_us.values(), default=0.0) / 1e6),
    }


def _kernel_rows(events: Iterable[Event]) -> list[dict[str, Any]]:
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in _complete(events, KERNELS):
        row = rows[event["name"][:_MAX_NAME_CHARS]]
        row[0] += 1
        row[1] += event["dur"] / 1e6
    found: list[dict[str, Any]] = [
        {"name": name, "count": int(count), "device_s": device_s} for name, (count, device_s) in rows.items()
    ]
    return sorted(found, key=lambda row: -row["device_s"])[:MAX_OPS]


@dataclasses.dataclass(slots=True)
class _Node:
    """All calls of one name from one stack."""

    name: str
    kind: str
    total_us: float = 0.0
    device_us: float = 0.0
    count: int = 0
    children: dict[tuple[str, str], _Node] = dataclasses.field(default_factory=dict)


def stack_tree(events: Sequence[Event]) -> dict[str, list[Any]]:
    """The calls of a trace as a tree, in the order of a flame graph: equal calls from equal stacks are one node.

    Frames that only pass a call on, the instrument's own and what is under ``MIN_SHARE`` of the whole are left out; so
    are the outermost frames while nearly all of the time is in one child.

    Returns:
        Columns, one value a node, parents first: ``name``, ``kind``, ``parent`` (row of the parent, -1 for a root),
        ``total_s`` (with its children, on the CPU), ``device_s`` (of the kernels launched in it) and ``count``.
    """
    root = _tree(events)
    roots = list(root.children.values())
    while len(roots) == 1 and roots[0].children:
        largest = max(roots[0].children.values(), key=lambda node: node.total_us)
        if largest.total_us < _CHAIN_SHARE * roots[0].total_us:
            break
        roots = [largest]
    return _rows(roots)


def _tree(events: Sequence[Event]) -> _Node:
    kernels_us = _kernels_us(events)
    root = _Node("", "")
    nodes: dict[int, tuple[_Node, ...]] = {}  # the path from the root of every span, by the id of the span
    found = _complete(events, (*OPS, *CUDA_CALLS, PYTHON))
    spans = _spans(event for event in found if not _WRAPPER.search(event["name"]))
    for span in spans:
        path = nodes[id(span.parent)] if span.parent is not None else (root,)
        name = span.event["name"]
        duration_us = span.end_us - span.event["ts"]
        if not path or _INSTRUMENT.search(name):
            for node in path:
                node.total_us -= duration_us
            nodes[id(span)] = ()
            continue
        key = _short(name), _kind(span.event)
        node = path[-1].children.setdefault(key, _Node(*key))
        node.count += 1
        node.total_us += duration_us
        path = (*path, node)
        nodes[id(span)] = path
        launched_us = kernels_us.get((span.event.get("args") or {}).get("correlation"), 0.0)
        if span.event["cat"] in CUDA_CALLS and launched_us:
            for node in path:
                node.device_us += launched_us
    return root


def _rows(roots: Sequence[_Node]) -> dict[str, list[Any]]:
    wholes = [sum(node.total_us for node in roots), sum(node.device_us for node in roots)]
    share = MIN_SHARE
    while True:
        rows: list[tuple[_Node, int]] = []
        _collect(roots, -1, [share * whole for whole in wholes], rows)
        if len(rows) <= MAX_NODES:
            break
        share *= 2
    return {
        "name": [node.name for node, _ in rows],
        "kind": [node.kind for node, _ in rows],
        "parent": [parent for _, parent in rows],
        "total_s": [node.total_us / 1e6 for node, _ in rows],
        "device_s": [node.device_us / 1e6 for node, _ in rows],
        "count": [node.count for node, _ in rows],
    }


def _collect(nodes: Iterable[_Node], parent: int, least_us: Sequence[float], rows: list[tuple[_Node, int]]) -> None:
    for node in nodes:
        if node.total_us > least_us[0] or node.device_us > least_us[1]:
            rows.append((node, parent))
            _collect(node.children.values(), len(rows) - 1, least_us, rows)
