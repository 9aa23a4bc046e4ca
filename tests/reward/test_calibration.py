"""Probabilities against simulation, closed forms and brute force: fitted parameters, likelihood, Brier score, calibration error, margins."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest

from reward.accuracy import Signs
from reward.agreement import Array
from reward.calibration import (
    BINS,
    Calibration,
    brier,
    by_margin,
    calibrated_error,
    decided,
    expected_calibration_error,
    falls,
    fit_calibration,
    fit_platt,
    from_favourite,
    log_loss,
    probabilities,
    reliability,
)


def by_hand(difference: Array, temperature: float, log_tie: float) -> Array:
    """Davidson 1970: worths e^(d/T) and 1, a tie in proportion v times the root of their product."""
    worth = np.exp(difference / temperature)
    parts = np.stack([worth, math.exp(log_tie) * np.sqrt(worth), np.ones_like(worth)], axis=1)
    return parts / parts.sum(1, keepdims=True)


def simulated(n: int, seed: int, temperature: float = 1.0, log_tie: float = 0.0) -> tuple[Signs, Array]:
    """Differences of a scorer whose probabilities are right at this temperature and tie parameter, and answers drawn from them."""
    rng = np.random.default_rng(seed)
    difference = temperature * rng.normal(scale=1.5, size=n)
    drawn = (rng.random((n, 1)) > by_hand(difference, temperature, log_tie).cumsum(1)).sum(1)
    return (1 - drawn).astype(np.int8), difference


def test_probabilities_are_davidsons() -> None:
    difference = np.array([-30.0, -1.0, 0.0, 0.3, 8.0])
    assert probabilities(difference, Calibration(2.5, -0.7)) == pytest.approx(by_hand(difference, 2.5, -0.7), abs=1e-14)
    some = probabilities(difference, Calibration(2.5, -0.7, 0.2))
    assert some == pytest.approx(0.8 * by_hand(difference, 2.5, -0.7) + 0.2 * np.array([0.5, 0, 0.5]), abs=1e-14), "a coin never ties"
    nothing = probabilities(difference, Calibration(math.inf, math.log(2)))
    assert nothing == pytest.approx(np.tile([0.25, 0.5, 0.25], (5, 1)), abs=1e-15)


# Fitting


@pytest.mark.parametrize(("temperature", "log_tie"), [(1.0, 0.0), (0.2, -2.0), (4.0, 1.0), (1e6, -0.5)])
def test_temperature_and_tie_parameter_of_simulated_answers_are_recovered(temperature: float, log_tie: float) -> None:
    found = fit_calibration(*simulated(20_000, 1, temperature, log_tie), careless=False)
    print(f"temperature {found.temperature:.4g} for {temperature}, log tie {found.log_tie:.3f} for {log_tie}")
    assert found.temperature == pytest.approx(temperature, rel=0.06) and found.log_tie == pytest.approx(log_tie, abs=0.06)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_of_careless_answers_is_recovered_and_the_others_are_not_made_timid_by_them(share: float) -> None:
    answer, difference = simulated(20_000, 4, 2.0, -0.5)
    rng = np.random.default_rng(0)
    given = np.where(rng.random(20_000) < share, rng.choice([1, -1], 20_000), answer).astype(np.int8)
    found, alone = fit_calibration(given, difference), fit_calibration(given, difference, careless=False)
    print(found, alone)
    assert found.careless == pytest.approx(share, abs=0.03) and found.temperature == pytest.approx(2, rel=0.06) and found.log_tie == pytest.approx(-0.5, abs=0.06)
    assert alone.careless == 0 and alone.temperature > (1 + share) * found.temperature
    error = [expected_calibration_error(*from_favourite(probabilities(difference, each), given)) for each in (found, alone)]
    assert error[0] < error[1] and error[0] <= calibrated_error(probabilities(difference, found)).high, "no worse than right probabilities"


def test_a_few_answers_convict_nobody_of_carelessness() -> None:
    answer, difference = simulated(60, 1, 2.0, -0.5)
    assert fit_calibration(answer, difference).careless < 0.02
    upset = np.where(np.arange(60) == np.argmax(np.abs(difference)), -np.sign(difference), answer).astype(np.int8)  # the surest answer of all is the other way round
    assert 0.005 < fit_calibration(upset, difference).careless < 0.2


def test_the_fit_is_the_maximum_of_the_likelihood_with_half_an_answer_of_each_kind() -> None:
    answer, difference = simulated(300, 2, 3.0, -0.4)

    def likelihood(temperature: float, log_tie: float) -> float:
        p = by_hand(np.append(difference, math.sqrt(np.mean(difference**2))), temperature, log_tie)
        return float(np.log(p[np.arange(300), 1 - answer.astype(int)]).sum() + 0.5 * np.log(p[-1]).sum())

    temperature, log_tie, _ = fit_calibration(answer, difference, careless=False)
    best = likelihood(temperature, log_tie)
    for step in (1e-3, 1e-2, 0.3):
        for factor, shift in ((1 + step, 0.0), (1 - step, 0.0), (1.0, step), (1.0, -step), (1 + step, step), (1 - step, step)):
            assert likelihood(temperature * factor, log_tie + shift) < best
    slope = (likelihood(temperature * 1.0001, log_tie) - likelihood(temperature / 1.0001, log_tie)) / 0.0002
    assert abs(slope) < 1e-3


def test_with_careless_answers_the_fit_is_the_maximum_too() -> None:
    answer, difference = simulated(3_000, 2, 3.0, -0.4)
    rng = np.random.default_rng(1)
    answer = np.where(rng.random(3_000) < 0.2, rng.choice([1, -1], 3_000), answer).astype(np.int8)

    def likelihood(temperature: float, log_tie: float, share: float) -> float:
        p = (1 - share) * by_hand(np.append(difference, math.sqrt(np.mean(difference**2))), temperature, log_tie) + share * np.array([0.5, 0, 0.5])
        return float(np.log(p[np.arange(3_000), 1 - answer.astype(int)]).sum() + 0.5 * np.log(p[-1]).sum() + math.log(1 - share))

    best = fit_calibration(answer, difference)
    assert 0.1 < best.careless < 0.3
    for step in (1e-3, 1e-2, 0.05):
        for a, b, c in ((step, 0, 0), (0, step, 0), (0, 0, step), (step, step, step), (step, 0, -step), (0, step, -step)):
            for sign in (1, -1):
                assert likelihood(best.temperature * (1 + sign * a), best.log_tie + sign * b, best.careless + sign * c) < likelihood(*best)


def test_a_constant_scorer_gets_the_share_of_ties_and_no_say() -> None:
    answer = np.array([0] * 30 + [1] * 50 + [-1] * 20, dtype=np.int8)
    found = fit_calibration(answer, np.zeros(100))
    v = math.exp(found.log_tie)
    assert found.temperature == math.inf and v / (2 + v) == pytest.approx(30.5 / 101.5, abs=1e-6)


def test_few_answers_all_alike_give_finite_parameters() -> None:
    right, difference = np.ones(5, dtype=np.int8), np.linspace(1, 2, 5)
    for answer in (right, 0 * right):
        found = fit_calibration(answer, difference)
        assert math.isfinite(found.log_tie) and found.temperature > 0
        assert log_loss(*from_favourite(probabilities(difference, found), answer)) < math.log(3)
    assert fit_calibration(right, 1e250 * difference).temperature == pytest.approx(1e250 * fit_calibration(right, difference).temperature)
    with pytest.raises(ValueError, match="no answers"):
        fit_calibration(right[:0], difference[:0])


def test_a_scorer_that_is_mostly_wrong_is_not_turned_round() -> None:
    answer, difference = simulated(500, 3)
    found = fit_calibration(answer, -difference)
    assert found.temperature == math.inf
    assert decided(*from_favourite(probabilities(-difference, found), answer))[0] == pytest.approx(0.5)


# Scores of probabilities


def test_log_loss_and_brier_score_by_hand() -> None:
    probability, outcome = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), np.array([[1.0, 0, 0], [0, 0, 1]])
    assert log_loss(probability, outcome) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)
    assert brier(probability, outcome) == pytest.approx((0.25 + 0.09 + 0.04 + 0.01 + 0.64 + 0.81) / 2)
    halves = np.array([[0.5, 0, 0.5], [0, 1, 0]])
    assert brier(probability, halves) == pytest.approx((0.25 + 0.09 + 0.64 + 0.25 + 0.09 + 0.04) / 4 + (0.01 + 0.04 + 0.01) / 2)
    assert log_loss(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])) > 700
    for measure in (log_loss, brier, expected_calibration_error):
        assert math.isnan(measure(probability[:0], outcome[:0]))


def test_without_the_ties_what_is_left_is_bradley_terry() -> None:
    difference, answer = np.array([0.4, -2.0, 1.0]), np.array([1, -1, 0], dtype=np.int8)
    probability, outcome = decided(*from_favourite(probabilities(difference, Calibration(1.0, 0.7)), answer))
    assert probability[:, 0] == pytest.approx(1 / (1 + np.exp(-np.abs(difference[:2])))) and probability.sum(1) == pytest.approx(1)
    assert outcome.tolist() == [[1, 0], [1, 0]]


def test_calibration_error_by_brute_force() -> None:
    rng = np.random.default_rng(4)
    p = rng.random(997)
    y = (rng.random(997) < p**2).astype(float)
    gaps = [len(part) * abs(np.mean(p[part]) - np.mean(y[part])) for part in np.array_split(np.argsort(p), BINS)]
    found = expected_calibration_error(p[:, None], y[:, None])
    assert found == pytest.approx(sum(gaps) / 997, abs=2e-3) and found > 0.1
    exact = p[:990], y[:990]  # 66 in every bin: no bound to argue about
    gaps = [abs(np.mean(exact[0][part]) - np.mean(exact[1][part])) for part in np.split(np.argsort(exact[0]), BINS)]
    assert expected_calibration_error(exact[0][:, None], exact[1][:, None]) == pytest.approx(np.mean(gaps), abs=1e-12)
    table = np.stack([p, 1 - p], axis=1)[:990]
    assert expected_calibration_error(table, np.stack([y, 1 - y], axis=1)[:990]) == pytest.approx(np.mean(gaps), abs=1e-12)


def test_an_answer_of_weight_three_is_three_answers() -> None:
    rng = np.random.default_rng(6)
    p, weight = rng.random(400).round(2), rng.integers(1, 20, 400)
    y = (rng.random(400) < np.where(weight > 10, p, 1 - p)).astype(float)  # what counts most is calibrated, the rest is not
    told, happened = np.stack([p, 1 - p], axis=1), np.stack([y, 1 - y], axis=1)
    for measure in (log_loss, brier, expected_calibration_error):
        again, plain = measure(told.repeat(weight, axis=0), happened.repeat(weight, axis=0)), measure(told, happened)
        for unit in (1.0, 0.01):
            assert measure(told, happened, weight=unit * weight) == pytest.approx(again, rel=1e-12) and abs(again / plain - 1) > 0.1
        assert measure(told, happened, weight=np.ones(400)) == plain


def test_equal_predictions_share_a_bin_whatever_the_order_of_rows() -> None:
    """Sorted by outcome, a constant would look wrong in every bin if its rows were cut into bins."""
    y = np.sort(np.random.default_rng(5).random(300) < 0.4).astype(float)
    assert expected_calibration_error(np.full((300, 1), y.mean()), y[:, None]) == pytest.approx(0, abs=1e-12)
    assert expected_calibration_error(np.full((300, 1), 0.5), y[:, None]) == pytest.approx(0.5 - y.mean())


def test_no_favourite_means_half_an_answer_for_each_clip() -> None:
    probability, outcome = from_favourite(np.tile([0.3, 0.4, 0.3], (3, 1)), np.array([1, -1, 0], dtype=np.int8))
    assert outcome.tolist() == [[0.5, 0, 0.5], [0.5, 0, 0.5], [0, 1, 0]] and probability.tolist() == [[0.3, 0.4, 0.3]] * 3
    assert decided(probability, outcome)[1].tolist() == [[0.5, 0.5]] * 2


def test_the_error_of_a_calibrated_scorer_is_what_normal_theory_says() -> None:
    """The sum of independent misses of a bin is about normal with variance sum p (1 - p), and its mean size sqrt(2 / pi) of the deviation."""
    difference = simulated(4500, 6)[1]
    probability = from_favourite(by_hand(difference, 1.0, 0.0), np.zeros(4500, dtype=np.int8))[0]
    found = calibrated_error(probability, draws=400)
    parts = [np.sqrt(2 / np.pi * (p[rows] * (1 - p[rows])).sum()) for p in probability.T for rows in np.split(np.argsort(p), BINS)]
    assert found.mean == pytest.approx(sum(parts) / probability.size, rel=0.02) and found.low < found.mean < found.high
    assert all(math.isnan(value) for value in calibrated_error(probability[:0]))
    assert calibrated_error(np.full((30, 2), 0.5)) == (0, 0, 0), "without a favourite nothing can be off"


def test_answers_drawn_from_the_probabilities_have_the_error_of_a_calibrated_scorer() -> None:
    inside = 0
    for seed in range(60):
        answer, difference = simulated(600, 100 + seed)
        difference[:40] = 0  # the scorer has no favourite there
        answer[:40] = np.random.default_rng(seed).choice([1, 0, -1], size=40)
        for part in ((sides := from_favourite(by_hand(difference, 1.0, 0.0), answer)), decided(*sides)):
            expected = calibrated_error(part[0], draws=100, seed=seed)
            inside += expected.low <= expected_calibration_error(*part) <= expected.high
    print(f"inside the 95 % range: {inside} of 120")
    assert 105 <= inside <= 120


@pytest.mark.parametrize("wrong", [0.25, 3.0])
def test_calibration_brings_the_error_below_a_twentieth(wrong: float) -> None:
    """3,600 held-out answers about 600 prompts, whose difficulty differs; another 300 prompts to fit on. The scorer's scale and tie parameter are wrong before."""
    rng = np.random.default_rng(8)
    spread = np.repeat(rng.gamma(4.0, 0.4, size=900), 6)
    difference = rng.normal(size=5400) * spread
    answer = (1 - (rng.random((5400, 1)) > by_hand(difference, 1.0, -0.3).cumsum(1)).sum(1)).astype(np.int8)
    val, test = slice(0, 1800), slice(1800, 5400)
    fitted = fit_calibration(answer[val], wrong * difference[val])
    errors = {}
    for name, calibration in (("before", Calibration(1.0, 1.5)), ("after", fitted)):
        sides = from_favourite(probabilities(wrong * difference[test], calibration), answer[test])
        errors[name] = [(expected_calibration_error(*part), calibrated_error(part[0])) for part in (sides, decided(*sides))]
    for kind, (before, _), (after, right) in zip(("three-way", "decided"), *errors.values(), strict=True):
        print(f"{kind}: before {before:.3f}, after {after:.4f}; a calibrated scorer {right.mean:.4f} [{right.low:.4f}, {right.high:.4f}]")
        assert before > 0.05 >= after and after <= 1.5 * right.high


def test_reliability_holds_every_prediction_once() -> None:
    answer, difference = simulated(500, 9)
    probability, outcome = from_favourite(by_hand(difference, 1.0, 0.0), answer)
    table = reliability(probability, outcome)
    assert len(table) == 3
    for column, bins in enumerate(table):
        assert sum(row.number for row in bins) == 500 and [row.predicted for row in bins] == sorted(row.predicted for row in bins)
        assert sum(row.number * row.observed for row in bins) == pytest.approx(outcome[:, column].sum())
        assert sum(row.number * row.predicted for row in bins) == pytest.approx(probability[:, column].sum())
    assert len(reliability(np.full((9, 1), 0.4), np.ones((9, 1)))[0]) == 1


# Platt's two numbers


def test_platts_numbers_are_the_maximum_of_his_likelihood() -> None:
    rng = np.random.default_rng(3)
    score = rng.normal(size=60) * 3 + 1
    happened = (rng.random(60) < 1 / (1 + np.exp(1.5 - score))).astype(float)
    found = fit_platt(score, happened, np.ones(60))
    positives = happened.sum()
    target = np.where(happened == 1, (positives + 1) / (positives + 2), 1 / (60 - positives + 2))

    def loss(slope: float, offset: float) -> float:
        p = 1 / (1 + np.exp(-(slope * score + offset)))
        return float(-(target * np.log(p) + (1 - target) * np.log(1 - p)).sum())

    best = loss(*found)
    for slope, offset in itertools.product((-1e-3, 0, 1e-3), repeat=2):
        assert loss(found.slope + slope, found.offset + offset) >= best - 1e-9


def test_platts_numbers_are_found_again_and_weights_are_counts() -> None:
    rng = np.random.default_rng(4)
    score = rng.normal(size=20_000) * 2
    happened = (rng.random(20_000) < 1 / (1 + np.exp(-(0.7 * score - 1)))).astype(float)
    found = fit_platt(score, happened, np.ones(20_000))
    assert found.slope == pytest.approx(0.7, abs=0.03) and found.offset == pytest.approx(-1, abs=0.05)
    few = fit_platt(np.repeat(score[:400], 3), np.repeat(happened[:400], 3), np.ones(1200))
    weighed = fit_platt(score[:400], happened[:400], np.full(400, 3.0))
    assert weighed.slope == pytest.approx(few.slope, rel=0.05), "but for the targets, which know that there are 400 clips"
    assert weighed == pytest.approx(fit_platt(score[:400], happened[:400], np.ones(400)), rel=1e-6)


def test_scores_that_separate_stay_finite_and_those_that_are_wrong_say_nothing() -> None:
    truth = np.array([0.0] * 10 + [1.0] * 10)
    apart = fit_platt(truth * 8 - 4, truth, np.ones(20))
    assert 0 < apart.slope < 10 and 1 / (1 + np.exp(-(4 * apart.slope + apart.offset))) == pytest.approx(11 / 12, abs=1e-4)
    wrong = fit_platt(4 - truth * 8, truth, np.ones(20))
    assert wrong.slope == 0 and 1 / (1 + np.exp(-wrong.offset)) == pytest.approx(0.5, abs=1e-6)
    assert fit_platt(np.zeros(20), truth, np.ones(20)).offset == pytest.approx(0, abs=1e-6), "scores that are all the same"
    for one_kind in (np.zeros(5), np.ones(5)):
        with pytest.raises(ValueError, match="both kinds"):
            fit_platt(np.arange(5.0), one_kind, np.ones(5))


# Margins


def test_margins_hold_equally_many_decided_answers_and_what_is_promised_comes_true() -> None:
    answer, difference = simulated(8000, 10, temperature=2.0)
    rows = by_margin(answer, difference, np.arange(8000), Calibration(2.0, 0.0))
    assert len(rows) == 8 and sum(row.answers for row in rows) == (answer != 0).sum()
    assert max(row.answers for row in rows) - min(row.answers for row in rows) <= 1
    assert all(narrow.high <= wide.low for narrow, wide in pairwise(rows))
    assert all(row.accuracy.low - 0.02 <= row.promised <= row.accuracy.high + 0.02 for row in rows)
    assert not falls(rows) and rows[-1].accuracy.mean > 0.9 > 0.6 > rows[0].accuracy.mean


def test_a_scorer_whose_wide_margins_are_wrong_is_found_out() -> None:
    answer, difference = simulated(4000, 11)
    wild = np.where(np.abs(difference) > 2.5, -difference, difference)
    assert falls(by_margin(answer, wild, np.arange(4000), Calibration(1.0, 0.0)))


def test_a_margin_that_is_less_often_right_by_chance_is_no_fall() -> None:
    answer, difference = simulated(300, 13)
    rows = by_margin(answer, difference, np.arange(300), Calibration(1.0, 0.0))
    assert any(wide.accuracy.mean < narrow.accuracy.mean for narrow, wide in pairwise(rows)) and not falls(rows)


def test_margins_of_nothing_and_of_a_constant() -> None:
    answer, difference = simulated(50, 12)
    assert by_margin(answer[:0], difference[:0], np.arange(0), Calibration(1.0, 0.0)) == []
    (only,) = by_margin(answer, 0 * difference, np.arange(50), Calibration(1.0, 0.0))
    assert only.accuracy.mean == only.promised == 0.5 and only.low == only.high == 0
