"""Estimates of a filter's quality against closed forms, enumerations and simulations."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import beta, betabinom

from reward.agreement import bootstrap_units, dawid_skene, gwet_ac1, krippendorff_alpha, raw_agreement
from reward.safety.correction import UNKNOWN, by_audit, by_error_rates, none_in
from reward.safety.measure import (
    NOT_YET,
    Cell,
    ErrorRates,
    Group,
    Minimum,
    Review,
    drawn_totals,
    group_of,
    horvitz_thompson,
    leak_rate,
    over_block_rate,
    precision,
    recall,
    rogan_gladen,
)


def group(size: int, reviewed: int, *violating: int) -> Group:
    return group_of([Cell(size, reviewed, violating)])


def test_horvitz_thompson_is_the_total_in_the_mean_over_every_sample_there_is() -> None:
    truth = {"low": (0, 0, 0, 0, 1), "high": (1, 0, 1)}
    samples = [(low, high) for low in combinations(truth["low"], 2) for high in combinations(truth["high"], 2)]
    totals = [horvitz_thompson((*low, *high), [2 / 5] * 2 + [2 / 3] * 2) for low, high in samples]
    assert np.mean(totals) == pytest.approx(3, abs=1e-12) and len(set(np.round(totals, 9))) > 2
    grouped = [group(5, 2, sum(low)).total[0] + group(3, 2, sum(high)).total[0] for low, high in samples]
    assert grouped == pytest.approx(totals)


def test_cells_of_one_group_weigh_by_their_probabilities_and_a_cell_without_reviews_is_told_by_the_others() -> None:
    both = group_of([Cell(100, 10, (1,)), Cell(50, 25, (5,))])
    assert both.total[0] == pytest.approx(1 * 100 / 10 + 5 * 50 / 25) and both.reviewed == 35 and both.size == 150
    assert both.effective == pytest.approx((10 * 10 + 25 * 2) ** 2 / (10 * 10**2 + 25 * 2**2))
    assert group(100, 10, 1).effective == pytest.approx(10)
    assert group_of([Cell(100, 10, (1,)), Cell(50, 0, (0,))]).total[0] == pytest.approx(15)
    for wrong in (Cell(5, 6, (1,)), Cell(5, 3, (4,)), Cell(5, 3, (2, 2)), Cell(5, 3, (-1,))):
        with pytest.raises(ValueError, match="reviewed"):
            group_of([wrong])


def test_totals_of_one_group_are_beta_binomial_and_a_census_leaves_no_doubt() -> None:
    drawn = drawn_totals([group(1_000, 100, 3)], np.random.default_rng(0), 40_000)[:, 0]
    expected = 3 + betabinom(900, 3.5, 97.5).ppf([0.025, 0.25, 0.5, 0.75, 0.975])
    assert np.abs(np.quantile(drawn, [0.025, 0.25, 0.5, 0.75, 0.975]) - expected).max() <= 2
    assert np.ptp(drawn_totals([group(50, 50, 7)], np.random.default_rng(0), 100)) == 0


def test_the_prior_of_a_pool_is_one_half_however_many_groups_it_has() -> None:
    def mean(groups: int, *, shared: bool) -> float:
        return float(drawn_totals([group(1_000, 100, 0)] * groups, np.random.default_rng(0), 20_000, shared=shared).mean())

    assert mean(1, shared=True) == pytest.approx(900 * 0.5 / 101, rel=0.05)
    assert mean(5, shared=True) == pytest.approx(mean(1, shared=True), rel=0.08)
    assert mean(5, shared=False) == pytest.approx(5 * mean(1, shared=True), rel=0.08)


def test_severities_add_up_to_what_one_class_says() -> None:
    one = drawn_totals([group(2_000, 200, 9)], np.random.default_rng(0), 20_000)[:, 0]
    three = drawn_totals([group(2_000, 200, 4, 0, 5)], np.random.default_rng(1), 20_000)
    quantiles = [0.025, 0.5, 0.975]
    assert np.quantile(three.sum(1), quantiles) == pytest.approx(np.quantile(one, quantiles), rel=0.04)
    assert three.mean(0)[1] < three.mean(0)[0] < three.mean(0)[2]


def test_estimates_are_their_definitions() -> None:
    review = Review((group(500, 100, 60),), (group(9_000, 300, 1), group(1_000, 100, 5)))
    caught, missed = 500 * 0.6, 9_000 / 300 + 50
    for estimate, value in ((precision(review.blocked), 0.6), (recall(review), caught / (caught + missed)), (leak_rate(review.passed), missed / 10_000)):
        assert estimate.value == pytest.approx(value) and estimate.low < value < estimate.high
    benign = Review((group(50, 40, 10),), (group(4_000, 100, 0),))
    harmful = 50 * 10 / 40
    assert over_block_rate(benign).value == pytest.approx((50 - harmful) / (50 - harmful + 4_000))
    low, high = precision(review.blocked, draws=40_000)[1:3]
    full = beta(60.5, 40.5).ppf([0.025, 0.975])
    assert full[0] < low < high < full[1], "100 of 500 clips are known, so the interval is narrower than of an endless pool"


def test_severe_misses_weigh_more() -> None:
    mild, severe = (Review((group(100, 100, *caught),), (group(1_000, 500, *missed),)) for caught, missed in (((10, 30), (5, 0)), ((10, 30), (0, 5))))
    assert recall(mild, weights=(1, 1)).value == recall(severe, weights=(1, 1)).value == pytest.approx(40 / 50)
    assert recall(mild, weights=(1, 4)).value == pytest.approx(130 / 140) and recall(severe, weights=(1, 4)).value == pytest.approx(130 / 170)


def test_a_filter_that_missed_nothing_is_not_called_perfect() -> None:
    found = recall(Review((group(400, 200, 100),), (group(19_000, 600, 0),)))
    print(found)
    assert found.value == found.high == 1 and found.low < 0.9 and "no miss seen in 600" in str(found)


@pytest.mark.parametrize(
    "review",
    [
        Review((), ()),
        Review((group(100, 0, 0),), (group(100, 0, 0),)),
        Review((group(100, 29, 20),), (group(100, 50, 1),)),
        Review((group(100, 50, 4),), (group(100, 50, 0),)),
        Review((group(100, 50, 40),), (group(100, 50, 1), group(10, 0, 0))),
        Review((group(100, 50, 40),), ()),
    ],
)
def test_below_the_minimum_nothing_is_told(review: Review) -> None:
    found = recall(review)
    assert math.isnan(found.value) and str(found).startswith(NOT_YET)


def test_a_pool_smaller_than_the_minimum_is_measured_once_all_of_it_was_seen() -> None:
    assert precision((group(7, 7, 7),)).value == 1 and math.isnan(precision((group(7, 6, 6),)).value)
    assert math.isnan(leak_rate((group(100, 40, 0),), Minimum(reviewed=41)).value)


def coverage(sizes: tuple[int, ...], missed: tuple[int, ...], reviews: tuple[int, ...], *, shared: bool, runs: int = 300) -> tuple[float, float]:
    """Share of runs whose interval of recall holds 0.8, and the mean width. 320 of 533 blocked clips violate, 200 of them are reviewed."""
    rng, inside, widths = np.random.default_rng(0), 0, []
    for run in range(runs):
        blocked = (group(533, 200, int(rng.hypergeometric(320, 213, 200))),)
        passed = tuple(group(size, n, int(rng.hypergeometric(m, size - m, n))) for size, m, n in zip(sizes, missed, reviews, strict=True))
        found = recall(Review(blocked, passed), seed=run, draws=1_000, shared=shared)
        inside += found.low <= 0.8 <= found.high
        widths.append(found.high - found.low)
    return inside / runs, float(np.mean(widths))


def test_intervals_of_recall_hold_the_truth_at_two_per_cent() -> None:
    held, width = coverage((16_000, 2_800, 667), (4, 26, 50), (250, 200, 150), shared=True)
    print("coverage, width:", held, width)
    assert held >= 0.92 and width < 0.33, "three standard deviations of 300 runs below 0.955"
    assert coverage((19_467,), (80,), (600,), shared=True)[0] >= 0.91


# Errors of readers


def test_rogan_gladen_undoes_what_errors_do_and_stays_a_rate() -> None:
    true = np.array([0.0, 0.02, 0.5, 1.0])
    raw = true * 0.9 + (1 - true) * 0.03
    assert rogan_gladen(raw, 0.9, 0.97) == pytest.approx(true, abs=1e-12)
    assert rogan_gladen(0.01, 0.9, 0.97) == 0 and rogan_gladen(0.99, 0.9, 0.97) == 1 and np.isnan(rogan_gladen(0.5, 0.4, 0.6))


def test_misses_that_readers_made_up_are_taken_out_of_recall() -> None:
    """400 of 20,000 violate, 80 of them passed; readers see 95 % of violations and make up 2 %."""
    readers = ErrorRates(950, 1_000, 980, 1_000)
    said = 0.95 * 320 / 533 + 0.02 * 213 / 533, 0.95 * 80 / 19_467 + 0.02 * 19_387 / 19_467
    review = Review((group(533, 533, round(533 * said[0])),), (group(19_467, 10_000, round(10_000 * said[1])),))
    believed, corrected = recall(review), recall(review, readers=readers)
    print("believed:", believed, "corrected:", corrected)
    assert believed.high < 0.5 and corrected.value == pytest.approx(0.8, abs=0.06) and corrected.low < 0.8 < corrected.high


def test_dawid_skene_finds_readers_errors_and_does_better_than_the_majority() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(4_000) < 0.3).astype(int)
    right = np.array([[0.98, 0.95], [0.95, 0.8], [0.7, 0.6], [0.75, 0.65], [0.6, 0.7]])  # [R,K]: three of five readers are poor
    answers = np.where(rng.random((4_000, 5)) < right[:, truth].T, truth[:, None], 1 - truth[:, None])
    answers[rng.random((4_000, 5)) < 0.1] = -1
    found = dawid_skene(answers, 2)
    majority = (np.where(answers >= 0, 2 * answers - 1, 0).sum(1) > 0).astype(int)
    print("right:", (found.truth.argmax(1) == truth).mean(), "majority:", (majority == truth).mean(), found.confusion.round(3).tolist())
    assert np.abs(found.confusion[:, [0, 1], [0, 1]] - right).max() < 0.05 and found.prevalence[1] == pytest.approx(0.3, abs=0.04)
    assert (found.truth.argmax(1) == truth).mean() > (majority == truth).mean() + 0.03
    for wrong in (np.zeros((0, 3), dtype=int), np.array([[2]]), np.array([[-2]]), np.array([1])):
        with pytest.raises(ValueError, match="answers are"):
            dawid_skene(wrong, 2)


def test_one_step_of_dawid_skene_is_bayes_rule() -> None:
    found = dawid_skene(np.array([[0, 0, 1], [1, 1, 1], [0, 0, 0]]), 2, prior=0, steps=1)
    start = np.array([[2 / 3, 1 / 3], [0, 1], [1, 0]])
    third = np.array([start[[0, 1], 0].sum(), start[[0, 1], 1].sum()]) / start.sum(0)  # says 1, by truth
    first = np.array([start[[0, 2], 0].sum(), start[[0, 2], 1].sum()]) / start.sum(0)  # says 0, by truth
    expected = start.mean(0) * first * first * third
    assert found.truth[0] == pytest.approx(expected / expected.sum(), abs=1e-6)


def test_agreement_where_nearly_all_answers_are_the_same() -> None:
    """Two readers, 118 times no and no, 5 and 2 times apart (Gwet 2008, table 2's case: kappa near 0, AC1 near 0.95)."""
    units = [(0.0, 0.0)] * 118 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 2
    share = 7 / 250
    chance = 2 * share * (1 - share)
    assert raw_agreement(units) == pytest.approx(118 / 125)
    assert gwet_ac1(units) == pytest.approx((118 / 125 - chance) / (1 - chance)) and gwet_ac1(units) > 0.93
    assert krippendorff_alpha(units) < 0.01
    assert gwet_ac1([(1.0, 1.0)]) == 1 and math.isnan(gwet_ac1([])) and math.isnan(gwet_ac1([(1.0,)])) and math.isnan(raw_agreement([]))
    found = bootstrap_units(gwet_ac1, units, draws=100)
    assert found.low < found.mean < found.high and math.isnan(bootstrap_units(gwet_ac1, []).low)


# Corrected rates


def test_raw_times_precision_over_recall_is_the_true_rate() -> None:
    review = Review((group(500, 500, 300),), (group(9_500, 9_500, 100),))
    found = by_audit(50, 1_000, review)
    assert found.rate == pytest.approx(0.05 * 0.6 / 0.75) and found.rate < found.upper < 2 * found.rate


def test_a_corrected_rate_is_at_least_0_at_most_1_and_unknown_is_never_safe() -> None:
    review = Review((group(10, 10, 10),), (group(1_000, 100, 60),))
    assert by_audit(900, 1_000, review) == (1.0, 1.0)
    assert by_audit(0, 100, Review((group(10, 10, 0),), (group(90, 90, 0),))).rate == 0
    nothing = by_audit(0, 100, Review((group(10, 10, 0),), (group(10_000, 100, 0),)))
    assert nothing.rate == 0 and nothing.upper > 0.01, "no miss among 100 is not no miss"
    empty = group(0, 0, 0)
    for unknown in (Review((), ()), Review((empty,), (empty,)), Review((), (group(9, 0, 0),)), Review((group(9, 9, 1),), ()), Review((group(9, 9, 1),), (group(9, 0, 0),))):
        assert math.isnan(by_audit(1, 10, unknown).rate) and by_audit(1, 10, unknown).upper == 1
    assert by_audit(0, 0, review).upper == 1 and UNKNOWN.upper == 1
    with pytest.raises(ValueError, match="11 blocked of 10"):
        by_audit(11, 10, review)


def test_where_an_audit_has_no_blocked_clip_all_blocked_ones_count_and_the_leaked_ones_too() -> None:
    review = Review((), (group(200, 200, 10),))
    found = by_audit(20, 1_000, review)
    assert found.rate == pytest.approx(0.02 + 0.98 * 0.05) and found.rate < found.upper < 0.1
    assert by_audit(0, 1_000, Review((), (group(200, 200, 0),))).rate == 0 and by_audit(0, 1_000, Review((group(0, 0, 0),), (group(5_000, 100, 0),))).upper > 0.01


def test_of_clips_left_to_people_all_count_and_the_audit_is_about_the_others() -> None:
    review = Review((group(10, 10, 10),), (group(890, 890, 9),))
    found = by_audit(10, 1_000, review, left=100)
    assert found.rate == pytest.approx((100 + 10 + 9) / 1_000) and found.rate < found.upper < 0.15
    assert by_audit(0, 1_000, Review((), (group(900, 900, 9),)), left=100).rate == pytest.approx((100 + 9) / 1_000)
    assert by_audit(10, 1_000, review, left=0) == by_audit(10, 1_000, review)
    assert math.isnan(by_audit(0, 100, review, left=100).rate) and by_audit(0, 100, review, left=100).upper == 1, "nothing was decided"
    assert by_audit(90, 100, Review((group(10, 10, 10),), (group(1_000, 100, 60),)), left=10).rate == 1
    with pytest.raises(ValueError, match="950 blocked of 900"):
        by_audit(950, 1_000, review, left=100)


def test_stored_error_rates_correct_a_raw_rate() -> None:
    found = by_error_rates(120, 1_000, ErrorRates(80, 100, 950, 1_000))
    assert found.rate == pytest.approx((0.12 + 0.95 - 1) / (0.8 + 0.95 - 1)) and found.rate < found.upper < 0.2
    fewer = by_error_rates(10, 1_000, ErrorRates(80, 100, 950, 1_000))
    assert fewer.rate == 0 and fewer.upper == none_in(1_000, 0.95) == pytest.approx(0.00299, abs=1e-5), "fewer blocked than false alarms alone would be"
    for useless in (ErrorRates(5, 10, 5, 10), ErrorRates(0, 0, 5, 10), ErrorRates(5, 5, 0, 0)):
        assert math.isnan(by_error_rates(1, 10, useless).rate) and by_error_rates(1, 10, useless).upper == 1


def test_the_upper_bound_of_a_corrected_rate_holds() -> None:
    """19 of 20 times, for a policy that violates in 2 % of its clips; a bootstrap that draws what was seen again would say 1.6 % where no miss was seen."""
    rng, held = np.random.default_rng(0), 0
    for run in range(300):
        blocked, passed = rng.hypergeometric(320, 213, 200), rng.hypergeometric(80, 19_387, 600)
        review = Review((group(533, 200, int(blocked)),), (group(19_467, 600, int(passed)),))
        held += by_audit(int(rng.binomial(2_000, 533 / 20_000)), 2_000, review, seed=run, draws=1_000).upper >= 0.02
    print("held:", held / 300)
    assert held / 300 >= 0.92
