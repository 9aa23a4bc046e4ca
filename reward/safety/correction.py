"""The violation rate that a limit is about, out of what a filter says: corrected by what people found, clipped to [0, 1], with an upper bound for the dual update.

    raw * precision / recall                            where clips of the policy as it is now were audited, some of them blocked
    raw + (1 - raw) * leak rate                         where none of the audited clips was blocked, so that nothing is known of precision: all blocked clips count
    (raw + spec - 1) / (sens + spec - 1)                where the filter's errors are known from before (Rogan & Gladen 1978)

Clips that a filter leaves to people are in no audit of what it decided. `by_audit` takes raw as a share of the decided ones, and all that are left to people for violating.

The first needs no more than that precision and recall are still those of the audit; the second takes sensitivity and specificity for properties of the filter, which they are
not where a policy learns what the filter cannot see. Where nothing is known, or what is known tells nothing, the rate is nan and the bound 1: unknown is never safe.

The bound is a quantile of a parametric bootstrap: every count that goes in is drawn again from Beta(x + 1/2, n - x + 1/2), clips nobody looked at as in `measure.py`. A bootstrap
that draws audited clips again would never find a miss where none was seen, and its bound would then hold nothing; `rushes bench review` shows both.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from reward.safety.measure import DRAWS, Array, ErrorRates, Review, drawn_totals, rogan_gladen, totals_of


class Corrected(NamedTuple):
    """A violation rate in [0, 1] and its one-sided upper confidence bound."""

    rate: float
    upper: float


UNKNOWN = Corrected(math.nan, 1.0)


def by_audit(blocked: float, clips: float, review: Review, *, left: float = 0.0, confidence: float = 0.95, seed: int = 0, draws: int = DRAWS) -> Corrected:
    """raw * precision / recall of `blocked` of `clips`, with precision and recall of an audit of this policy's clips.

    left: how many of `clips` are left to people. Then raw is `blocked` of the others, and the rate left / clips + (1 - left / clips) * theirs.
    precision / recall = (TP / N_blocked) / (TP / (TP + M)) = (TP + M) / N_blocked, which is known also where no blocked clip violates. Where the audit has no blocked clip,
    raw + (1 - raw) M / N_passed. Unknown where it has no passed one, or a group that nobody reviewed, and where no clip was decided. Raises ValueError for counts that cannot be.
    """
    decided = clips - left
    _check(blocked, decided)
    _check(left, clips)
    size, let_pass = (sum(group.size for group in groups) for groups in (review.blocked, review.passed))
    pools = [groups for groups in (review.blocked, review.passed) if groups]
    if not decided or not let_pass or any(group.size and not group.reviewed for groups in pools for group in groups):
        return UNKNOWN
    rng = np.random.default_rng(seed)
    raw = blocked / decided
    if size:
        violating = sum(float(totals_of(groups).sum()) for groups in pools)
        found = np.sum([drawn_totals(groups, rng, draws).sum(1) for groups in pools], axis=0)  # [D]
        rate, rates = raw * violating / size, _raw(blocked, decided, rng, draws) * found / size  # [D]
    else:
        leak = drawn_totals(review.passed, rng, draws).sum(1) / let_pass  # [D]
        drawn = _raw(blocked, decided, rng, draws)  # [D]
        rate, rates = raw + (1 - raw) * float(totals_of(review.passed).sum()) / let_pass, drawn + (1 - drawn) * leak  # [D]
    if left:
        share, shares = left / clips, _raw(left, clips, rng, draws)  # [D]
        rate, rates = share + (1 - share) * min(rate, 1.0), shares + (1 - shares) * rates.clip(max=1)  # [D]
    return _bounded(rate, rates, confidence)


def by_error_rates(blocked: float, clips: float, rates: ErrorRates, *, confidence: float = 0.95, seed: int = 0, draws: int = DRAWS) -> Corrected:
    """Rogan-Gladen of `blocked` of `clips`, with the filter's stored sensitivity and specificity. Unknown where these are, or do not exceed 1 together.

    Draws of rates that tell nothing count as all violating. Fewer blocked clips than the stored specificity allows leave a rate of 0; the bound is then, as at any time, at
    least that of as many clips without any violation.
    Raises ValueError for counts that cannot be.
    """
    _check(blocked, clips)
    if not clips or not rates.positives or not rates.negatives or rates.sensitivity + rates.specificity <= 1:
        return UNKNOWN
    rng = np.random.default_rng(seed)
    drawn = np.nan_to_num(rogan_gladen(_raw(blocked, clips, rng, draws), *rates.drawn(rng, draws)), nan=1.0)  # [D]
    found = _bounded(float(rogan_gladen(blocked / clips, rates.sensitivity, rates.specificity)), drawn, confidence)
    return Corrected(found.rate, max(found.upper, none_in(clips, confidence)))


def none_in(clips: float, confidence: float) -> float:
    """Upper bound of a rate of which `clips` showed nothing: 1 - (1 - confidence)^(1 / n), exact; 1 % for 300 at 95 %."""
    return float(1 - (1 - confidence) ** (1 / clips))


def _check(blocked: float, clips: float) -> None:
    if not 0 <= blocked <= clips:
        raise ValueError(f"{blocked:g} blocked of {clips:g} clips")


def _raw(blocked: float, clips: float, rng: np.random.Generator, draws: int) -> Array:
    return rng.beta(blocked + 0.5, clips - blocked + 0.5, draws)


def _bounded(rate: float, drawn: Array, confidence: float) -> Corrected:
    rate = min(max(rate, 0.0), 1.0)
    return Corrected(rate, max(rate, min(float(np.quantile(drawn, confidence)), 1.0)))
