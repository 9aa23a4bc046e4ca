"""Intervals of the report: pure functions on numpy arrays, seeded, without loops over draws.

Every value stands for one prompt (the mean over its clips), because clips of one prompt are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DRAWS = 10_000
CHUNK = 2_000


class Interval(NamedTuple):
    """A mean and its two-sided interval; all three nan where nothing was measured."""

    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """The three numbers of report.json; null where nothing was measured, since JSON knows no nan."""
        return {name: None if math.isnan(value) else float(value) for name, value in zip(self._fields, self, strict=True)}


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean of values [N], resampling prompts (Efron & Tibshirani 1993, 13.3); nan prompts are left out."""
    known = _known(values)
    if known.size == 0:
        return UNKNOWN
    return _percentiles(float(known.mean()), _resampled_means(known[:, None], seed, draws)[:, 0], level)


def bootstrap_difference(after: ArrayLike, before: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Paired bootstrap of mean(after - before), both [N] over the same prompts in the same order; a pair with a nan is left out."""
    return bootstrap_mean(_vector(after) - _vector(before), seed=seed, draws=draws, level=level)


def bootstrap_ratio(after: ArrayLike, before: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Paired bootstrap of mean(after) / mean(before), both [N] over the same prompts; unknown where the lower mean can be zero."""
    pairs = np.stack([_vector(after), _vector(before)], axis=1)  # [N, 2]
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    if pairs.size == 0 or pairs[:, 1].mean() == 0:
        return UNKNOWN
    means = _resampled_means(pairs, seed, draws)  # [draws, 2]
    if (means[:, 1] == 0).any():
        return UNKNOWN
    top, bottom = pairs.mean(axis=0)
    return _percentiles(float(top / bottom), means[:, 0] / means[:, 1], level)


def bootstrap_crossed(values: ArrayLike, *, seed: int = 0, draws: int = DRAWS, level: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean of values [S,N], S trainings over the same N prompts; both are resampled, each by itself. A nan is left out.

    Three trainings tell little about how trainings vary, so with few of them the interval is rather too narrow. Raises ValueError for another shape.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"trainings x prompts expected, got an array of shape {table.shape}")
    known = ~np.isnan(table)
    if not known.any():
        return UNKNOWN
    rng = np.random.default_rng(seed)
    trainings, prompts = (rng.multinomial(n, np.full(n, 1 / n), size=draws) for n in table.shape)  # [draws,S], [draws,N]
    total, number = (((trainings @ part) * prompts).sum(1) for part in (np.where(known, table, 0), known.astype(np.float64)))  # [draws] each
    return _percentiles(float(table[known].mean()), total[number > 0] / number[number > 0], level)


def bootstrap_prompts(statistic: Callable[[NDArray[np.int64]], float], prompts: ArrayLike, *, seed: int = 0, draws: int = 500, level: float = 0.95) -> Interval:
    """Percentile bootstrap of a statistic of clips, given as their rows, that is no mean; whole prompts are resampled. prompts [N]: which prompt a clip is of.

    Unknown where the statistic of all clips is nan; draws in which it is nan are left out.
    """
    _, number, counts = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(counts)[:-1])
    value = statistic(np.arange(len(number)))
    if math.isnan(value):
        return UNKNOWN
    rng = np.random.default_rng(seed)
    drawn = _known([statistic(np.concatenate([rows[k] for k in rng.integers(len(rows), size=len(rows))])) for _ in range(draws)])
    return _percentiles(value, drawn, level)


def clopper_pearson(hits: int, trials: int, *, level: float = 0.95) -> Interval:
    """Exact two-sided binomial interval (Clopper & Pearson 1934): quantiles of Beta(k, n-k+1) and Beta(k+1, n-k).

    Example: 0 of 1,000 has the upper bound 1 - 0.025 ** (1 / 1000) = 0.37 %. Raises ValueError unless 0 <= hits <= trials.
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits of {trials} trials")
    if trials == 0:
        return UNKNOWN
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return Interval(hits / trials, low, high)


def pool_prompts(seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value a prompt over several seeds (its mean over the seeds that know it), so that a bootstrap still resamples prompts.

    Example: `[{"a": 0.0, "b": 1.0}, {"a": 1.0}]` -> `{"a": 0.5, "b": 1.0}`.
    """
    gathered: dict[str, list[float]] = {}
    for values in seeds:
        for prompt_id, value in values.items():
            gathered.setdefault(prompt_id, []).append(value)
    return {prompt_id: float(known.mean()) if (known := _known(values)).size else math.nan for prompt_id, values in gathered.items()}


def _vector(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"one value per prompt expected, got an array of shape {array.shape}")
    return array


def _known(values: ArrayLike) -> Array:
    array = _vector(values)
    return array[~np.isnan(array)]


def _resampled_means(values: Array, seed: int, draws: int) -> Array:
    """[N, D] -> [draws, D]: drawing N prompts with replacement is drawing how often each occurs, so the means are one product."""
    n = len(values)
    rng = np.random.default_rng(seed)
    parts = [rng.multinomial(n, np.full(n, 1 / n), size=min(CHUNK, draws - start)) @ values for start in range(0, draws, CHUNK)]
    return np.concatenate(parts) / n


def _percentiles(mean: float, draws: Array, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))
