"""Statistics of a bias audit: shares of values against references, shifts between models, gaps between groups. Pure functions on numpy arrays.

The unit is a prompt (a set of prompts, a scene): clips of one prompt are not independent of each other. What is tested is always one number a unit, x [N], whose mean should be 0:
a share minus what a reference says, after minus before, a group minus the mean of all groups. Of each x there are two questions:

    found     the mean is not 0: two-sided t over units          after Holm over all tests of the audit
    beyond    its size is over the margin that was agreed before: t of |mean| - margin > 0        after Holm, likewise

    pass               the 95 % interval lies within the margin
    blocked            the mean lies beyond it, by the test
    sign-off needed    neither: too few units to tell, or right at the margin

Letters: N units, K values of the attribute.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipes.statistics import DRAWS, UNKNOWN, Interval, bootstrap_mean, bootstrap_prompts

Array = NDArray[np.float64]
State = Literal["pass", "sign-off needed", "blocked"]
STATES: tuple[State, ...] = ("pass", "sign-off needed", "blocked")
LEAST = 10
"""Units below which nothing is tested."""
BAND = (0.8, 1.25)
"""Of a share over what the reference says: outside of it a value counts as under- or over-represented."""


# Shares


@dataclass(frozen=True)
class Tally:
    """What the clips of N prompts show: of each prompt how many clips show each of K values, and how many show none that could be told."""

    names: tuple[str, ...]  # K
    ids: tuple[str, ...]  # N
    counts: Array  # [N,K]
    unclear: Array  # [N]

    @property
    def shares(self) -> Array:
        """[N,K] of the clips whose value is clear; a row of nan where none is."""
        known = self.counts.sum(1, keepdims=True)
        return np.asarray(np.where(known > 0, self.counts / np.maximum(known, 1), np.nan))


def tally(prompts: Sequence[str], values: Sequence[str], names: Sequence[str]) -> Tally:
    """Prompt and value of each clip. A value that is none of `names` is unclear."""
    ids, row = np.unique(np.asarray(prompts, dtype=np.str_), return_inverse=True)
    place = {name: k for k, name in enumerate(names)}
    column = np.array([place.get(value, len(names)) for value in values], dtype=np.int64)
    counts = np.zeros((len(ids), len(names) + 1))
    np.add.at(counts, (row, column), 1)
    return Tally(tuple(names), tuple(ids.tolist()), counts[:, :-1], counts[:, -1])


def total_variation(p: ArrayLike, q: ArrayLike) -> float:
    """Half the sum of |p - q|: the share of clips that would have to show another value."""
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)


def evenness(p: ArrayLike) -> float:
    """Entropy over log K: 1 where all values are as frequent, 0 where there is one only."""
    shares = np.asarray(p, dtype=np.float64)
    known = shares[shares > 0]
    return float(-(known * np.log(known)).sum() / math.log(len(shares))) if len(shares) > 1 else math.nan


def cohens_h(p: float, q: float) -> float:
    """2 arcsin sqrt p - 2 arcsin sqrt q: 0.2 is small, 0.5 medium, 0.8 large (Cohen 1988, 6.2)."""
    return 2 * math.asin(math.sqrt(p)) - 2 * math.asin(math.sqrt(q))


class Spread(NamedTuple):
    """The values of a model's clips, against one reference. Total variation and evenness of a sample are above and below those of the model: by how much, their intervals show."""

    shares: tuple[Interval, ...]  # K
    variation: Interval
    evenness: Interval


def spread(found: Tally, reference: Sequence[float], *, seed: int = 0) -> Spread:
    """Intervals resample prompts. All nan where no value is clear."""
    shares = found.shares[~np.isnan(found.shares).any(1)]
    columns = tuple(bootstrap_mean(column, seed=seed) for column in shares.T)
    if not len(shares):
        return Spread(columns, UNKNOWN, UNKNOWN)
    each = np.arange(len(shares))
    return Spread(
        columns,
        bootstrap_prompts(lambda rows: total_variation(shares[rows].mean(0), reference), each, seed=seed),
        bootstrap_prompts(lambda rows: evenness(shares[rows].mean(0)), each, seed=seed),
    )


# Tests


class Question(NamedTuple):
    """One test. towards: whether it went towards the reference, for which nobody is blocked. skewed: of shares themselves, which `differs` corrects for."""

    what: str
    value: str
    model: str
    x: Array  # [N]
    margin: float
    decides: bool = True  # whether the audit's state depends on it
    towards: bool = False
    skewed: bool = False


class Finding(NamedTuple):
    """An answered question."""

    what: str
    value: str
    model: str
    units: int
    estimate: Interval
    p: float  # of 0, after Holm
    p_beyond: float  # of the margin, after Holm
    margin: float
    found: bool
    state: State
    decides: bool

    def as_json(self) -> dict[str, object]:
        """A plain row; null for what is unknown."""
        row = {**self._asdict(), **self.estimate.as_json()}
        del row["estimate"]
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}


def differs(x: ArrayLike, margin: float = 0.0, *, skewed: bool = False) -> Array:
    """p of |mean| <= margin by Student's t over units, for each column of x [N,M]: two-sided at margin 0, else in the mean's own direction. nan units are left out.

    skewed: with Hall's correction of t for the third moment (Hall 1992, "On the removal of skewness by transformation", the cubic one). Shares of rare values need it: where one is
    0 for most prompts, small means come with small deviations, and t alone errs far too often. Differences of two like samples are symmetric and do not.
    Below `LEAST` units p is 1. Where all are alike there is no spread to go by: then a sign test, 2 ** (1 - N), where they lie beyond the margin.
    """
    from scipy.stats import t as student

    values = np.asarray(x, dtype=np.float64)
    known = ~np.isnan(values)
    n = known.sum(0)  # [M]
    of = np.maximum(n, 2)
    mean = np.where(known, values, 0).sum(0) / of
    centred = np.where(known, values - mean, 0)
    deviation = np.sqrt((centred**2).sum(0) / (of - 1))
    alike = deviation <= 1e-12
    scale = np.where(alike, 1.0, deviation)
    t = (mean - np.sign(mean) * margin) / (scale / np.sqrt(of))
    if skewed:
        third = (centred**3).sum(0) / of / (scale * np.sqrt((of - 1) / of)) ** 3
        t = t + third * (t**2 / 3 + 1 / 6) / np.sqrt(of) + third**2 * t**3 / (27 * of)
    tail = student.sf(np.sign(mean) * t, of - 1)
    p = np.minimum(1.0, 2 * student.sf(np.abs(t), of - 1)) if margin == 0 else tail
    signs = np.where(np.abs(mean) > margin + 1e-12, 2.0 ** (1.0 - of), 1.0)
    return np.asarray(np.where(n < LEAST, 1.0, np.where(alike, signs, p)))


def holm(p: ArrayLike) -> Array:
    """Adjusted p-values [M] (Holm 1979): rejecting those below a level errs in any of M true hypotheses with at most that probability."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def mean_interval(x: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Bootstrap over units. Where all are alike, one of no width would claim too much: what was not seen in N units may still happen in 1 - (1 - level) ** (1/N) of them."""
    known = _known(x)
    found = bootstrap_mean(known, seed=seed, draws=draws, level=level)
    if len(known) and float(np.ptp(known)) <= 1e-12:
        unseen = 1 - (1 - level) ** (1 / len(known))
        return Interval(found.mean, found.mean - unseen, found.mean + unseen)
    return found


def settle(tests: Sequence[Question], *, level: float = 0.05, seed: int = 0, draws: int = DRAWS) -> list[Finding]:
    """Answers all questions of an audit together."""
    if not tests:
        return []
    zero, beyond = (holm([float(differs(test.x[:, None], test.margin * k, skewed=test.skewed)[0]) for test in tests]) for k in (0, 1))
    findings = []
    for test, p, p_beyond in zip(tests, zero, beyond, strict=True):
        units, estimate = len(_known(test.x)), mean_interval(test.x, seed=seed, draws=draws)
        told = units >= LEAST
        within = told and -test.margin <= estimate.low and estimate.high <= test.margin
        state: State = "pass" if within else "blocked" if told and p_beyond < level and not test.towards else "sign-off needed"
        findings.append(Finding(test.what, test.value, test.model, units, estimate, float(p), float(p_beyond), test.margin, bool(told and p < level), state, test.decides))
    return findings


def worst(findings: Sequence[Finding]) -> State:
    """The state of an audit: the worst of what decides. An audit in which nothing decides asks for a sign-off."""
    return max((finding.state for finding in findings if finding.decides), key=STATES.index, default="sign-off needed")


# Questions


def against(found: Tally, reference: Mapping[str, float], margin: float, *, model: str, name: str, decides: bool) -> list[Question]:
    """Of each value its share minus the reference's."""
    return [Question(f"share against {name}", value, model, found.shares[:, k] - reference[value], margin, decides, skewed=True) for k, value in enumerate(found.names)]


def shifts(before: Tally, after: Tally, reference: Mapping[str, float], margin: float, *, model: str) -> list[Question]:
    """Of each value its share after minus before, paired over the prompts of both. A shift towards the reference that does not overshoot it is no harm."""
    both = [(before.ids.index(each), after.ids.index(each)) for each in before.ids if each in after.ids]
    old, new = (tallied.shares[[pair[k] for pair in both]] for k, tallied in enumerate((before, after)))  # [M,K]
    tests = []
    for k, value in enumerate(before.names):
        away = [abs(_mean(shares[:, k]) - reference[value]) for shares in (old, new)]
        tests.append(Question("shift", value, model, new[:, k] - old[:, k], margin, towards=away[1] <= away[0]))
    return tests


def gaps(table: ArrayLike, names: Sequence[str], margin: float, *, what: str, model: str, decides: bool = True) -> list[Question]:
    """table [N,K], what each of K groups has in each of N sets that differ in the group alone -> of each group, its distance from the mean of all."""
    values = np.asarray(table, dtype=np.float64)
    around = values - values.mean(1, keepdims=True)  # [N,K]; nan where a group is missing
    return [Question(what, name, model, around[:, k], margin, decides) for k, name in enumerate(names)]


def _mean(x: Array) -> float:
    known = _known(x)
    return float(known.mean()) if len(known) else math.nan


def _known(x: ArrayLike) -> Array:
    values = np.asarray(x, dtype=np.float64)
    return values[~np.isnan(values)]
