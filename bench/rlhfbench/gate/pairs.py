"""Pairs of blocks: what the records of two sides say of each pair."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhfbench.measure.interference import disturbance
from rlhfbench.measure.statistic import error_of_midmean, fast_mean, influences_on_fast_mean, midmean_of
from rlhfbench.records.blocks import block_values, step_values
from rlhfbench.records.file import Record

Values = Mapping[str, float]

# The block before measures memory.
FIRST_TIMED_BLOCK = 1
# Steps of each side from which on the error of a pair is that of its fast means, or of its mid-mean.
_MIN_STEPS = 8
# Standard deviation of the fast mean of normal values, as a multiple of their mean's: 1.27 of five, 1.30 of forty.
_SPREAD_OF_FAST = 1.3


class LogRatio(NamedTuple):
    """The logarithm of head / base of one time in one pair.

    Attributes:
        value: The logarithm.
        error: Its standard error over the steps; 0 where it is not known.
    """

    value: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BlockPair:
    """A block of the base and one of the head.

    Attributes:
        base: Seconds per sample of the base: ``total``, the kinds, and each phase.
        head: The same of the head.
        ratios: Of head to base, by quantity: by the fast mean of the logarithms of each side's steps, and by the
            mid-mean of the logarithms of the rounds' ratios, or of each side's steps where these were not taken in
            turns. A quantity that some step lacks has one ratio, of the means.
        disturbed: Whether something disturbed the base, and the head.
        steps: What ``base`` and ``head`` are of: every step of each.
    """

    base: Values
    head: Values
    ratios: Mapping[str, tuple[LogRatio, ...]]
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
        in_turns = bool(base_block.get("in_turns") and head_block.get("in_turns"))
        found.append(
            BlockPair(
                base=_shown(base_s, steps[0]),
                head=_shown(head_s, steps[1]),
                ratios=dict(_ratios(*steps, in_turns=in_turns)),
                disturbed=(_is_disturbed(base_block), _is_disturbed(head_block)),
                steps=steps,
            )
        )
    return found


def _shown(values: Values, steps: Sequence[Values]) -> Values:
    """The values of a block; of what the middle half of its steps lacks, the mean over all steps."""
    return {name: value or statistics.fmean(step[name] for step in steps) for name, value in values.items()}


def _ratios(
    base: Sequence[Values], head: Sequence[Values], *, in_turns: bool
) -> Iterator[tuple[str, tuple[LogRatio, ...]]]:
    """Yields each quantity that took time on both sides, with its ratios."""
    for name in [name for name in base[0] if name in head[0]]:
        sides = [[step[name] for step in side] for side in (base, head)]
        if min(map(len, sides)) > 1 and min(map(min, sides)) > 0:
            logs = [[math.log(value) for value in side] for side in sides]
            yield name, _ratios_of_rounds(*logs) if in_turns else _ratios_of_blocks(*logs)
        elif all(map(any, sides)):
            old_s, new_s = map(statistics.fmean, sides)
            yield name, (LogRatio(math.log(new_s / old_s), 0.0),)


def _ratios_of_rounds(base: Sequence[float], head: Sequence[float]) -> tuple[LogRatio, ...]:
    """The ratio by fast means, then that by the mid-mean, from logarithms of seconds of at least two rounds."""
    # One side may have had a turn more when the other failed.
    rounds = list(zip(base, head, strict=False))
    old, new = zip(*rounds, strict=True)
    logs = [new_log - old_log for old_log, new_log in rounds]
    pulls = zip(influences_on_fast_mean(old), influences_on_fast_mean(new), strict=True)
    fast_error, middle_error = _errors(logs, [new_pull - old_pull for old_pull, new_pull in pulls])
    return LogRatio(fast_mean(new) - fast_mean(old), fast_error), LogRatio(midmean_of(logs), middle_error)


def _ratios_of_blocks(base: Sequence[float], head: Sequence[float]) -> tuple[LogRatio, ...]:
    """The same from two blocks that share no rounds: the errors of both sides add up."""
    of_base, of_head = (_errors(side, influences_on_fast_mean(side)) for side in (base, head))
    return tuple(
        LogRatio(mean(head) - mean(base), math.hypot(*errors))
        for mean, *errors in zip((fast_mean, midmean_of), of_base, of_head, strict=True)
    )


def _errors(logs: Sequence[float], pulls: Sequence[float]) -> tuple[float, float]:
    """The standard errors of the fast mean, from the influences of the steps on it, and of the mid-mean of ``logs``."""
    root = math.sqrt(len(logs))
    if len(logs) < _MIN_STEPS:
        # The middle half of five rounds agrees by chance: one pair in 14 has less than 0.3 of the usual error, and
        # would weigh too much. Among pairs timed beside much other load, 1.8 % of the cases without a change were false
        # alarms without this rule, and none with it.
        middle_error = statistics.stdev(logs) / root
        return _SPREAD_OF_FAST * middle_error, middle_error
    return statistics.stdev(pulls) / root, error_of_midmean(logs)


def _is_disturbed(block: Mapping[str, Any]) -> bool:
    return disturbance(block.get("interference") or {}) is not None
