"""Ranks: a function in several forked processes that are one world."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfkernels.parallel.world import World, join_world, leave_world

_LONGEST_S = 120.0


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """Calls ``function(world, *arguments)`` on ``size`` ranks, and returns what each rank returned."""

    def call(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        context = multiprocessing.get_context("fork")  # what is imported is there, and a test's own function too
        address = f"file://{tmp_path}/rendezvous-{len(list(tmp_path.iterdir()))}"
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_run, args=(World(rank, size), address, writer, function, arguments), daemon=True)
            for rank, (_, writer) in enumerate(pipes)
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            for process in processes:
                process.start()
        try:
            for _, writer in pipes:
                writer.close()
            return [_received(reader) for reader, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    return call


def _received(reader: Connection) -> Any:
    assert reader.poll(_LONGEST_S), "a rank does not answer"
    result, problem = pickle.loads(reader.recv_bytes())
    assert problem is None, problem
    return result


def _run(world: World, address: str, writer: Connection, function: Callable[..., Any], arguments: Any) -> None:
    answer: tuple[Any, str | None]
    try:
        torch.set_num_threads(1)
        join_world(rank=world.rank, size=world.size, address=address, timeout_s=_LONGEST_S)
        answer = function(world, *arguments), None
        leave_world()
    except BaseException:
        answer = None, traceback.format_exc()
    writer.send_bytes(pickle.dumps(answer))
    os._exit(0)
