"""How far a scorer's probabilities can be believed: temperature, tie parameter and careless answers, likelihood, Brier score, calibration error, accuracy by margin.

A difference d of two scores becomes a distribution over {first better, tie, second better} by Davidson's model (`ranking.davidson`) of d / temperature, but for a share of answers
that are given without looking and prefer either clip. Left out, a few of them ask for a temperature that makes all other answers too timid. The three numbers are fitted on
validation answers and then held fixed. Arrays as in `accuracy.py`: answer [N] in {+1, 0, -1}, difference [N], cluster [N]; here every difference is known.

Which of two clips is called the first is nobody's answer. So calibration is looked at from the scorer's *favourite*, the clip with the higher score: is it better as
often as was said, do they tie as often, is the other one better as often? Exchanging the clips of a pair changes no number here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from reward.accuracy import Indices, Signs, without_ties
from reward.agreement import Array, Interval
from reward.ranking import davidson

OUTCOMES = ("favourite better", "tie", "other better")
BINS = 15
DIGITS = 12  # to which probabilities are equal: which clip is called the first changes the last bit
ADDED = np.array([0.5, 0.5, 0.5])  # answers of each kind, see `fit_calibration`
CAREFUL = 1.0  # answers that were surely looked at, see `fit_calibration`
MOST_CARELESS = 0.5
STARTS = ((1.0, 0.02), (2.0, 0.1), (4.0, 0.3))  # a steeper slope and a careless share, from where both are climbed
COIN = np.array([0.5, 0.0, 0.5])  # who does not look ties with nothing (`ranking.careless`)


class Calibration(NamedTuple):
    """Davidson's model of a difference of scores: they are divided by the temperature; log_tie is ln v. A share of answers is a coin's."""

    temperature: float  # inf: the scores say nothing
    log_tie: float
    careless: float = 0.0


class Bin(NamedTuple):
    """Predictions of about the same probability: its mean, the share that came true, how many they are."""

    predicted: float
    observed: float
    number: float


class Margin(NamedTuple):
    """Pairs of about the same |difference|: the bounds, its mean, accuracy without ties, the accuracy that the probabilities promise, how many decided answers."""

    low: float
    high: float
    mean: float
    accuracy: Interval
    promised: float
    answers: int


# Probabilities


def probabilities(difference: Array, calibration: Calibration) -> Array:
    """Of first better, tie, second better: [N] -> [N,3]."""
    scaled, log_tie = torch.from_numpy(difference / calibration.temperature), torch.tensor(calibration.log_tie, dtype=torch.float64)
    return (1 - calibration.careless) * davidson(scaled, log_tie).exp().numpy() + calibration.careless * COIN


def fit_calibration(answer: Signs, difference: Array, *, careless: bool = True) -> Calibration:
    """Temperature, tie parameter and careless share of maximum likelihood, where half an answer of each kind is added at the typical (root mean square) difference, and `CAREFUL`
    answers that were surely looked at.

    With thousands of answers these do not matter; with few, all alike (no tie among them; every pair ordered right), they keep the parameters finite and the careless share at 0. A
    scorer that is wrong more often than right gets an infinite temperature, never a negative one. Without careless answers the likelihood is concave in 1 / temperature and ln v;
    from there and from steeper slopes the share, at most `MOST_CARELESS`, is climbed along with both. careless=False: it is 0. Raises ValueError without answers.
    """
    if len(answer) == 0:
        raise ValueError("no answers to calibrate on")
    largest = float(np.abs(difference).max()) or 1.0
    typical = largest * float(np.sqrt(np.mean((difference / largest) ** 2))) or 1.0
    x = np.append(difference / typical, 1.0)  # in units of the typical difference
    told = np.ascontiguousarray(np.concatenate([_one_hot(answer), ADDED[None]]).T)  # [3,N+1]
    coin = COIN[:, None]  # [3,1]

    def loss(parameters: Array) -> tuple[float, Array]:
        slope, log_tie, share = parameters
        half = slope * x / 2
        logit = np.stack([half, np.full_like(half, log_tie), -half])  # [3,N+1]
        p = np.exp(logit - logit.max(0))
        p /= p.sum(0)  # as `davidson`, whose threads begin too slowly for a few thousand answers at a time
        mixed = np.maximum((1 - share) * p + share * coin, np.finfo(np.float64).tiny)  # [3,N+1]
        looked = told * (1 - share) * p / mixed  # [3,N+1] answers that were looked at
        number, gain = looked.sum(0), looked[0] - looked[2]
        value = -(told * np.log(mixed)).sum() - CAREFUL * np.log1p(-share)
        of_slope = ((number * (p[0] - p[2]) - gain) * x).sum() / 2
        of_tie = (number * p[1] - looked[1]).sum()
        of_share = (told * (p - coin) / mixed).sum() + CAREFUL / (1 - share)
        return float(value) / len(x), np.array([of_slope, of_tie, of_share]) / len(x)

    def climbed(*start: float, most: float = MOST_CARELESS) -> Any:
        return _least(loss, start, [(0, None), (None, None), (0, most)], gtol=1e-9)

    best = climbed(1.0, 0.0, 0.0, most=0.0)
    slope, log_tie, _ = best.x.tolist()
    if careless and slope > 0:
        best = min((best, *(climbed(steeper * slope, log_tie, share) for steeper, share in STARTS)), key=lambda found: float(found.fun))
    slope, log_tie, share = best.x.tolist()
    return Calibration(typical / slope if slope > 0 else float("inf"), log_tie, share)


def _least(loss: Callable[[Array], tuple[float, Array]], start: Sequence[float], bounds: Sequence[tuple[float | None, float | None]], *, gtol: float) -> Any:
    """Where a loss, given with its gradient, is least. On one thread: those of OpenBLAS, in matrices of a few numbers, wait for each other longer than all else takes."""
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        return minimize(loss, np.array(start), jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": gtol})


class Platt(NamedTuple):
    """The probability of a score of one clip, s(slope x score + offset); slope 0: the scores say nothing."""

    slope: float
    offset: float


def fit_platt(score: Array, happened: Array, weight: Array) -> Platt:
    """Of maximum likelihood for scores [N] of clips of which something is true (happened [N] in [0, 1]), each counted `weight` [N] times, towards Platt's targets
    (n+ + 1) / (n+ + 2) and 1 / (n- + 2) instead of 1 and 0 (Platt 1999, "Probabilistic outputs for support vector machines", section 2.2): finite where scores separate the two.

    n is what the weights are worth, (sum w)^2 / sum w^2 (Kish 1965), shared as they are. Scores that are wrong more often than right get a slope of 0, never a negative one. Raises
    ValueError without clips of both kinds.
    """
    positive, negative = float((weight * happened).sum()), float((weight * (1 - happened)).sum())
    if not (positive > 0 and negative > 0):
        raise ValueError("clips of both kinds are needed to calibrate on")
    worth = float(weight.sum() ** 2 / (weight**2).sum()) / (positive + negative)
    high, low = (positive * worth + 1) / (positive * worth + 2), 1 / (negative * worth + 2)
    target, share = low + happened * (high - low), weight / weight.sum()
    middle, spread = float((share * score).sum()), float(np.sqrt((share * (score - (share * score).sum()) ** 2).sum())) or 1.0
    x = (score - middle) / spread

    def loss(parameters: Array) -> tuple[float, Array]:
        logit = parameters[0] * x + parameters[1]
        value = float((share * (np.logaddexp(0, logit) - target * logit)).sum())
        away = share * (np.exp(-np.logaddexp(0, -logit)) - target)
        return value, np.array([(away * x).sum(), away.sum()])

    slope, offset = _least(loss, (1.0, 0.0), [(0, None), (None, None)], gtol=1e-10).x.tolist()
    return Platt(slope / spread, offset - slope * middle / spread)


def from_favourite(probability: Array, answer: Signs) -> tuple[Array, Array]:
    """Probabilities [N,3] and what happened [N,3], in the order of `OUTCOMES`. Where the scorer has no favourite, an answer for either clip is half of each."""
    swap = probability[:, 0] < probability[:, 2]
    none = probability[:, 0] == probability[:, 2]
    outcome = _one_hot(np.where(swap, -answer, answer))
    outcome[none, 0] = outcome[none, 2] = (outcome[none, 0] + outcome[none, 2]) / 2
    return np.where(swap[:, None], probability[:, ::-1], probability), outcome


def decided(probability: Array, outcome: Array) -> tuple[Array, Array]:
    """Both without the ties: P(favourite better | no tie) and its complement, and what happened, [N,3] -> [M,2] over the answers that are no tie."""
    two = probability[outcome[:, 1] == 0][:, [0, 2]]
    return two / two.sum(1, keepdims=True), outcome[outcome[:, 1] == 0][:, [0, 2]]


# Scores of probabilities [N,C] against what happened [N,C]; weight [N]: how often each counts, once where it is not given


def log_loss(probability: Array, outcome: Array, *, weight: Array | None = None) -> float:
    """Mean negative log-likelihood, nats an answer; nan without answers."""
    log_p = np.log(np.maximum(probability, np.finfo(np.float64).tiny))
    return float(np.average(-(outcome * log_p).sum(1), weights=weight)) if len(probability) else float("nan")


def brier(probability: Array, outcome: Array, *, weight: Array | None = None) -> float:
    """Mean squared distance of the distribution from what happened, summed over outcomes: from 0 to 2 (Brier 1950); nan without answers.

    Half an answer for each of two outcomes counts as the mean of the two distances, not as a distance from their middle.
    """
    return float(np.average((probability**2 - 2 * probability * outcome).sum(1), weights=weight)) + 1 if len(probability) else float("nan")


def expected_calibration_error(probability: Array, outcome: Array, *, weight: Array | None = None, bins: int = BINS) -> float:
    """Mean over outcomes of sum over bins of share of predictions x |predicted - observed| ("adaptive": Nixon et al. 2019, arXiv 1904.01685).

    Bins hold equally many predictions, as far as equal predictions allow, which stay together: a constant has one bin, and the order of rows does not matter. nan without answers.
    """
    if not len(probability):
        return float("nan")
    counted = np.ones(len(probability)) if weight is None else weight
    columns = zip(probability.T, outcome.T, strict=True)
    gaps = [np.bincount(_bins(p.round(DIGITS), bins, counted), weights=counted * (y - p), minlength=bins) for p, y in columns]
    return float(np.abs(gaps).sum() / (counted.sum() * probability.shape[1]))


def calibrated_error(probability: Array, *, bins: int = BINS, draws: int = 100, seed: int = 0) -> Interval:
    """What `expected_calibration_error` comes out at for these predictions if they are exactly right: its mean over `draws` simulations, and their 95 % range.

    Never 0: with few answers even the truth looks uncalibrated. Answers are drawn independently, so where pairs of a prompt hang together the truth is a little higher.
    """
    if not len(probability):
        return Interval(*[float("nan")] * 3)
    rng = np.random.default_rng(seed)
    upper = np.cumsum(probability, axis=1)[:, :-1].T  # [C-1,N]
    none = probability[:, 0] == probability[:, -1]
    columns = [(p, _bins(p.round(DIGITS), bins)) for p in probability.T]
    found = []
    for _ in range(draws):
        drawn = (rng.random(len(probability)) >= upper).sum(0)  # [N] which outcome
        total = 0.0
        for c, (p, index) in enumerate(columns):
            happened = (drawn == c).astype(np.float64)
            if none.any() and c in (0, len(columns) - 1):
                happened[none] = ((drawn == 0) | (drawn == len(columns) - 1))[none] / 2
            total += np.abs(np.bincount(index, weights=happened - p, minlength=bins)).sum()
        found.append(total / probability.size)
    return Interval(float(np.mean(found)), *np.percentile(found, [2.5, 97.5]).tolist())


def reliability(probability: Array, outcome: Array, *, bins: int = BINS) -> list[list[Bin]]:
    """For every outcome the bins of its predictions, smallest first; empty bins are left out."""
    table = []
    for p, y in zip(probability.T, outcome.T, strict=True):
        index = _bins(p.round(DIGITS), bins)
        number, predicted, observed = (np.bincount(index, weights=part, minlength=bins) for part in (np.ones_like(p), p, y))
        table.append([Bin(float(predicted[b] / number[b]), float(observed[b] / number[b]), int(number[b])) for b in np.flatnonzero(number)])
    return table


# Margins


def by_margin(answer: Signs, difference: Array, cluster: Indices, calibration: Calibration, *, buckets: int = 8, seed: int = 0) -> list[Margin]:
    """Accuracy without ties of the decided answers, in buckets of |difference| that hold equally many of them, the narrowest first."""
    asked = answer != 0
    answer, difference, cluster = answer[asked], difference[asked], cluster[asked]
    size = np.abs(difference)
    index = _bins(size, buckets)
    better, _, worse = probabilities(size, calibration).T
    promised = better / (better + worse)
    rows = []
    for bucket in np.unique(index).tolist():
        here = index == bucket
        low, high, mean = (float(part(size[here])) for part in (np.min, np.max, np.mean))
        accuracy = without_ties(answer[here], difference[here], cluster[here], seed=seed)
        rows.append(Margin(low, high, mean, accuracy, float(promised[here].mean()), int(here.sum())))
    return rows


def falls(margins: list[Margin]) -> bool:
    """Whether some bucket is surely less accurate than a narrower one (their intervals lie apart): then a wide margin does not mean what it should."""
    return any(wide.accuracy.high < narrow.accuracy.low for i, narrow in enumerate(margins) for wide in margins[i + 1 :])


def _one_hot(answer: Signs) -> Array:
    """[N] in {+1, 0, -1} -> [N,3]."""
    return (answer[:, None] == np.array([1, 0, -1])).astype(np.float64)


def _bins(value: Array, number: int, weight: Array | None = None) -> Indices:
    """Which of `number` bins of equal mass each value [N] is in; equal values are in one, that of their middle."""
    _, index = np.unique(value, return_inverse=True)
    mass = np.bincount(index, weights=weight)
    middle = np.cumsum(mass) - mass / 2
    return np.minimum((middle * number / (mass.sum() or 1)).astype(np.intp), number - 1)[index]
