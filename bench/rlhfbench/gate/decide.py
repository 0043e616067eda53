"""Decision of the gate: from pairs of blocks to a verdict for each case and quantity.

A pair is a block of the base and a block of the head, whose steps were taken in turns where possible. The ratio of a
pair is free of what both share. The interval of a ratio is that of a meta-analysis of the logarithms of the pairs'
ratios, each of which counts by its precision.

A time is compared by two statistics. The fast mean of the steps is the one that other load disturbs least; the mid-mean
also shows a change of some of the steps. A time has changed if by either its p-value, corrected by Holm over the whole
sweep, is below the level of this look *and* its 95 % interval lies wholly beyond the smallest effect that counts. It is
the same if its interval by the fast mean excludes every effect that the gate promises to find, that by the mid-mean
every one of twice that, and neither lies beyond the smallest. Anything between is ambiguous: more pairs are timed. The
levels of all looks add up to 5 %, so that looking again raises no false alarm, and a change that was found at one look
stands whatever a later one says.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["same", "faster", "slower", "smaller", "larger", "ambiguous", "missing", "failed"]

# Of the verdicts by several statistics of one time, the first of these counts.
_PRECEDENCE: tuple[Verdict, ...] = ("slower", "faster", "ambiguous", "same")
SIGNIFICANCE = 0.05
# Looks at the data: after the first MIN_PAIRS timed pairs of every undecided case, then after every second one more.
MIN_PAIRS = 4
PAIRS_PER_LOOK = 2
MAX_LOOKS = 8
# A change of memory, as the ledger counts it, from which on it counts: it repeats to the byte.
MEMORY_EFFECT = 0.001
# Least error of a pair, as a share of the median: five rounds may agree by chance, and would outweigh all other pairs.
_LEAST_ERROR = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """The effects that a user cares about, as shares of a time.

    Attributes:
        smallest: A change counts only if its whole interval lies beyond this.
        promised: ``same`` means that the interval excludes a change of this size.
    """

    smallest: float = 0.02
    promised: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The ratio head / base of one time.

    Attributes:
        ratio: Geometric mean over the pairs, weighted by their precision.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Two-sided, of no change.
        num_pairs: Pairs behind it.
    """

    ratio: float
    low: float
    high: float
    p_value: float
    num_pairs: int


def estimate(logs: Sequence[float], errors: Sequence[float] = ()) -> Estimate:
    """Returns the estimate from the logarithms of the ratios of at least two pairs.

    Other load comes and goes, so some pairs are known ten times as well as others. Each counts by its precision, as in
    a meta-analysis of random effects: weights 1 / (error² + variance between pairs) with DerSimonian and Laird's
    variance, and Hartung and Knapp's interval. Without errors, all count alike, and the interval is Student's t.

    The standard error is no less than the rounds inside the pairs allow: few pairs may lie close together on one side
    of 0 by chance. Of eight that scatter by the same amount around 0, all do so in one of 128 comparisons.

    Args:
        logs: One of each pair.
        errors: Standard error of each, from the steps of its pair; 0 where it is not known, which counts as the median
            of the others. The rule cannot see which side was disturbed: it is the same for both signs of the logarithm.
    """
    from scipy.special import stdtr, stdtrit

    known = [error for error in errors if error]
    num, typical = len(logs), statistics.median(known) if known else 0.0
    weights, least_variance = [1.0] * num, 0.0
    if typical:
        squares = [max(error or typical, _LEAST_ERROR * typical) ** 2 for error in errors]
        between = _variance_between(logs, squares)
        weights = [1 / (square + between) for square in squares]
        least_variance = 1 / math.fsum(weights)
    mean, scatter = _weighted(logs, weights)
    spread = math.sqrt(max(scatter / (num - 1) / math.fsum(weights), least_variance))
    width = float(stdtrit(num - 1, 1 - SIGNIFICANCE / 2)) * spread
    return _estimate(mean, width, 2 * float(stdtr(num - 1, -abs(mean) / spread)) if spread else float(mean == 0), num)


def estimates_of(ratios: Sequence[Sequence[tuple[float, float]]]) -> tuple[Estimate, ...]:
    """Returns the estimate by each statistic.

    Args:
        ratios: Of each pair: the logarithm and its standard error by each statistic. A pair that has the first alone
            counts with it in all.
    """
    num = max(map(len, ratios))
    whole = [[*of_pair, *[of_pair[0]] * (num - len(of_pair))] for of_pair in ratios]
    return tuple(estimate(*zip(*of_pairs, strict=True)) for of_pairs in zip(*whole, strict=True))


def _weighted(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """The weighted mean, and the weighted sum of squared distances from it."""
    mean = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / math.fsum(weights)
    return mean, math.fsum(weight * (value - mean) ** 2 for weight, value in zip(weights, values, strict=True))


def _variance_between(logs: Sequence[float], squares: Sequence[float]) -> float:
    """DerSimonian and Laird's variance between pairs, from the squared error of each."""
    weights = [1 / square for square in squares]
    total = math.fsum(weights)
    excess = _weighted(logs, weights)[1] - (len(logs) - 1)
    return max(0.0, excess / (total - math.fsum(weight**2 for weight in weights) / total))


def estimate_unpaired(base: Sequence[float], head: Sequence[float]) -> Estimate:
    """Returns the estimate from blocks of two runs, which share no rounds: Welch's interval of logarithms.

    Args:
        base: Seconds of at least two blocks.
        head: The same of the other run.
    """
    from scipy.stats import ttest_ind

    logs = [[math.log(value) for value in side] for side in (head, base)]
    mean = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    num = min(map(len, logs))
    if all(statistics.pstdev(side) == 0 for side in logs):
        return _estimate(mean, 0.0, float(mean == 0), num)
    test = ttest_ind(*logs, equal_var=False)
    interval = test.confidence_interval(1 - SIGNIFICANCE)
    return _estimate(mean, float(interval.high - interval.low) / 2, float(test.pvalue), num)


def _estimate(mean: float, width: float, p_value: float, num: int) -> Estimate:
    return Estimate(
        ratio=math.exp(mean), low=math.exp(mean - width), high=math.exp(mean + width), p_value=p_value, num_pairs=num
    )


def spent_level(share: float) -> float:
    """Returns the significance level that may be spent up to ``share`` of all looks, by O'Brien and Fleming's rule.

    Little is spent early, when few pairs make the interval least reliable. At a share of 1 it is ``SIGNIFICANCE``.
    """
    from scipy.special import ndtr, ndtri

    return 2 * float(ndtr(float(ndtri(SIGNIFICANCE / 2)) / math.sqrt(share)))


class Levels:
    """The significance levels of the looks at the data: what the rule allows beyond what earlier looks have spent.

    The levels of all looks add up to at most ``SIGNIFICANCE``, so by Bonferroni's inequality the chance of a false
    alarm at any of them stays below it, whatever the looks share. A look at a share of 1, the last one, spends the
    rest: a comparison that its time budget ends early loses nothing.
    """

    def __init__(self) -> None:
        self._spent = 0.0

    def take(self, share: float) -> float:
        """Returns the level of a look after this share of the comparison."""
        level = max(spent_level(share) - self._spent, 0.0) if share > 0 else 0.0
        self._spent += level
        return level


def share_done(look: int, least_spent_s: float, budget_s: float) -> float:
    """Returns the share of a comparison that is done after a look: of the looks, or of the time if that is more.

    Args:
        look: Number of this look, from 1.
        least_spent_s: Seconds spent on the least advanced case that is not decided.
        budget_s: Seconds that may be spent on a case.
    """
    return min(1.0, max(look / MAX_LOOKS, least_spent_s / budget_s))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by Holm's step-down rule."""
    ranked = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(ranked):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def judge(
    times: Sequence[Sequence[Estimate]], level: float, effects: Effects
) -> list[tuple[Verdict, Sequence[Estimate]]]:
    """Returns the verdict on each time of a sweep: ``same``, ``faster``, ``slower`` or ``ambiguous``.

    A change by any of a time's statistics is a change. All must agree that it is the same: the first excludes the
    promised effect, every other one twice that.

    Args:
        times: The estimates of each time, one by each statistic.
        level: Significance level of this look.
        effects: What counts.

    Returns:
        Each with the estimates of its time, the one that decided first.
    """
    corrected = iter(holm([found.p_value for estimates in times for found in estimates]))
    judged: list[tuple[Verdict, Sequence[Estimate]]] = []
    for estimates in times:
        verdicts = [
            _judge(found, effects.smallest, effects.promised * (2 if place else 1), significant=next(corrected) < level)
            for place, found in enumerate(estimates)
        ]
        decides = min(range(len(verdicts)), key=lambda place: _PRECEDENCE.index(verdicts[place]))
        others = [found for place, found in enumerate(estimates) if place != decides]
        judged.append((verdicts[decides], (estimates[decides], *others)))
    return judged


def _judge(found: Estimate, smallest: float, promised: float, *, significant: bool) -> Verdict:
    above, below = found.low > 1 + smallest, found.high < 1 / (1 + smallest)
    if significant and (above or below):
        return "slower" if above else "faster"
    if not above and not below and found.low > 1 / (1 + promised) and found.high < 1 + promised:
        return "same"
    return "ambiguous"


def judge_memory(base: int, head: int) -> Verdict:
    """Returns the verdict on two sizes in bytes that the ledger counted."""
    if abs(head - base) <= MEMORY_EFFECT * base:
        return "same"
    return "larger" if head > base else "smaller"


def counted_pairs(disturbed: Sequence[tuple[bool, bool]]) -> list[bool]:
    """Returns which pairs count, from whether something disturbed either block of each.

    Disturbed pairs are set aside where at least ``MIN_PAIRS`` others, and half of all, are left. Else all count: on a
    machine that is never quiet both sides suffer alike. The rule does not look at which side was disturbed.
    """
    quiet = [not any(pair) for pair in disturbed]
    enough = max(MIN_PAIRS, len(quiet) / 2)
    return quiet if sum(quiet) >= enough else [True] * len(quiet)
