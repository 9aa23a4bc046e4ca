"""Accuracy of a scorer against brute force, hand counts, a published definition and scipy."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import kendalltau

from reward.accuracy import Indices, Signs, answers_of, best_threshold, differences, scorer_accuracy, tau_b, tau_per_ranking, with_ties, without_ties
from reward.agreement import Array, cluster_bootstrap, pairs_of
from reward.calibration import brier, decided, expected_calibration_error, fit_calibration, from_favourite, log_loss, probabilities
from reward.comparisons import RankingEvent


def simulated(n: int, seed: int, *, ties: float = 0.4, digits: int | None = None) -> tuple[Signs, Array]:
    """Answers of people and differences of a scorer that knows something; `digits` rounds them, so that some are equal in size."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(size=n)
    answer = np.where(rng.random(n) < ties * np.exp(-(difference**2)), 0, np.sign(difference + rng.normal(size=n))).astype(np.int8)
    return answer, difference if digits is None else np.round(difference, digits)


def one_cluster(answer: Signs) -> Indices:
    return np.zeros(len(answer), dtype=np.intp)


def share_shared(people: Sequence[int], scores: Sequence[float], epsilon: float) -> float:
    """Agreement cells (both better, both worse, both a tie) as a share of all pairs."""
    cells = [(0 if abs(d) <= epsilon else (1 if d > 0 else -1)) == person for person, d in zip(people, scores, strict=True)]
    return sum(cells) / len(cells)


def published(people: Sequence[int], scores: Sequence[float]) -> float:
    """VideoAlign's accuracy with ties, from its definition: the best over thresholds taken at every |difference|."""
    return max(share_shared(people, scores, abs(d)) for d in scores)


# With ties


@pytest.mark.parametrize("dimensions", [1, 3, 7])
@pytest.mark.parametrize("digits", [None, 1])
def test_accuracy_with_ties_is_the_published_one_in_any_number_of_dimensions(dimensions: int, digits: int | None) -> None:
    for dimension in range(dimensions):
        answer, difference = simulated(180, 17 * dimension + dimensions, ties=0.1 + 0.12 * dimension, digits=digits)
        found = best_threshold(answer, difference)
        assert found.accuracy == published(answer.tolist(), difference.tolist())
        assert found.accuracy == with_ties(answer, difference, one_cluster(answer), found.epsilon).mean == share_shared(answer.tolist(), difference.tolist(), found.epsilon)
        assert 0.3 < found.accuracy < 1


def test_accuracy_with_ties_is_what_the_published_loop_gives_where_no_two_differences_are_equal() -> None:
    """The loop written out: pairs in order of |difference| become ties one by one, and the best share on the way is kept."""
    for seed in range(30):
        answer, difference = simulated(60, seed)
        assert len(set(np.abs(difference).tolist())) == 60
        right = {i for i in range(60) if answer[i] * difference[i] > 0}
        best = -1.0
        for i in np.argsort(np.abs(difference)).tolist():
            right = right | {i} if answer[i] == 0 else right - {i}
            best = max(best, len(right) / 60)
        assert best_threshold(answer, difference).accuracy == best


def test_pairs_of_equal_size_become_ties_together() -> None:
    """A person's tie and a decided pair, both at |d| = 1: no threshold gets both right, though a loop that stops between them would say so."""
    found = best_threshold(np.array([0, 1], dtype=np.int8), np.array([1.0, 1.0]))
    assert found == (1.0, 0.5) == best_threshold(np.array([1, 0], dtype=np.int8), np.array([-1.0, 1.0]))


def test_a_useless_scorer_reaches_the_share_of_ties_by_the_oracle_threshold() -> None:
    rng = np.random.default_rng(0)
    answer, _ = simulated(2000, 1)
    for difference in (np.zeros(2000), rng.normal(size=2000), -simulated(2000, 1)[1]):
        assert best_threshold(answer, difference).accuracy >= (answer == 0).mean()
    assert best_threshold(answer, np.zeros(2000)) == (0.0, (answer == 0).mean())


def test_a_threshold_from_other_answers_gives_at_most_what_the_oracle_gives() -> None:
    for seed in range(10):
        (answer, difference), (other, others) = simulated(300, seed), simulated(100, 99 - seed)
        epsilon = best_threshold(other, others).epsilon
        assert with_ties(answer, difference, one_cluster(answer), epsilon).mean <= best_threshold(answer, difference).accuracy


def test_an_unknown_threshold_and_no_answers_are_unknown() -> None:
    answer, difference = simulated(5, 0)
    assert all(math.isnan(value) for value in (*with_ties(answer, difference, one_cluster(answer), math.nan), *best_threshold(answer[:0], difference[:0])))
    assert all(math.isnan(value) for value in (*best_threshold(answer, np.full(5, np.nan)), *without_ties(answer, np.full(5, np.nan), one_cluster(answer))))
    assert best_threshold(answer[:1], difference[:1]).accuracy in (0.0, 1.0)


# Without ties


def test_accuracy_without_ties_by_hand() -> None:
    answer = np.array([1, 1, -1, 0, 1, -1], dtype=np.int8)
    difference = np.array([0.1, -2, -3, 5, 0, np.nan])  # right, wrong, right, asks nothing, half, unknown
    assert without_ties(answer, difference, one_cluster(answer)).mean == (1 + 0 + 1 + 0.5) / 4


def test_it_agrees_with_the_count_over_pairs_and_people() -> None:
    rng = np.random.default_rng(3)
    events = [
        RankingEvent(f"{p}{a}", "t", f"p{p}", f"a{a}", tuple(f"c{p}{k}" for k in range(4)), tuple(int(r) for r in rng.integers(1, 5, size=4))) for p in range(30) for a in range(3)
    ]
    events[:6] = [replace(event, ranks=(1, 1, 1, 1)) for event in events[:6]]  # a component in which nobody decided
    clusters = {f"p{p}": f"x{p // 2}" for p in range(30)}
    score = {f"c{p}{k}": float(rng.normal()) for p in range(30) for k in range(4)}
    pairs = pairs_of(events)
    told = answers_of(pairs, clusters)
    found = without_ties(told.answer, differences(pairs, score)[told.pair], told.cluster)
    assert len(told.answer) == 30 * 3 * 6 and len(set(told.cluster.tolist())) == 15
    hits, trials = np.zeros(15), np.zeros(15)
    for event in events:
        number = sorted(set(clusters.values())).index(clusters[event.prompt_id])
        for (a, first), (b, second) in combinations(zip(event.clip_ids, event.ranks, strict=True), 2):
            if first is not None and second is not None and first != second:
                hits[number] += (score[a] > score[b]) == (first < second)
                trials[number] += 1
    assert found == cluster_bootstrap(hits, trials)
    other = {("overall", clip): value for clip, value in score.items()} | {("motion", clip): 0.0 for clip in score}
    assert found == scorer_accuracy(pairs, other, clusters)
    both = [*pairs, *(pair._replace(dimension="motion") for pair in pairs)]
    assert scorer_accuracy(both, other, clusters).mean == pytest.approx((found.mean + 0.5) / 2), "each dimension by its own scores"


def test_a_missing_score_is_left_out_never_taken_for_a_tie() -> None:
    pairs = pairs_of([RankingEvent("e", "t", "p", "a", ("x", "y", "z"), (1, 2, 2))])
    for missing in ({"x": 1.0, "y": 0.0}, {"x": 1.0, "y": 0.0, "z": math.nan}, {"x": 1.0, "y": 0.0, "z": math.inf}):
        told, difference = answers_of(pairs, {"p": "p"}), differences(pairs, missing)
        assert np.isnan(difference).tolist() == [False, True, True]
        assert without_ties(told.answer, difference[told.pair], told.cluster).mean == 1
        assert best_threshold(told.answer, difference[told.pair]) == (1.0, 0.0)


def test_no_pairs_at_all_are_no_error() -> None:
    told = answers_of([], {})
    assert len(told.answer) == 0 and math.isnan(without_ties(told.answer, differences([], {})[told.pair], told.cluster).mean)


def test_intervals_resample_clusters_not_answers() -> None:
    rng = np.random.default_rng(4)
    cluster = np.repeat(np.arange(60), 20)
    answer = np.where(rng.random(1200) < np.repeat(rng.beta(2, 1, size=60), 20), 1, -1).astype(np.int8)
    together, alone = without_ties(answer, np.ones(1200), cluster), without_ties(answer, np.ones(1200), np.arange(1200))
    assert together.mean == alone.mean and together.high - together.low > 1.5 * (alone.high - alone.low)


# Rankings


def test_tau_of_each_ranking_is_scipys() -> None:
    rng = np.random.default_rng(5)
    known = 0
    for k in range(2, 9):
        for _ in range(20):
            ranks, scores = rng.integers(1, k + 1, size=k), np.round(rng.normal(size=k), 1)
            i, j = np.triu_indices(k, 1)
            found = tau_b(np.sign(ranks[j] - ranks[i]).astype(np.int8), scores[i] - scores[j], np.zeros(len(i), dtype=np.intp), 1)[0]
            expected = kendalltau(-ranks, scores).statistic
            assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
            known += math.isfinite(expected)
    assert known > 100


def test_tau_is_a_mean_over_rankings_that_have_one() -> None:
    events = [
        RankingEvent("a", "t", "p", "ann", ("x", "y", "z"), (1, 2, 3)),  # scored the other way round: -1
        RankingEvent("b", "t", "p", "bob", ("x", "y", "z"), (1, 1, 1)),  # no order
        RankingEvent("c", "t", "p", "cat", ("x", "y", "z", "u"), (3, 2, 1, 4)),  # u has no score: +1 on the rest
        RankingEvent("d", "t", "q", "ann", ("v", "u"), (1, 2)),  # one score
        RankingEvent("e", "t", "q", "bob", ("v", "w"), (1, 2)),  # +1
        RankingEvent("f", "t", "q", "cat", ("v", "w", "x"), (1, 2, None)),  # +1
    ]
    score = {"x": 0.0, "y": 1.0, "z": 2.0, "u": math.nan, "v": 1.0, "w": 0.0}
    interval, number = tau_per_ranking(events, score, {"p": "p", "q": "q"})
    assert (interval.mean, number) == ((-1 + 1 + 1 + 1) / 4, 4)
    assert math.isnan(tau_per_ranking([], score, {})[0].mean)


# All of them


def test_exchanging_the_clips_of_pairs_changes_nothing() -> None:
    answer, difference = simulated(500, 6, digits=1)
    cluster = np.arange(500) // 5
    swap = np.where(np.random.default_rng(7).random(500) < 0.5, -1, 1)
    swapped, turned = (answer * swap).astype(np.int8), difference * swap
    assert (difference == 0).any() and (swap < 0).any()
    assert best_threshold(answer, difference) == best_threshold(swapped, turned)
    assert without_ties(answer, difference, cluster) == without_ties(swapped, turned, cluster)
    assert with_ties(answer, difference, cluster, 0.3) == with_ties(swapped, turned, cluster, 0.3)
    fits = fit_calibration(answer, difference), fit_calibration(swapped, turned)
    assert fits[0] == pytest.approx(fits[1], rel=1e-6)
    sides = [from_favourite(probabilities(d, fits[0]), a) for a, d in ((answer, difference), (swapped, turned))]
    for measure in (log_loss, brier, expected_calibration_error):
        assert measure(*sides[0]) == pytest.approx(measure(*sides[1]), abs=1e-12)
        assert measure(*decided(*sides[0])) == pytest.approx(measure(*decided(*sides[1])), abs=1e-12)


@pytest.mark.timed
def test_26500_pairs_in_four_dimensions_are_evaluated_in_half_a_second() -> None:
    """Without and with ties by both thresholds, calibration, likelihood, Brier score and calibration error; intervals over 420 components of prompts."""
    data = [(*simulated(26_500, seed), *simulated(6_000, 50 + seed)) for seed in range(4)]
    cluster = np.arange(26_500) % 420
    seconds = []
    for _ in range(6):  # the smallest of six: a neighbour on the other thread of a core makes one run twice as slow
        begun = time.process_time()
        for answer, difference, other, others in data:
            found = best_threshold(answer, difference)
            honest = with_ties(answer, difference, cluster, best_threshold(other, others).epsilon)
            strict = without_ties(answer, difference, cluster)
            sides = from_favourite(probabilities(difference, fit_calibration(other, others)), answer)
            errors = [measure(*part) for measure in (log_loss, brier, expected_calibration_error) for part in (sides, decided(*sides))]
            assert honest.mean <= found.accuracy and all(map(math.isfinite, (*strict, *errors)))
        seconds.append(time.process_time() - begun)
    print(f"26,500 pairs x 4 dimensions: {min(seconds):.3f} s of a core")
    assert min(seconds) < 0.5
