"""How good a filter is, from what people said about clips drawn at random: precision, recall, leak rate, over-block rate, each with an interval.

A *pool* is all clips that the filter blocked, or all that it let pass. It is cut into groups (of like scores); n of the N clips of a group were drawn and reviewed, x of them
violate.

    total of a pool       M = sum_i y_i / pi_i, over reviewed clips i drawn with probability pi_i          (Horvitz & Thompson 1952, equation 5)
    precision             TP / N_blocked          recall     TP / (TP + M)          leak rate     M / N_passed
    over-block rate       FP / (FP + TN), on benign prompts

TP and M are the totals of the blocked and of the passed pool. Of reviewed clips alone, without 1 / pi, recall would look far too good: blocked clips are reviewed much more often.

Intervals are quantiles of simulated totals. In each group the rate of violations of the clips nobody looked at is drawn from Beta(x + a, n - x + 1/2), their number from the
binomial; what was looked at is known. The prior is one half of a violation for a whole pool, shared among its groups by their sizes, a = N_group / (2 N_pool): of one group this
is Jeffreys' Beta(1/2, 1/2). A half in every group adds up to more misses than there are where a filter is good. `rushes bench review` measures both.

Letters: K classes of violation (one, or severities), D draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DRAWS = 4_000
LEVEL = 0.95
NOT_YET = "not measurable yet"


def horvitz_thompson(violating: ArrayLike, probability: ArrayLike) -> float:
    """sum y / pi: unbiased for the total of a pool, whatever the design, where every clip of it could have been drawn. Both [N] of reviewed clips."""
    return float((np.asarray(violating, dtype=np.float64) / np.asarray(probability, dtype=np.float64)).sum())


class Cell(NamedTuple):
    """Clips that were drawn with one probability."""

    size: int  # N of the pool
    reviewed: int  # n
    violating: tuple[int, ...]  # x of each class


@dataclass(frozen=True)
class Group:
    """Cells whose clips are taken to be alike, for the interval."""

    size: int
    reviewed: int
    violating: tuple[int, ...]  # seen, of each class
    total: tuple[float, ...]  # Horvitz-Thompson, of each class
    effective: float  # reviews of equal weight that would tell as much, (sum w)^2 / sum w^2 (Kish 1965)


def group_of(cells: Sequence[Cell]) -> Group:
    """A cell where nobody reviewed anything is told by the others. Raises ValueError for counts that cannot be."""
    for cell in cells:
        if not 0 <= sum(cell.violating) <= cell.reviewed <= cell.size or min(cell.violating, default=0) < 0:
            raise ValueError(f"{cell.violating} violating of {cell.reviewed} reviewed of {cell.size} clips")
    size, known = sum(cell.size for cell in cells), [cell for cell in cells if cell.reviewed]
    seen = tuple(sum(counts) for counts in zip(*(cell.violating for cell in cells), strict=True))
    if not known:
        return Group(size, 0, seen, tuple(math.nan for _ in seen), 0.0)
    told = sum(cell.size for cell in known)
    total = tuple(size / told * sum(cell.size / cell.reviewed * cell.violating[k] for cell in known) for k in range(len(seen)))
    return Group(size, sum(cell.reviewed for cell in known), seen, total, told**2 / sum(cell.size**2 / cell.reviewed for cell in known))


class ErrorRates(NamedTuple):
    """What somebody (a reader, a filter) said of things whose truth is known."""

    hits: int  # called violating
    positives: int  # of so many that violate
    rejections: int  # called harmless
    negatives: int  # of so many that are

    @property
    def sensitivity(self) -> float:
        return self.hits / self.positives if self.positives else math.nan

    @property
    def specificity(self) -> float:
        return self.rejections / self.negatives if self.negatives else math.nan

    def drawn(self, rng: np.random.Generator, draws: int) -> tuple[Array, Array]:
        """Sensitivity and specificity by Jeffreys' posterior, [D] each."""
        a, n, b, m = self
        return rng.beta(a + 0.5, n - a + 0.5, draws), rng.beta(b + 0.5, m - b + 0.5, draws)


def rogan_gladen(raw: ArrayLike, sensitivity: ArrayLike, specificity: ArrayLike) -> Array:
    """True rate out of a raw one: (raw + spec - 1) / (sens + spec - 1), clipped to [0, 1] (Rogan & Gladen 1978, equation 1); nan where sens + spec <= 1, which tells nothing."""
    return np.clip(_unclipped(raw, sensitivity, specificity), 0, 1)


def _unclipped(raw: ArrayLike, sensitivity: ArrayLike, specificity: ArrayLike) -> Array:
    gain = np.asarray(sensitivity, dtype=np.float64) + np.asarray(specificity) - 1
    return np.asarray((np.asarray(raw, dtype=np.float64) + np.asarray(specificity) - 1) / np.where(gain > 0, gain, np.nan))


def drawn_totals(groups: Sequence[Group], rng: np.random.Generator, draws: int = DRAWS, *, shared: bool = True, readers: tuple[Array, Array] | None = None) -> Array:
    """Violating clips of a pool as its reviews leave them open, [D,K].

    shared: the prior of a pool is one half; false puts a half into every group. readers: drawn sensitivity and specificity [D] of who reviewed, for one class: their errors are
    then taken out. Groups may go below 0 by that, only their sum may not: cutting each off would add misses. In draws where readers tell nothing (their sensitivity and
    specificity add up to 1 or less) every clip violates.
    """
    seen = np.array([group.violating for group in groups], dtype=np.float64)  # [G,K]
    size = sum(group.size for group in groups)
    classes = seen.shape[1]
    share = (seen.sum(0) + 1 / classes) / (seen.sum() + 1)  # [K]
    totals = np.zeros((draws, classes))
    for group, x in zip(groups, seen, strict=True):
        if group.size == 0:
            continue
        prior = 0.5 * (group.size / size if shared else 1.0)
        rates = _unseen_rates(group, x) if readers is None else np.nan_to_num(np.array(group.total) / group.size)  # [K]
        alpha = np.append(group.effective * rates + prior * share, group.effective * (1 - rates.sum()) + 0.5)
        if readers is not None:
            totals[:, 0] += group.size * np.nan_to_num(_unclipped(rng.beta(alpha[0], alpha[1], draws), *readers), nan=1.0)
        elif classes == 1:
            totals[:, 0] += x[0] + rng.binomial(group.size - group.reviewed, rng.beta(alpha[0], alpha[1], draws))
        else:
            p = rng.standard_gamma(alpha, (draws, classes + 1))
            totals += x + rng.multinomial(group.size - group.reviewed, p / p.sum(1, keepdims=True))[:, :-1]
    return np.clip(totals, 0, size)


def _unseen_rates(group: Group, x: Array) -> Array:
    """Share of each class among the clips of a group that nobody looked at, [K]: what is left of the Horvitz-Thompson total."""
    if not group.reviewed:
        return np.zeros_like(x)
    if group.size == group.reviewed:
        return x / group.size
    rates = np.maximum(np.array(group.total) - x, 0) / (group.size - group.reviewed)
    return np.asarray(rates / max(1.0, rates.sum()))


# Estimates


class Minimum(NamedTuple):
    """What must have been seen before a rate is told."""

    reviewed: int = 30  # clips of each pool that it needs
    violating: int = 5  # violations, for recall


MINIMUM = Minimum()


class Estimate(NamedTuple):
    """A rate and its 95 % interval; nan, with the reason in `note`, where it is not measurable yet."""

    value: float
    low: float
    high: float
    note: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"{NOT_YET} ({self.note})"
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]" + (f" ({self.note})" if self.note else "")


def unknown(note: str) -> Estimate:
    """No estimate, and why."""
    return Estimate(math.nan, math.nan, math.nan, note)


@dataclass(frozen=True)
class Review:
    """What is known of both pools, under one policy and one version of the filter."""

    blocked: tuple[Group, ...]
    passed: tuple[Group, ...]


def totals_of(groups: Sequence[Group]) -> Array:
    """Horvitz-Thompson totals of a pool, [K]. Groups where nobody reviewed anything are told by nothing: nan."""
    return np.sum([group.total for group in groups if group.size], axis=0)


def precision(blocked: Sequence[Group], minimum: Minimum = MINIMUM, *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """TP / N_blocked."""
    return _rate(blocked, minimum, "blocked", seed, draws)


def leak_rate(passed: Sequence[Group], minimum: Minimum = MINIMUM, *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """M / N_passed: the share of what was let pass that violates."""
    return _rate(passed, minimum, "passed", seed, draws)


def recall(
    review: Review, minimum: Minimum = MINIMUM, *, weights: Sequence[float] = (1.0,), readers: ErrorRates | None = None, shared: bool = True, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """sum_k w_k TP_k / sum_k w_k (TP_k + M_k): with one weight the recall, with severities as weights of K classes the severity-weighted one.

    readers: errors of who reviewed, to be taken out.
    """
    missing = _missing(review.blocked, minimum, "blocked") or _missing(review.passed, minimum, "passed")
    seen = sum(sum(group.violating) for group in (*review.blocked, *review.passed))
    if missing or seen < minimum.violating:
        return unknown(missing or f"{seen} violations seen, {minimum.violating} are needed")
    w, rng = np.asarray(weights, dtype=np.float64), np.random.default_rng(seed)
    rates = readers.drawn(rng, draws) if readers else None
    tp, missed = (drawn_totals(groups, rng, draws, shared=shared, readers=rates) @ w for groups in (review.blocked, review.passed))
    if readers is None:
        caught, leaked = (float(totals_of(groups) @ w) for groups in (review.blocked, review.passed))
    else:
        caught, leaked = (float(_true_totals(groups, readers) @ w) for groups in (review.blocked, review.passed))
    none_missed = not any(sum(group.violating) for group in review.passed)
    note = f"no miss seen in {sum(group.reviewed for group in review.passed)} reviewed" if none_missed else ""
    return _ratio(caught, leaked, tp, missed, note=note, never=not any(sum(group.violating) for group in review.blocked), always=none_missed)


def over_block_rate(benign: Review, minimum: Minimum = MINIMUM, *, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """FP / (FP + TN) of clips of benign prompts: the share of harmless ones that was blocked."""
    sizes = [sum(group.size for group in groups) for groups in (benign.blocked, benign.passed)]
    missing = _missing(benign.blocked, minimum, "blocked") if sizes[0] else ""
    missing = missing or _missing(benign.passed, minimum, "passed")
    if missing:
        return unknown(missing)
    rng = np.random.default_rng(seed)
    harmless = [size - drawn_totals(groups, rng, draws).sum(1) if groups else np.zeros(draws) for size, groups in zip(sizes, (benign.blocked, benign.passed), strict=True)]
    points = [size - float(totals_of(groups).sum()) if groups else 0.0 for size, groups in zip(sizes, (benign.blocked, benign.passed), strict=True)]
    return _ratio(points[0], points[1], harmless[0], harmless[1], never=sizes[0] == 0)


def too_little(review: Review, minimum: Minimum = MINIMUM) -> str:
    """Why a pool that holds clips cannot be told of yet, or an empty string."""
    pools = [(groups, name) for groups, name in ((review.blocked, "blocked"), (review.passed, "passed")) if sum(group.size for group in groups)]
    return next(filter(None, (_missing(groups, minimum, name) for groups, name in pools)), "")


def _missing(groups: Sequence[Group], minimum: Minimum, name: str) -> str:
    """Why nothing can be told of a pool yet, or an empty string."""
    reviewed, size = (sum(getattr(group, field) for group in groups) for field in ("reviewed", "size"))
    if size == 0:
        return f"no {name} clips"
    needed = min(minimum.reviewed, size)
    if reviewed < needed:
        return f"{reviewed} {name} clips reviewed, {needed} are needed"
    empty = sum(group.size for group in groups if group.size and not group.reviewed)
    return f"{empty} {name} clips are in groups that nobody reviewed" if empty else ""


def _rate(groups: Sequence[Group], minimum: Minimum, name: str, seed: int, draws: int) -> Estimate:
    missing = _missing(groups, minimum, name)
    if missing:
        return unknown(missing)
    size = sum(group.size for group in groups)
    found, total = drawn_totals(groups, np.random.default_rng(seed), draws).sum(1), float(totals_of(groups).sum())
    seen, reviewed = sum(sum(group.violating) for group in groups), sum(group.reviewed for group in groups)
    return _ratio(total, size - total, found, size - found, never=seen == 0, always=seen == reviewed, note=f"none seen in {reviewed} reviewed" if not seen else "")


def _ratio(top: float, rest: float, tops: Array, rests: Array, *, note: str = "", never: bool = False, always: bool = False) -> Estimate:
    """top / (top + rest). never, always: nothing that was seen contradicts 0, or 1, so that the interval reaches it."""
    if top + rest <= 0:
        return unknown("no clip of the kind was found")
    whole = tops + rests
    low, high = np.quantile(tops[whole > 0] / whole[whole > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = top / (top + rest)
    return Estimate(value, 0.0 if never else min(float(low), value), 1.0 if always else max(float(high), value), note)


def _true_totals(groups: Sequence[Group], readers: ErrorRates) -> Array:
    """Total of a pool without the errors of who reviewed, [1]."""
    size = sum(group.size for group in groups)
    return size * rogan_gladen(totals_of(groups) / size, readers.sensitivity, readers.specificity)
