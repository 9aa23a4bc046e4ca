"""How far people agree with each other (a scorer with people: `accuracy.py`). Always over pairs of clips, always with intervals over clusters of prompts.

Ties, the same everywhere: a pair that a person called a tie asks nothing of a predictor and is left out; a predictor (a scorer, or another
person) that ties a pair which a person decided earns one half. So a coin and a constant both earn 0.5, and what another person earns is the
ceiling of a scorer: `person_by_person`. `three_way_agreement` counts {better, tie, worse} as three answers instead.

An answer without a name (`importers/reading.py`) is taken for another person's each time. Several may be one person's: agreement among them is then one with oneself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reward.comparisons import RankingEvent
from reward.importers.reading import is_unknown

Array = NDArray[np.float64]
AT_ONCE = 4_000_000  # clusters drawn at once: bounds the memory of a bootstrap over many


class Interval(NamedTuple):
    """A mean and its 95 % interval; nan where nothing was counted."""

    mean: float
    low: float
    high: float


class Pair(NamedTuple):
    """Two clips of one prompt in one dimension and what each person said of them: +1 the first is better, 0 a tie, -1 the second is better."""

    prompt_id: str
    dimension: str
    first: str
    second: str
    votes: dict[str, int]  # annotator_id -> answer; one without a name goes under its event_id


def pairs_of(events: Iterable[RankingEvent]) -> list[Pair]:
    """All pairs of clips that somebody ranked. Who judged a pair twice counts with the first answer, but for those without a name."""
    votes: dict[tuple[str, str, str, str], dict[str, int]] = defaultdict(dict)
    for event in events:
        person = event.event_id if is_unknown(event.annotator_id) else event.annotator_id
        for (a, rank_a), (b, rank_b) in combinations(sorted(zip(event.clip_ids, event.ranks, strict=True)), 2):
            if rank_a is not None and rank_b is not None:
                votes[event.prompt_id, event.dimension, a, b].setdefault(person, (rank_b > rank_a) - (rank_a > rank_b))
    return [Pair(*key, answers) for key, answers in votes.items()]


def tie_share(pairs: Sequence[Pair]) -> float:
    """Share of answers that are ties; nan without answers."""
    answers = [answer for pair in pairs for answer in pair.votes.values()]
    return answers.count(0) / len(answers) if answers else float("nan")


def person_by_person(pairs: Sequence[Pair], clusters: Mapping[str, str], *, seed: int = 0) -> Interval:
    """The ceiling: how often another person, taken as the predictor of a decided answer, gives the same answer (a tie earns one half)."""

    def count(pair: Pair) -> tuple[float, float]:
        up, tie, down = (list(pair.votes.values()).count(answer) for answer in (1, 0, -1))
        return up * (up - 1) + down * (down - 1) + 0.5 * tie * (up + down), float((up + down) * (up + tie + down - 1))

    return _share(pairs, count, clusters, seed)


def three_way_agreement(pairs: Sequence[Pair], clusters: Mapping[str, str], *, seed: int = 0) -> Interval:
    """Share of couples of people who gave the same of the three answers about a pair."""

    def count(pair: Pair) -> tuple[float, float]:
        counts = [list(pair.votes.values()).count(answer) for answer in (1, 0, -1)]
        n = sum(counts)
        return sum(c * (c - 1) / 2 for c in counts), n * (n - 1) / 2

    return _share(pairs, count, clusters, seed)


def krippendorff_alpha(units: Sequence[Sequence[float]], *, ordinal: bool = False) -> float:
    """Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability"): 1 = full agreement, 0 = what chance gives.

    units: for every thing judged, the answers of those who judged it (any number; fewer than two are left out). Answers are names
    (nominal) or places on an ordered scale (`ordinal`). nan where everybody gave one and the same answer, or nothing was judged twice.
    """
    values = sorted({value for unit in units if len(unit) > 1 for value in unit})
    return _alpha(_coincidences(units, values), ordinal)


def alpha_of_pairs(pairs: Sequence[Pair], clusters: Mapping[str, str], *, seed: int = 0, draws: int = 200) -> Interval:
    """Krippendorff's alpha of {worse, tie, better} taken as an ordered scale, with a bootstrap over clusters of prompts.

    Each pair enters in both orders: which clip is called the first is nobody's answer, so the scale is symmetric about the tie.
    """
    grouped: dict[str, list[list[float]]] = defaultdict(list)
    for pair in pairs:
        answers = [float(answer) for answer in pair.votes.values()]
        grouped[clusters[pair.prompt_id]] += [answers, [-answer for answer in answers]]
    tables = np.array([_coincidences(grouped[name], (-1.0, 0.0, 1.0)) for name in sorted(grouped)]).reshape(-1, 3, 3)  # [clusters, 3, 3]
    chosen = np.random.default_rng(seed).integers(max(len(tables), 1), size=(draws, len(tables)))
    samples = [_alpha(tables[rows].sum(0), ordinal=True) for rows in chosen]
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if np.isfinite(samples).any() else (float("nan"), float("nan"))
    return Interval(_alpha(tables.sum(0), ordinal=True), float(low), float(high))


def gwet_ac1(units: Sequence[Sequence[float]]) -> float:
    """Gwet's AC1 (2008, "Computing inter-rater reliability and its variance in the presence of high agreement", equations 5 and 6): (p_a - p_e) / (1 - p_e).

    p_e = sum_q pi_q (1 - pi_q) / (Q - 1), with pi_q the mean share of answer q in a unit. Unlike alpha and kappa it does not fall to nothing where nearly all answers
    are the same. Units with a single answer count in pi_q. nan where nothing was judged twice; 1 where everybody gave one and the same answer.
    """
    return _ac1(_tallies(_counts(units)).sum(0))


def cohen_kappa(answers: Sequence[tuple[float, float]]) -> float:
    """Cohen's kappa (1960) of two readers who judged the same things: (p_o - p_e) / (1 - p_e), chance by each one's own shares.

    nan where both always say one and the same thing, or nothing was judged.
    """
    if not answers:
        return float("nan")
    index = {value: i for i, value in enumerate(sorted({value for pair in answers for value in pair}))}
    table = np.zeros((len(index), len(index)))
    for first, second in answers:
        table[index[first], index[second]] += 1
    table /= table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    return float("nan") if chance >= 1 else float((np.trace(table) - chance) / (1 - chance))


def fleiss_kappa(units: Sequence[Sequence[float]]) -> float:
    """Fleiss' kappa (1971, "Measuring nominal scale agreement among many raters"), also where things were judged by different numbers of people.

    Things judged once are left out. nan where everybody gave one and the same answer, or nothing was judged twice.
    """
    return _fleiss(_tallies(_counts(units)).sum(0))


def agreement_of_pairs(pairs: Sequence[Pair], clusters: Mapping[str, str], *, seed: int = 0, draws: int = 200) -> dict[str, Interval]:
    """Raw agreement ("raw"), Fleiss' kappa ("kappa") and Gwet's AC1 ("ac1") of {worse, tie, better}, with a bootstrap over clusters of prompts; each pair enters in both orders,
    as in `alpha_of_pairs`."""
    names = sorted({clusters[pair.prompt_id] for pair in pairs})
    counts = np.array([[list(pair.votes.values()).count(answer) for answer in (-1, 0, 1)] for pair in pairs], dtype=float).reshape(-1, 3)
    place = {name: i for i, name in enumerate(names)}
    rows = np.array([place[clusters[pair.prompt_id]] for pair in pairs], dtype=np.int64)
    kept = np.flatnonzero(counts.sum(0) + counts[:, ::-1].sum(0))
    sums = np.zeros((len(names), 2 + 2 * len(kept)))
    for order in (counts, counts[:, ::-1]):
        np.add.at(sums, rows, _tallies(order[:, kept]))
    chosen = np.random.default_rng(seed).integers(max(len(sums), 1), size=(draws, len(sums)))
    drawn = [sums[some].sum(0) for some in chosen]
    return {name: _with_interval(statistic, sums.sum(0), drawn) for name, statistic in (("raw", _raw), ("kappa", _fleiss), ("ac1", _ac1))}


def _with_interval(statistic: Callable[[Array], float], whole: Array, drawn: Sequence[Array]) -> Interval:
    samples = [statistic(each) for each in drawn]
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if np.isfinite(samples).any() else (float("nan"), float("nan"))
    return Interval(statistic(whole), float(low), float(high))


def _counts(units: Sequence[Sequence[float]]) -> Array:
    """How often each answer was given about each thing, [N,Q]; things without an answer are left out."""
    values = sorted({value for unit in units for value in unit})
    counts = [[unit.count(value) for value in values] for unit in map(list, units) if unit]
    return np.array(counts, dtype=float).reshape(len(counts), len(values))


def _tallies(counts: Array) -> Array:
    """What the statistics are sums of, [N,2+2Q]: whether a thing was judged twice or more, and the agreement then; the share of each answer; how often each was given there."""
    judged = counts.sum(1)
    several = judged > 1
    agreed = np.where(several, (counts * (counts - 1)).sum(1) / np.maximum(judged * (judged - 1), 1), 0)
    return np.column_stack([several, agreed, counts / np.maximum(judged, 1)[:, None], counts * several[:, None]])


def _raw(sums: Array) -> float:
    return float(sums[1] / sums[0]) if sums[0] else float("nan")


def _ac1(sums: Array) -> float:
    shares = np.split(sums[2:], 2)[0]
    if not sums[0]:
        return float("nan")
    if len(shares) == 1:
        return 1.0
    share = shares / shares.sum()
    chance = float((share * (1 - share)).sum() / (len(share) - 1))
    return (_raw(sums) - chance) / (1 - chance)


def _fleiss(sums: Array) -> float:
    totals = np.split(sums[2:], 2)[1]
    if not sums[0] or (totals > 0).sum() < 2:
        return float("nan")
    chance = float(((totals / totals.sum()) ** 2).sum())
    return (_raw(sums) - chance) / (1 - chance)


def raw_agreement(units: Sequence[Sequence[float]]) -> float:
    """Share of couples of answers about one thing that are the same, the mean over things judged twice or more; nan without any."""
    shares = [sum(unit.count(v) * (unit.count(v) - 1) for v in set(unit)) / (len(unit) * (len(unit) - 1)) for unit in map(list, units) if len(unit) > 1]
    return float(np.mean(shares)) if shares else float("nan")


def bootstrap_units(statistic: Callable[[Sequence[Sequence[float]]], float], units: Sequence[Sequence[float]], *, seed: int = 0, draws: int = 500) -> Interval:
    """A statistic of things judged, with the 95 % percentile interval of drawing them again."""
    if not units:
        return Interval(*[float("nan")] * 3)
    rng = np.random.default_rng(seed)
    samples = [statistic([units[i] for i in rng.integers(len(units), size=len(units))]) for _ in range(draws)]
    low, high = np.nanpercentile(samples, [2.5, 97.5]) if np.isfinite(samples).any() else (float("nan"), float("nan"))
    return Interval(statistic(units), float(low), float(high))


class DawidSkene(NamedTuple):
    """I things, R readers, K answers."""

    truth: Array  # [I,K] probability of each answer being the true one
    confusion: Array  # [R,K,K] probability that a reader gives the second answer where the first is true
    prevalence: Array  # [K]


def dawid_skene(answers: NDArray[np.int64], classes: int, *, prior: float = 0.5, steps: int = 500, tolerance: float = 1e-8) -> DawidSkene:
    """Truth and each reader's errors, from answers alone (Dawid & Skene 1979, section 4, by EM). answers [I,R] in 0..classes-1, -1 where a reader did not answer.

    prior: answers imagined in every cell of a confusion, so that one who never erred may still. Starts at the shares of answers, so that the majority of readers names the
    classes. With two readers errors cannot be told from truth: take three or more. Raises ValueError for another shape or answer.
    """
    if answers.ndim != 2 or answers.size == 0 or answers.min() < -1 or answers.max() >= classes:
        raise ValueError(f"answers are things x readers of 0..{classes - 1} or -1, got an array of shape {answers.shape}")
    given = (answers[:, :, None] == np.arange(classes)).astype(float)  # [I,R,K]
    truth = given.sum(1) + 1e-9
    truth /= truth.sum(1, keepdims=True)
    for _ in range(steps):
        confusion = np.einsum("ik,irl->rkl", truth, given) + prior
        confusion /= confusion.sum(2, keepdims=True)
        prevalence = truth.mean(0)
        log = np.log(np.maximum(prevalence, 1e-300)) + np.einsum("irl,rkl->ik", given, np.log(confusion))
        new = np.exp(log - log.max(1, keepdims=True))
        new /= new.sum(1, keepdims=True)
        change, truth = float(np.abs(new - truth).max()), new
        if change < tolerance:
            break
    return DawidSkene(truth, confusion, prevalence)


def cluster_bootstrap(hits: Array, trials: Array, *, seed: int = 0, draws: int = 2000) -> Interval:
    """sum(hits) / sum(trials) over clusters [N], with the 95 % percentile interval of resampling whole clusters."""
    if trials.sum() == 0:
        return Interval(*[float("nan")] * 3)
    rng, at_once = np.random.default_rng(seed), max(1, AT_ONCE // len(hits))
    sums = [_resampled(hits, trials, rng, min(at_once, draws - start)) for start in range(0, draws, at_once)]
    total, weight = np.concatenate(sums, axis=1)  # [draws] each
    low, high = np.percentile(total[weight > 0] / weight[weight > 0], [2.5, 97.5])
    return Interval(float(hits.sum() / trials.sum()), float(low), float(high))


def _resampled(hits: Array, trials: Array, rng: np.random.Generator, draws: int) -> Array:
    """Sums over resampled clusters, [2,draws]."""
    chosen = rng.integers(len(hits), size=(draws, len(hits)))
    return np.stack([hits[chosen].sum(1), trials[chosen].sum(1)])


def _share(pairs: Sequence[Pair], count: Callable[[Pair], tuple[float, float]], clusters: Mapping[str, str], seed: int) -> Interval:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for pair in pairs:
        hits, trials = count(pair)
        sums[clusters[pair.prompt_id]][0] += hits
        sums[clusters[pair.prompt_id]][1] += trials
    table = np.array([sums[name] for name in sorted(sums)]).reshape(-1, 2)
    return cluster_bootstrap(table[:, 0], table[:, 1], seed=seed)


def _coincidences(units: Sequence[Sequence[float]], values: Sequence[float]) -> Array:
    """How often two answers met in one unit, [V,V]; a unit of n answers weighs n."""
    index = {value: i for i, value in enumerate(values)}
    table = np.zeros((len(values), len(values)))
    for unit in units:
        if len(unit) > 1:
            counts = np.bincount([index[value] for value in unit], minlength=len(values)).astype(float)
            table += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    return table


def _alpha(coincidence: Array, ordinal: bool) -> float:
    totals = coincidence.sum(0)
    if (totals > 0).sum() < 2:
        return float("nan")
    distance = _ordinal_distance(totals) if ordinal else 1 - np.eye(len(totals))
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    return float(1 - (coincidence * distance).sum() / (expected * distance).sum())


def _ordinal_distance(totals: Array) -> Array:
    """Squared number of answers between two places on the scale, [V] -> [V,V]."""
    below = np.cumsum(totals) - totals / 2
    return (below[:, None] - below[None, :]) ** 2
