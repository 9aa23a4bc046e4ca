"""Agreement against textbook values, hand counts and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reward.accuracy import scorer_accuracy
from reward.agreement import (
    agreement_of_pairs,
    alpha_of_pairs,
    cluster_bootstrap,
    cohen_kappa,
    fleiss_kappa,
    gwet_ac1,
    krippendorff_alpha,
    pairs_of,
    person_by_person,
    raw_agreement,
    three_way_agreement,
    tie_share,
)
from reward.comparisons import RankingEvent

# Krippendorff (2011), section C: four observers, twelve units, five values; 0 stands for no answer
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
    [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
]


def event(annotator: str, ranks: tuple[int | None, ...], prompt: str = "p", name: str = "") -> RankingEvent:
    return RankingEvent(f"{prompt}/{annotator}/{name}", "t", prompt, annotator, tuple(f"{prompt}{i}" for i in range(len(ranks))), ranks)


def test_alpha_of_the_textbook_example() -> None:
    units = [[float(value) for value in column if value] for column in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_alpha_is_one_for_agreement_and_unknown_without_variation() -> None:
    assert krippendorff_alpha([[0, 0], [1, 1], [2, 2, 2]]) == pytest.approx(1)
    assert math.isnan(krippendorff_alpha([[1, 1], [1, 1]])) and math.isnan(krippendorff_alpha([[1], [2]]))


def test_pairs_orient_answers_and_skip_unranked_clips_and_repeats() -> None:
    flipped = RankingEvent("e", "t", "p", "ann", ("p2", "p0", "p1"), (1, 2, 2))
    again = RankingEvent("f", "t", "p", "ann", ("p0", "p1"), (1, 2))
    partial = event("bob", (1, None, 2))
    pairs = {(pair.first, pair.second): pair.votes for pair in pairs_of([flipped, again, partial])}
    assert pairs == {("p0", "p1"): {"ann": 0}, ("p0", "p2"): {"ann": -1, "bob": 1}, ("p1", "p2"): {"ann": -1}}
    assert tie_share(pairs_of([flipped, partial])) == 0.25


def test_answers_without_a_name_are_one_each_and_none_is_dropped() -> None:
    events = [event("arena/unknown", ranks, name=str(i)) for i, ranks in enumerate([(1, 2), (2, 1), (2, 1)])]
    named = [event("arena/7", (1, 2), name=str(i)) for i in range(2)]
    (pair,) = pairs_of([*events, *named])
    assert sorted(pair.votes.values()) == [-1, -1, 1, 1] and pair.votes["arena/7"] == 1
    assert scorer_accuracy([pair], {("overall", "p0"): 0.0, ("overall", "p1"): 1.0}, {"p": "p"}).mean == 0.5


def test_the_ceiling_counts_other_people_by_hand() -> None:
    # pair answers: ann +, bob +, cat tie. ann predicted by bob 1, by cat 1/2; bob likewise; cat's tie asks nothing
    pairs = pairs_of([event("ann", (1, 2)), event("bob", (1, 3)), event("cat", (1, 1))])
    assert person_by_person(pairs, {"p": "p"}).mean == pytest.approx((1 + 0.5 + 1 + 0.5) / 4)
    assert three_way_agreement(pairs, {"p": "p"}).mean == pytest.approx(1 / 3)


def test_a_constant_earns_one_half_an_unknown_score_nothing_and_the_truth_what_people_grant_it() -> None:
    pairs = pairs_of([event("ann", (1, 2, 3)), event("bob", (1, 2, 2)), event("cat", (3, 2, 1))])
    assert scorer_accuracy(pairs, {("overall", f"p{i}"): 0.0 for i in range(3)}, {"p": "p"}).mean == 0.5
    assert math.isnan(scorer_accuracy(pairs, {("overall", f"p{i}"): math.nan for i in range(3)}, {"p": "p"}).mean)
    assert scorer_accuracy(pairs, {("overall", "p0"): 2.0, ("overall", "p1"): 1.0, ("overall", "p2"): math.nan}, {"p": "p"}).mean == pytest.approx(2 / 3)
    assert scorer_accuracy(pairs, {("overall", f"p{i}"): 3.0 - i for i in range(3)}, {"p": "p"}).mean == pytest.approx((3 + 2 + 0) / 8)
    for missing in ({"p0": 2.0, "p1": 1.0}, {"p0": 2.0, "p1": 1.0, "p2": math.inf}):
        assert scorer_accuracy(pairs, {("overall", clip): value for clip, value in missing.items()}, {"p": "p"}).mean == pytest.approx(2 / 3), "no score, or none that is a number"


def test_nobody_judged_twice_means_the_ceiling_is_unknown() -> None:
    pairs = pairs_of([event("ann", (1, 2))])
    assert math.isnan(person_by_person(pairs, {"p": "p"}).mean)


def test_the_interval_covers_the_truth_when_clusters_differ() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rate = rng.beta(6, 3, size=60)
        covered += (lambda i: i.low <= 2 / 3 <= i.high)(cluster_bootstrap(rng.binomial(12, rate).astype(float), np.full(60, 12.0), seed=trial, draws=500))
    assert 0.90 <= covered / 200 <= 0.99


def test_drawing_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    hits, trials = rng.random(37), 1 + rng.random(37)
    whole = cluster_bootstrap(hits, trials)
    for at_once in (1, 37 * 300, 37 * 1999):
        monkeypatch.setattr("reward.agreement.AT_ONCE", at_once)
        assert cluster_bootstrap(hits, trials) == whole


def test_resampling_single_answers_would_be_too_sure() -> None:
    rng = np.random.default_rng(1)
    hits = rng.binomial(12, rng.beta(2, 1, size=60)).astype(float)
    clustered = cluster_bootstrap(hits, np.full(60, 12.0))
    answers = np.concatenate([np.r_[np.ones(int(h)), np.zeros(12 - int(h))] for h in hits])
    single = cluster_bootstrap(answers, np.ones(len(answers)))
    assert clustered.mean == pytest.approx(single.mean) and clustered.high - clustered.low > 1.5 * (single.high - single.low)


def test_alpha_over_pairs_does_not_depend_on_which_clip_comes_first() -> None:
    rng = np.random.default_rng(2)
    events, mirrored, clusters = [], [], {}
    for i in range(40):
        clusters[f"p{i}"] = f"cluster{i // 2}"
        for name in ("ann", "bob"):
            ranks = tuple(int(rank) for rank in 1 + np.argsort(np.argsort(np.arange(3) + rng.normal(size=3))))
            events.append(RankingEvent(f"{i}{name}", "t", f"p{i}", name, ("a", "b", "c"), ranks))
            mirrored.append(RankingEvent(f"{i}{name}", "t", f"p{i}", name, ("c", "b", "a"), ranks))
    found, other = alpha_of_pairs(pairs_of(events), clusters), alpha_of_pairs(pairs_of(mirrored), clusters)
    assert found == pytest.approx(other) and found.low < found.mean < found.high and 0 < found.mean < 1


# Fleiss (1971), as retold in Fleiss, Levin & Paik, "Statistical methods for rates and proportions": fourteen raters, ten subjects, five categories; kappa 0.210
FOURTEEN = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_kappas_of_published_tables() -> None:
    units = [[float(category) for category, count in enumerate(row) for _ in range(count)] for row in FOURTEEN]
    assert fleiss_kappa(units) == pytest.approx(0.210, abs=5e-4)
    grants = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15  # two readers of fifty grant proposals: kappa 0.40
    assert cohen_kappa(grants) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa([])) and math.isnan(cohen_kappa([(1.0, 1.0)])) and math.isnan(fleiss_kappa([[1.0], [0.0]]))


def test_agreement_of_pairs_is_that_of_their_units_in_both_orders() -> None:
    rng = np.random.default_rng(3)
    events = [event(who, tuple(int(r) for r in rng.integers(1, 4, 3)), prompt) for prompt in "abcdefgh" for who in ("ann", "bob", "cat")[: 2 + int(prompt > "d")]]
    pairs = pairs_of(events)
    units = [[sign * float(vote) for vote in pair.votes.values()] for pair in pairs for sign in (1, -1)]
    found = agreement_of_pairs(pairs, {prompt: prompt for prompt in "abcdefgh"})
    for name, statistic in (("raw", raw_agreement), ("kappa", fleiss_kappa), ("ac1", gwet_ac1)):
        assert found[name].mean == pytest.approx(statistic(units)), name
        assert found[name].low <= found[name].mean <= found[name].high
    assert all(math.isnan(value) for each in agreement_of_pairs([], {}).values() for value in each)
