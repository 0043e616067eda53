"""Turns of two processes, here of two threads."""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
from pathlib import Path

import pytest

from rlhfbench.measure.turns import Turns, run_in_turns


@pytest.fixture
def folder():
    """A folder whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def player(name, order, limit=None):
    """A job that notes each of its turns, and gives up after ``limit``."""

    def play(path):
        turns = Turns(path)
        while (limit is None or order.count(name) < limit) and turns.wait():
            order.append(name)
            turns.done()
        turns.close()

    return play


def test_every_round_has_one_turn_of_each_in_random_order(folder):
    order = []
    run_in_turns([player("a", order), player("b", order)], folder, 0.0, random.Random(1), aborts=[pytest.fail])
    rounds = ["".join(order[at : at + 2]) for at in range(0, len(order), 2)]
    assert len(rounds) == 5
    assert set(rounds) == {"ab", "ba"}
    assert not list(folder.iterdir())


def test_both_are_bound_to_the_cores_that_are_drawn_and_to_none_by_default(folder, monkeypatch):
    bound, order = [], []
    monkeypatch.setattr("rlhfbench.measure.turns.draw_cores", lambda number, rng: [number + 5])
    monkeypatch.setattr("rlhfbench.measure.turns.bind_peer", lambda connection, cores: bound.append(cores))
    jobs = [player("a", order), player("b", order)]
    run_in_turns(jobs, folder, 0.0, random.Random(1), [pytest.fail], num_cores=2)
    assert bound == [[7], [7]]
    run_in_turns(jobs, folder, 0.0, random.Random(1), [pytest.fail])
    assert bound == [[7], [7]]


def test_a_budget_of_many_short_turns_ends_after_a_thousand_rounds(folder):
    order = []
    run_in_turns([player("a", order), player("b", order)], folder, 1e6, random.Random(1), aborts=[pytest.fail])
    assert len(order) == 2000


@pytest.mark.parametrize("limit", [0, 2])
def test_a_job_that_ends_early_ends_the_turns_of_the_other(folder, limit):
    order = []
    jobs = [player("a", order, limit=limit), player("b", order)]
    run_in_turns(jobs, folder, 1e6, random.Random(1), aborts=[pytest.fail])
    assert order.count("a") == limit
    assert order.count("b") <= limit + 1


def test_a_job_that_never_connects_ends_the_turns_of_the_other(folder):
    order = []
    run_in_turns([lambda path: None, player("b", order)], folder, 1e6, random.Random(1), aborts=[pytest.fail])
    assert not order


@pytest.mark.parametrize("begins_a_turn", [True, False])
@pytest.mark.parametrize("comes_first", [True, False])
def test_a_job_that_hangs_ends_the_turns_of_the_other(folder, begins_a_turn, comes_first):
    order, freed = [], threading.Event()

    def hang(path):
        with contextlib.closing(Turns(path)) if begins_a_turn else contextlib.nullcontext() as turns:
            if begins_a_turn:
                turns.wait()
            assert freed.wait(60)

    def play(path):
        player("b", order)(path)
        freed.set()

    jobs = [hang, play] if comes_first else [play, hang]
    run_in_turns(jobs, folder, 1e6, random.Random(1), aborts=[pytest.fail], turn_timeout_s=0.01)
    assert freed.is_set()
    assert len(order) <= begins_a_turn


def test_an_error_of_a_job_is_raised_after_the_others_were_aborted(folder):
    waiting = threading.Event()

    def fail(path):
        raise ValueError("out of order")

    jobs = [fail, lambda path: waiting.wait()]
    with pytest.raises(ValueError, match="out of order"):
        run_in_turns(jobs, folder, 1.0, random.Random(1), aborts=[waiting.set])
    assert waiting.is_set()


def test_ctrl_c_in_a_turn_aborts_the_jobs_and_ends_all_turns(folder):
    aborted, order = threading.Event(), []
    main = threading.get_ident()

    def interrupt(path):
        turns = Turns(path)
        assert turns.wait()
        # To the main thread, as a terminal's Ctrl-C: it waits for the end of this turn.
        signal.pthread_kill(main, signal.SIGINT)
        aborted.wait(20)
        turns.close()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_turns([interrupt, player("b", order)], folder, 1e6, random.Random(1), aborts=[aborted.set])
    finally:
        signal.signal(signal.SIGINT, before)
    assert aborted.is_set()
    assert len(order) <= 1
    assert not list(folder.iterdir())


def test_without_a_referee_there_is_no_turn(folder):
    assert not Turns(str(folder / "nobody")).wait()
