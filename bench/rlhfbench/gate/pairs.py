"""Pairs of blocks: what the records of two sides say of each pair."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rlhfbench.measure.interference import disturbance
from rlhfbench.measure.statistic import fast_mean, influences_on_fast_mean
from rlhfbench.records.blocks import block_values, step_values
from rlhfbench.records.file import Record

Values = Mapping[str, float]

# The block before measures memory.
FIRST_TIMED_BLOCK = 1
# Rounds from which on the error of a pair is that of its fast means.
_MIN_ROUNDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockPair:
    """A block of the base and one of the head.

    Attributes:
        base: Seconds per sample of the base: ``total``, the kinds, and each phase. Of steps that were taken in turns:
            the exponential of the fast mean of their logarithms.
        head: The same of the head.
        log_ratios: Of head to base, by quantity.
        errors: Standard errors of the log ratios over the rounds, by quantity; 0 for a pair that has no rounds.
        disturbed: Whether something disturbed the base, and the head.
        steps: What ``base`` and ``head`` are of: every step of each.
    """

    base: Values
    head: Values
    log_ratios: Values
    errors: Values
    disturbed: tuple[bool, bool]
    steps: tuple[Sequence[Values], Sequence[Values]]


def pairs_of(base: Record, head: Record) -> list[BlockPair]:
    """Returns the timed pairs of which both blocks are whole."""
    sides = [zip(block_values(record), record["latency"]["blocks"] or (), strict=True) for record in (base, head)]
    found = []
    for (base_s, base_block), (head_s, head_block) in list(zip(*sides, strict=False))[FIRST_TIMED_BLOCK:]:
        if base_s is None or head_s is None:
            continue
        steps = (step_values(base, base_block), step_values(head, head_block))
        in_turns = base_block.get("in_turns") and head_block.get("in_turns")
        # One side may have had a turn more when the other failed. A phase that not every step enters has no ratio in
        # each round.
        rounds = list(zip(*steps, strict=False)) if in_turns else []
        logs = {**_logs([(base_s, head_s)]), **_logs(rounds)}
        means = {name: (fast_mean(old), fast_mean(new)) for name, (old, new) in logs.items()}
        found.append(
            BlockPair(
                base={**base_s, **{name: math.exp(old) for name, (old, _) in means.items()}},
                head={**head_s, **{name: math.exp(new) for name, (_, new) in means.items()}},
                log_ratios={name: new - old for name, (old, new) in means.items()},
                errors={name: _error(*sides) for name, sides in logs.items()},
                disturbed=(_is_disturbed(base_block), _is_disturbed(head_block)),
                steps=steps,
            )
        )
    return found


def _logs(rounds: Sequence[tuple[Values, Values]]) -> dict[str, tuple[list[float], list[float]]]:
    """Logarithms of both sides in every round, for each quantity that both sides have and that always took time."""
    if not rounds:
        return {}
    names = [name for name in rounds[0][0] if name in rounds[0][1]]
    return {
        name: ([math.log(base[name]) for base, _ in rounds], [math.log(head[name]) for _, head in rounds])
        for name in names
        if all(base[name] > 0 and head[name] > 0 for base, head in rounds)
    }


def _error(base: Sequence[float], head: Sequence[float]) -> float:
    """The standard error of the log ratio of a pair from its rounds; 0 for a pair that has no rounds."""
    if len(base) < 2:
        return 0.0
    # The fastest of five rounds agree by chance: one pair in 14 has less than 0.3 of the usual error, and would weigh
    # too much. Among pairs timed beside much other load, 1.8 % of the cases without a change were false alarms without
    # this rule, and none with it.
    if len(base) >= _MIN_ROUNDS:
        base, head = influences_on_fast_mean(base), influences_on_fast_mean(head)
    return statistics.stdev(new - old for old, new in zip(base, head, strict=True)) / math.sqrt(len(base))


def _is_disturbed(block: Mapping[str, Any]) -> bool:
    return disturbance(block.get("interference") or {}) is not None
