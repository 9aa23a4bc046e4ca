"""How often a scorer is right about pairs that people judged, and whether it orders whole rankings as they did.

Functions of arrays, one entry an answer of one person about one pair of clips in one dimension [N]:

    answer       +1 the first clip is better, 0 a tie, -1 the second is better
    difference   score of the first clip minus score of the second; nan where one of them has no score
    cluster      number of the component of prompts, 0..; intervals resample whole clusters

An answer without a difference is left out of every number here, never taken for a tie; say beside the number how many there were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from reward.agreement import Array, Interval, Pair, cluster_bootstrap
from reward.comparisons import RankingEvent

Signs = NDArray[np.int8]
Indices = NDArray[np.intp]
Key = TypeVar("Key", str, tuple[str, str])


class Answers(NamedTuple):
    """Answers about some pairs, as arrays [N]."""

    pair: Indices  # row in the sequence of pairs
    answer: Signs
    cluster: Indices


class Threshold(NamedTuple):
    """Differences of at most `epsilon` are called ties; `accuracy` is what that gives on the answers it was chosen by."""

    epsilon: float
    accuracy: float


def answers_of(pairs: Sequence[Pair], clusters: Mapping[str, str]) -> Answers:
    """One entry for every answer about every pair; clusters: prompt_id -> component."""
    number = {name: i for i, name in enumerate(sorted({clusters[pair.prompt_id] for pair in pairs}))}
    rows = [(i, answer, number[clusters[pair.prompt_id]]) for i, pair in enumerate(pairs) for answer in pair.votes.values()]
    table = np.array(rows, dtype=np.intp).reshape(-1, 3)
    return Answers(table[:, 0], table[:, 1].astype(np.int8), table[:, 2])


def differences(pairs: Sequence[Pair], score: Mapping[str, float]) -> Array:
    """Score of the first clip minus score of the second, [P]; nan where `score` (clip_id -> score) lacks one or holds one that is not finite."""
    return np.array([_known(score, pair.first) - _known(score, pair.second) for pair in pairs], dtype=np.float64)


def without_ties(answer: Signs, difference: Array, cluster: Indices, *, seed: int = 0) -> Interval:
    """Share of decided answers that the scorer shares. A person's tie asks nothing and is left out; a scorer's earns one half (VideoAlign counts it as wrong)."""
    asked = (answer != 0) & ~np.isnan(difference)
    hits = (np.sign(difference[asked]) * answer[asked] + 1) / 2
    return _clustered(hits, asked, cluster, seed)


def scorer_accuracy(pairs: Sequence[Pair], score: Mapping[tuple[str, str], float], clusters: Mapping[str, str], *, seed: int = 0) -> Interval:
    """`without_ties` of all answers about pairs, in any dimensions. score: (dimension, clip_id) -> score; clusters: prompt_id -> component."""
    told = answers_of(pairs, clusters)
    apart = np.array([_known(score, (pair.dimension, pair.first)) - _known(score, (pair.dimension, pair.second)) for pair in pairs], dtype=np.float64)
    return without_ties(told.answer, apart[told.pair], told.cluster, seed=seed)


def with_ties(answer: Signs, difference: Array, cluster: Indices, epsilon: float, *, seed: int = 0) -> Interval:
    """Share of all answers, ties included, that the scorer shares when it calls differences of at most epsilon a tie. epsilon nan: unknown."""
    asked = ~np.isnan(difference) & (epsilon == epsilon)
    said = np.where(np.abs(difference) <= epsilon, 0, np.sign(difference))
    return _clustered((said == answer)[asked].astype(np.float64), asked, cluster, seed)


def best_threshold(answer: Signs, difference: Array) -> Threshold:
    """The epsilon among the |difference| with the highest accuracy with ties, the smallest of equals: "tie calibration" (Deutsch et al. 2023, arXiv 2305.14324).

    Chosen on validation and applied to the test it is honest. Chosen on the test itself, an *oracle*, it is what VideoAlign's `calc_accuracy_with_ties` and the leaderboard of
    VideoGen-RewardBench report; a useless scorer then reaches at least the share of ties. As there, epsilon = 0 is no candidate unless a difference is 0. Unlike there,
    equal |difference| become ties together: the published loop also rates states half way through them, which no epsilon gives and which depend on the order of rows.

    O(N log N). Both nan where nothing has a difference.
    """
    known = ~np.isnan(difference)
    if not known.any():
        return Threshold(math.nan, math.nan)
    size, order = np.abs(difference[known]), np.argsort(np.abs(difference[known]), kind="stable")
    tied, right = answer[known] == 0, np.sign(difference[known]) * answer[known] > 0
    hits = right.sum() + np.cumsum(tied[order].astype(np.intp) - right[order])  # [N] when the n smallest are ties
    size = size[order]
    last = np.append(size[1:] != size[:-1], True)  # of the equal ones
    best = int(np.argmax(hits[last]))
    return Threshold(float(size[last][best]), float(hits[last][best] / len(size)))


def tau_per_ranking(events: Iterable[RankingEvent], score: Mapping[str, float], clusters: Mapping[str, str], *, seed: int = 0) -> tuple[Interval, int]:
    """Mean over rankings of Kendall's tau-b (1945) between a person's order and the scores', and the number of rankings it is known for.

    A ranking is left out where all of its clips tie, for the person or the scorer, or fewer than two have a score.
    """
    chosen = list(events)
    rows = [
        (n, (rank_b > rank_a) - (rank_a > rank_b), _known(score, a) - _known(score, b))
        for n, event in enumerate(chosen)
        for (a, rank_a), (b, rank_b) in combinations(zip(event.clip_ids, event.ranks, strict=True), 2)
        if rank_a is not None and rank_b is not None
    ]
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    tau = tau_b(table[:, 1].astype(np.int8), table[:, 2], table[:, 0].astype(np.intp), len(chosen))
    number = {name: i for i, name in enumerate(sorted({clusters[event.prompt_id] for event in chosen}))}
    cluster = np.array([number[clusters[event.prompt_id]] for event in chosen], dtype=np.intp)
    known = ~np.isnan(tau)
    return _clustered(tau[known], known, cluster, seed), int(known.sum())


def tau_b(answer: Signs, difference: Array, ranking: Indices, number: int) -> Array:
    """Kendall's tau-b of each of `number` rankings, from all their pairs, [N] -> [number]; ranking: which one a pair belongs to.

    (concordant - discordant) / sqrt(pairs not tied by the person x pairs not tied by the scorer); nan where that is 0 / 0.
    """
    known = ~np.isnan(difference)
    person, scorer, which = answer[known].astype(np.float64), np.sign(difference[known]), ranking[known]
    agreed, decided, told = (np.bincount(which, weights=part, minlength=number) for part in (person * scorer, person**2, scorer**2))
    product = decided * told
    return np.where(product > 0, agreed / np.sqrt(np.where(product > 0, product, 1)), np.nan)


def _known(score: Mapping[Key, float], key: Key) -> float:
    value = score.get(key, math.nan)
    return value if math.isfinite(value) else math.nan


def _clustered(value: Array, asked: NDArray[np.bool_], cluster: Indices, seed: int) -> Interval:
    """The mean of value, one for each entry that is asked, and its interval when all clusters [N] are resampled."""
    number = int(cluster.max()) + 1 if len(cluster) else 0
    hits, trials = (np.bincount(cluster[asked], weights=part, minlength=number).astype(np.float64) for part in (value, np.ones(len(value))))
    return cluster_bootstrap(hits, trials, seed=seed)
