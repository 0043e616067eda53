"""Prints by how many percent a plan misses the rank that holds most, for methods, strategies and worlds.

``python tests/bench/planning/zero_table.py --worlds 2,4 --sizes 32+32x2`` takes minutes: every case runs on its ranks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from rlhfbench.cases.spec import parse_option
from rlhfbench.measure.memory import OUTER_VIEWS, measure_memory, memory_object
from rlhfbench.planning.predict import plan_case
from rlhfkernels import Case, Options, build_step
from rlhfkernels.parallel.deepspeed import load
from rlhfkernels.parallel.world import join_world

METHODS = ("full", "lora", "dynamic-lora", "joined-hydra", "hydra")
# The stages of DeepSpeed's ZeRO, and torch's strategies.
STRATEGIES = ("0", "1", "2", "3", "ddp", "fsdp")


def case_of(method: str, strategy: str, world_size: int, size: str, dtype: str, more: Mapping[str, object]) -> Case:
    """``size`` is prompt + completion x batch."""
    options: dict[str, object] = {"parallel.world_size": world_size, "parallel.strategy": strategy, **more}
    if strategy.isdigit():
        options |= {"parallel.strategy": "deepspeed", "parallel.zero_stage": int(strategy)}
        options["parallel.reduce_bucket_size"] = 100_000  # the default's 2 GB would hide every difference
    prompt_len, completion_len, batch_size = map(int, size.replace("+", "x").split("x"))
    return Case(
        method=method,
        model="tiny",
        prompt_len=prompt_len,
        completion_len=completion_len,
        batch_size=batch_size,
        dtype=dtype,
        options=Options.of(options),
    )


def measured(rank: int, address: str, writer: Connection, cases: Sequence[Case]) -> None:
    """Sends the highest total of a rank's third step of every case, the least of three.

    Gloo's threads may hold what they sent for a moment: on a busy machine a step held up to 7 % more.
    """
    torch.set_num_threads(1)
    linear = nn.functional.linear
    world = join_world(rank=rank, size=cases[0].options.parallel.world_size, address=address)
    for each in cases:
        step = build_step(each, world=world)
        for _ in range(2):  # moments are made in the first; the second is the first with DDP's final buckets
            step.run()
        ledgers = [measure_memory(step, "cpu", lambda name: None) for _ in range(3)]
        writer.send(min(memory_object(each, dict.fromkeys(OUTER_VIEWS))["total_bytes"] for each in ledgers))
        del step, ledgers
        nn.functional.linear = linear  # stage 3 replaces it for the whole process
        gc.collect()
        world.barrier()
    writer.close()
    os._exit(0)


def worst_ranks(cases: Sequence[Case]) -> list[int]:
    """The highest total of any rank for each of ``cases``, which have one world size."""
    context = multiprocessing.get_context("fork")
    size = cases[0].options.parallel.world_size
    address = f"file://{Path(tempfile.mkdtemp()) / 'rendezvous'}"
    readers, processes = [], []
    for rank in range(size):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=measured, args=(rank, address, writer, cases), daemon=True)
        process.start()
        writer.close()
        readers.append(reader)
        processes.append(process)
    found = [max(reader.recv() for reader in readers) for _ in cases]
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--worlds", default="2,4")
    parser.add_argument("--sizes", default="12+3x2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--option", action="append", default=[])
    asked = parser.parse_args()
    more = dict(map(parse_option, asked.option))
    methods, strategies = asked.methods.split(","), asked.strategies.split(",")
    load(torch.device("cpu"))
    print("| tokens, ranks | method |", " | ".join(strategies), "|")
    print("| --- " * (2 + len(strategies)) + "|")
    for size, world_size in itertools.product(asked.sizes.split(","), map(int, asked.worlds.split(","))):
        for method in methods:
            cases = [case_of(method, strategy, world_size, size, asked.dtype, more) for strategy in strategies]
            errors = [
                100 * (plan_case(case).total_bytes / worst - 1)
                for case, worst in zip(cases, worst_ranks(cases), strict=True)
            ]
            print(f"| {size}, {world_size} | `{method}` |", " | ".join(f"{each:+.2f}" for each in errors), "|")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
