"""How far a score can be optimised before what people want falls: gold, which nobody optimises, against the proxy, which somebody does.

Two ways of optimising. *Best of n*: of n clips of a prompt take the one with the highest proxy. *RL*: move the generator. How far either goes is d = sqrt(KL), the root of
the Kullback-Leibler divergence from the generator at the start, in sqrt(nats). Gao, Schulman & Hilton 2022 (arXiv 2210.10760) found that gold gains, with R(0) = 0,

    best of n    R(d) = d (alpha - beta d)         highest at d = alpha / (2 beta)
    RL           R(d) = d (alpha - beta log d)     highest at d = exp(alpha / beta - 1)

Letters: P prompts, N clips of a prompt, K points of a curve (numbers of clips, or policies on the way of an RL run). Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from reward.agreement import Array, Interval, cluster_bootstrap

Form = Literal["best_of_n", "rl"]
DRAWS = 2000


# Best of n


def order_weights(number: int, n: ArrayLike) -> Array:
    """How often the clip of each place, worst first, is the best of n clips drawn from `number` without replacement: [K] -> [K,N], rows add up to 1.

    The i-th of N is the best in C(i - 1, n - 1) of the C(N, n) sets. Raises ValueError unless every n is from 1 to `number`.
    """
    sizes = np.asarray(n, dtype=np.float64).reshape(-1, 1)  # [K,1]
    if ((sizes < 1) | (sizes > number) | (sizes != np.floor(sizes))).any():
        raise ValueError(f"the best of {sizes.ravel().tolist()} of {number} clips: give whole numbers from 1 to {number}")
    place = np.arange(number - 1, 0, -1.0)  # [N-1] from the last but one down
    falling = np.cumprod(np.maximum((place - sizes + 1) / place, 0), axis=1)  # [K,N-1] of C(i - 1, n - 1), each over the next
    return sizes / number * np.concatenate([falling[:, ::-1], np.ones_like(sizes)], axis=1)  # [K,N]


def best_of_n(proxy: ArrayLike, gold: ArrayLike, n: ArrayLike) -> tuple[Array, Array]:
    """Expected proxy, and expected gold, of the clip of one prompt that has the highest proxy among n: proxy and gold [N], n [K] -> [K], [K].

    The mean over all sets of n of the N clips, which has no bias and less variance than any one draw (Nakano et al. 2021, arXiv 2112.09332, appendix I). Clips with
    equal proxies are chosen equally often. A clip whose proxy or gold is not finite is left out, so never chosen; n that exceed what is left give nan.
    Raises ValueError where the lengths differ, or for an n below 1.
    """
    a, b, sizes = (np.asarray(values, dtype=np.float64) for values in (proxy, gold, n))
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"one proxy and one gold a clip expected, got {a.shape} and {b.shape}")
    known = np.isfinite(a) & np.isfinite(b)
    order = np.lexsort((b[known], a[known]))
    a, b = a[known][order], b[known][order]  # [N'] worst first; equal proxies by gold, so that the order of clips changes no bit
    found = np.full((2, len(sizes)), np.nan)
    there = sizes <= len(a)
    if there.any():
        first = np.flatnonzero(np.append(True, a[1:] != a[:-1]))  # [G] of each group of equals
        size = np.diff(np.append(first, len(a)))  # [G]
        weight = np.repeat(np.add.reduceat(order_weights(len(a), sizes[there]), first, axis=1) / size, size, axis=1)  # [k,N']
        found[:, there] = weight @ a, weight @ b
    return found[0], found[1]


def kl_of_best_of_n(n: ArrayLike) -> Array:
    """log n - (n - 1) / n, nats, of each n: KL of the best of n from one draw.

    An upper bound (Beirami et al. 2024, arXiv 2401.01879, theorem 3.1). It is the KL where no clip comes up twice and no two have equal proxies, as with continuous noise and
    scores; where the same clip comes up again, or proxies tie, the KL is lower, and never above -log of the share of the best.
    """
    sizes = np.asarray(n, dtype=np.float64)
    return np.log(sizes) - (sizes - 1) / sizes


def clips_for_kl(kl: float) -> float:
    """The inverse: the n, not rounded, whose `kl_of_best_of_n` is `kl` nats; inf for inf. Raises ValueError for a KL below 0."""
    if not kl >= 0:
        raise ValueError(f"a KL is not below 0, got {kl}")
    low, high = 0.0, kl + 1  # of log n: log n - 1 < KL
    if math.isinf(kl) or high > 700:
        return math.inf
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if middle - 1 + math.exp(-middle) < kl else (low, middle)
    return math.exp((low + high) / 2)


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and `most`: about evenly spaced in log n."""
    powers = [2**k for k in range(most.bit_length())]
    return sorted({n for power in powers for n in (power, power * 3 // 2) if n <= most} | {most})


# Gao's forms


class Fit(NamedTuple):
    """Gold's gain R(d) by one of Gao's forms, with 95 % intervals over prompts."""

    form: Form
    alpha: Interval  # gold a sqrt(nat)
    beta: Interval  # gold a nat (best of n) or a sqrt(nat) (RL)
    peak: Interval  # d where gold is highest; inf where the form never falls
    top: Interval  # gold's gain there
    misfit: float  # root mean square of measured minus fitted gain, over the points beyond d = 0

    def __call__(self, d: ArrayLike) -> Array:
        """The gains at these d."""
        found: Array = _basis(self.form, np.asarray(d, dtype=np.float64)) @ np.array([self.alpha.mean, self.beta.mean])
        return found


def fit_gao(form: Form, d: ArrayLike, gain: ArrayLike, cluster: ArrayLike | None = None, *, seed: int = 0, draws: int = DRAWS) -> Fit:
    """Least squares of the mean gain by a form of Gao et al. 2022 (arXiv 2210.10760, section 1): d [K], gold's gain over d = 0 of each prompt [P,K].

    cluster [P] (default: every prompt its own) is what the bootstrap resamples, whole. Both forms are linear in alpha and beta, so a draw is a mean of the prompts' own fits.
    Prompts with a nan are left out. All points weigh the same: choose n evenly in log n. The interval does not know that the form may be wrong; see `misfit` and `second_half`.
    Raises ValueError for fewer than two different d above 0, or no prompt.
    """
    x, y, group = _checked(d, gain, cluster)
    if len(np.unique(x[x > 0])) < 2:
        raise ValueError(f"two parameters need two different d above 0, got {x.tolist()}")
    basis = _basis(form, x)  # [K,2]
    each = y @ np.linalg.pinv(basis).T  # [P,2]
    sums = np.stack([np.bincount(group, weights=part) for part in (*each.T, np.ones(len(y)))], axis=1)  # [C,3] over clusters
    times = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)  # [draws,C]
    total = np.concatenate([sums.sum(0, keepdims=True), times @ sums])  # [1+draws,3]: what was measured, then the draws
    pairs = total[:, :2] / total[:, 2:]  # [1+draws,2]
    told = np.concatenate([pairs, np.array([_peak(form, *pair) for pair in pairs.tolist()])], axis=1)  # [1+draws,4]
    low, high = np.quantile(told[1:], [0.025, 0.975], axis=0, method="nearest")  # [4] each; no mean of two, one of which may be inf
    alpha, beta, peak, top = (Interval(*map(float, ends)) for ends in zip(told[0], low, high, strict=True))
    away = (y.mean(0) - basis @ pairs[0])[x > 0]
    return Fit(form, alpha, beta, peak, top, float(np.sqrt(np.mean(away**2))))


def second_half(d: ArrayLike, gain: ArrayLike, cluster: ArrayLike | None = None, *, seed: int = 0) -> Interval:
    """What gold gained from `half_way` to the largest d, paired over prompts: below 0 it fell, whatever the form. d [K], gain [P,K].

    Where to look is fixed before anything is measured: the highest of several noisy points would always seem to be followed by a fall.
    """
    x, y, group = _checked(d, gain, cluster)
    return _mean(y[:, int(np.argmax(x))] - y[:, half_way(x)], group, seed)


def half_way(d: ArrayLike) -> int:
    """Which point [K] is nearest half the largest d."""
    x = np.asarray(d, dtype=np.float64)
    return int(np.argmin(np.abs(x - x.max() / 2)))


def mean_gains(gain: ArrayLike, cluster: ArrayLike | None = None, *, seed: int = 0) -> list[Interval]:
    """The mean over prompts at each point, with its interval: gain [P,K] -> K intervals. Prompts with a nan are left out."""
    y = np.asarray(gain, dtype=np.float64)
    _, y, group = _checked(np.arange(y.shape[-1]), y, cluster)
    return [_mean(column, group, seed) for column in y.T]


def _checked(d: ArrayLike, gain: ArrayLike, cluster: ArrayLike | None) -> tuple[Array, Array, NDArray[np.intp]]:
    """d [K], the gains of prompts without nan [P,K], and their cluster's number [P]."""
    x, y = np.asarray(d, dtype=np.float64), np.asarray(gain, dtype=np.float64)
    if y.ndim != 2 or y.shape[1:] != x.shape:
        raise ValueError(f"gains of every prompt at every d expected, got {y.shape} for {x.shape} values of d")
    group = np.arange(len(y)) if cluster is None else np.asarray(cluster)
    known = ~np.isnan(y).any(axis=1)
    if not known.any():
        raise ValueError("no prompt has a gain at every d")
    return x, y[known], np.unique(group[known], return_inverse=True)[1].astype(np.intp)


def _mean(value: Array, group: NDArray[np.intp], seed: int) -> Interval:
    return cluster_bootstrap(np.bincount(group, weights=value).astype(np.float64), np.bincount(group).astype(np.float64), seed=seed)


def _basis(form: Form, d: Array) -> Array:
    """[K] -> [K,2]: what alpha and beta are multiplied by."""
    return np.stack([d, -(d**2) if form == "best_of_n" else -xlogy(d, d)], axis=-1)


def _peak(form: Form, alpha: float, beta: float) -> tuple[float, float]:
    """(d, gain) where gold is highest."""
    if beta < 0 or (beta == 0 and alpha > 0):
        return math.inf, math.inf
    if beta == 0 or (form == "best_of_n" and alpha <= 0):
        return 0.0, 0.0
    if form == "best_of_n":
        return alpha / (2 * beta), alpha**2 / (4 * beta)
    if alpha / beta > 700:
        return math.inf, math.inf
    d = math.exp(alpha / beta - 1)
    return d, beta * d


# Many prompts


class Curve(NamedTuple):
    """Best of n over P prompts."""

    n: NDArray[np.intp]  # [K]
    d: Array  # [K] by `kl_of_best_of_n`
    proxy: Array  # [P,K] gains over one draw
    gold: Array  # [P,K]
    proxy_std: float  # among clips of one prompt
    gold_std: float
    kept: NDArray[np.bool_]  # which of the prompts given these P are
    unscored: int  # clips of all prompts without a proxy
    unjudged: int  # clips of all prompts with a proxy and without gold


def curve_of(proxy: Sequence[ArrayLike], gold: Sequence[ArrayLike], most: int | None = None) -> Curve:
    """`best_of_n` of every prompt at `sizes_up_to(most)`; proxy and gold: one array a prompt, of any length.

    most: the largest n, by default what nine of ten prompts have (clips that lack proxy or gold do not count). Prompts with fewer are left out at every n, so that all points of
    the curve are about the same prompts. Raises ValueError where that leaves n = 1 alone, or no prompt.
    """
    a, b = ([np.asarray(values, dtype=np.float64) for values in part] for part in (proxy, gold))
    usable = [np.isfinite(x) & np.isfinite(y) for x, y in zip(a, b, strict=True)]
    clips = np.array([known.sum() for known in usable], dtype=np.intp)  # of each prompt
    largest = most if most is not None else int(np.sort(clips)[len(clips) // 10]) if len(clips) else 0
    kept = clips >= largest
    if largest < 2 or not kept.any():
        raise ValueError(f"best of {largest} where {int((clips > 1).sum())} of {len(clips)} prompts have two clips with proxy and gold")
    n = np.array(sizes_up_to(largest), dtype=np.intp)
    chosen = [(x, y, known) for x, y, known, use in zip(a, b, usable, kept, strict=True) if use]
    expected = np.array([best_of_n(x, y, n) for x, y, _ in chosen])  # [P,2,K]
    gains = expected - expected[..., :1]
    std = np.sqrt(np.mean([(x[known].var(ddof=1), y[known].var(ddof=1)) for x, y, known in chosen], axis=0))  # [2]
    unscored, unjudged = sum(int((~np.isfinite(x)).sum()) for x in a), sum(int((np.isfinite(x) & ~np.isfinite(y)).sum()) for x, y in zip(a, b, strict=True))
    return Curve(n, np.sqrt(kl_of_best_of_n(n)), gains[:, 0], gains[:, 1], float(std[0]), float(std[1]), kept, unscored, unjudged)
