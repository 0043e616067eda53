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
        ratios: Of head to base, by quantity. Where steps were taken in turns: by the fast mean of the logarithms of
            each side's steps, and by the mid-mean of the logarithms of the rounds' ratios. A quantity that some step
            lacks has one ratio, of the sums, and where steps were not taken in turns, of ``base`` and ``head``.
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
        in_turns = base_block.get("in_turns") and head_block.get("in_turns")
        # One side may have had a turn more when the other failed.
        base_s, head_s = _shown(base_s, steps[0]), _shown(head_s, steps[1])
        rounds = list(zip(*steps, strict=False)) if in_turns else [(base_s, head_s)]
        found.append(
            BlockPair(
                base=base_s,
                head=head_s,
                ratios=dict(_ratios(rounds)),
                disturbed=(_is_disturbed(base_block), _is_disturbed(head_block)),
                steps=steps,
            )
        )
    return found


def _shown(values: Values, steps: Sequence[Values]) -> Values:
    """The values of a block; of what the middle half of its steps lacks, the mean over all steps."""
    return {name: value or statistics.fmean(step[name] for step in steps) for name, value in values.items()}


def _ratios(rounds: Sequence[tuple[Values, Values]]) -> Iterator[tuple[str, tuple[LogRatio, ...]]]:
    """Yields each quantity that took time on both sides, with its ratios."""
    for name in [name for name in rounds[0][0] if name in rounds[0][1]]:
        base, head = [old[name] for old, _ in rounds], [new[name] for _, new in rounds]
        if len(rounds) > 1 and min(*base, *head) > 0:
            yield name, _ratios_of_steps([math.log(value) for value in base], [math.log(value) for value in head])
        elif sum(base) > 0 and sum(head) > 0:
            yield name, (LogRatio(math.log(sum(head) / sum(base)), 0.0),)


def _ratios_of_steps(base: Sequence[float], head: Sequence[float]) -> tuple[LogRatio, ...]:
    """The ratio by fast means, then that by the mid-mean, from logarithms of seconds of at least two rounds."""
    logs = [new - old for old, new in zip(base, head, strict=True)]
    if len(logs) < _MIN_STEPS:
        # The middle half of five rounds agrees by chance: one pair in 14 has less than 0.3 of the usual error, and
        # would weigh too much. Among pairs timed beside much other load, 1.8 % of the cases without a change were false
        # alarms without this rule, and none with it.
        middle_error = statistics.stdev(logs) / math.sqrt(len(logs))
        fast_error = _SPREAD_OF_FAST * middle_error
    else:
        pulls = zip(influences_on_fast_mean(base), influences_on_fast_mean(head), strict=True)
        fast_error = statistics.stdev(new - old for old, new in pulls) / math.sqrt(len(logs))
        middle_error = error_of_midmean(logs)
    return LogRatio(fast_mean(head) - fast_mean(base), fast_error), LogRatio(midmean_of(logs), middle_error)


def _is_disturbed(block: Mapping[str, Any]) -> bool:
    return disturbance(block.get("interference") or {}) is not None
