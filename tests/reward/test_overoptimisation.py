"""Best of n is what counting all sets gives, without bias; its KL is that of the density; Gao's forms give back what was put in."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from reward.overoptimisation import (
    best_of_n,
    clips_for_kl,
    curve_of,
    fit_gao,
    kl_of_best_of_n,
    mean_gains,
    order_weights,
    second_half,
    sizes_up_to,
)

Array = np.ndarray[Any, np.dtype[np.float64]]


def chosen(proxy: Array, gold: Array, rows: tuple[int, ...]) -> Array:
    """(proxy, gold) of the best of these clips, equals chosen equally often."""
    best = [row for row in rows if proxy[row] == proxy[list(rows)].max()]
    return np.array([proxy[best].mean(), gold[best].mean()])


def over_all_sets(proxy: Array, gold: Array, n: int) -> Array:
    return np.mean([chosen(proxy, gold, rows) for rows in itertools.combinations(range(len(proxy)), n)], axis=0)


# Best of n


@pytest.mark.parametrize("levels", [1000, 3, 1])
def test_the_estimator_is_the_mean_over_all_sets(levels: int) -> None:
    """With many levels of proxy nothing ties, with three much does, with one all."""
    rng = np.random.default_rng(levels)
    proxy, gold = rng.integers(levels, size=9) / levels, rng.normal(size=9)
    found = np.array(best_of_n(proxy, gold, np.arange(1, 10)))
    expected = np.array([over_all_sets(proxy, gold, n) for n in range(1, 10)]).T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_the_weights_are_those_of_the_binomials() -> None:
    weights = order_weights(200, [1, 2, 17, 199, 200])
    for row, n in zip(weights, (1, 2, 17, 199, 200), strict=True):
        np.testing.assert_allclose(row, [math.comb(i, n - 1) / math.comb(200, n) for i in range(200)], rtol=1e-12, atol=0)
    assert (weights >= 0).all() and weights.sum(1) == pytest.approx(1, abs=1e-13)
    assert order_weights(1, [1]).tolist() == [[1.0]]
    np.testing.assert_allclose(order_weights(100_000, [50_000]).sum(), 1, rtol=1e-11)


@pytest.mark.parametrize("n", [0, 6, 1.5, math.nan])
def test_an_n_that_cannot_be_is_refused(n: float) -> None:
    with pytest.raises(ValueError, match="whole numbers from 1 to 5"):
        order_weights(5, [n])


def test_the_estimator_has_no_bias() -> None:
    """Its expectation over every sample of N = 4 from four atoms, two of which tie, is the expectation of n independent draws."""
    proxy, gold, share = np.array([0.0, 1.0, 1.0, 2.0]), np.array([0.5, -1.0, 3.0, 0.1]), np.array([0.4, 0.3, 0.2, 0.1])

    def expectation(draws: int, value: Any) -> Any:
        rows = itertools.product(range(4), repeat=draws)
        return sum(share[list(row)].prod() * value(row) for row in rows)

    for n in (1, 2, 3, 4):
        estimated = expectation(4, lambda row: np.array(best_of_n(proxy[list(row)], gold[list(row)], [n]))[:, 0])  # noqa: B023
        np.testing.assert_allclose(estimated, expectation(n, lambda row: chosen(proxy, gold, row)), rtol=0, atol=1e-14)


def test_the_order_of_clips_changes_no_bit() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(5, size=40).astype(float), rng.normal(size=40)
    proxy[3] = gold[17] = math.nan
    n = np.array(sizes_up_to(38))
    before = np.array(best_of_n(proxy, gold, n))
    for _ in range(20):
        order = rng.permutation(40)
        assert np.array_equal(np.array(best_of_n(proxy[order], gold[order], n)), before)


def test_a_clip_without_a_score_is_never_chosen_and_clips_that_are_not_there_give_nan() -> None:
    proxy, gold = np.array([math.nan, 1.0, math.inf, 0.0, 2.0]), np.array([100.0, 3.0, 100.0, 5.0, math.nan])
    found = best_of_n(proxy, gold, [1, 2, 3])
    np.testing.assert_array_equal(found, [[0.5, 1.0, math.nan], [4.0, 3.0, math.nan]])
    assert np.isnan(best_of_n([math.nan] * 3, [0.0] * 3, [1, 2])).all() and np.isnan(best_of_n([], [], [1])).all()
    with pytest.raises(ValueError, match="one proxy and one gold a clip"):
        best_of_n([1.0, 2.0], [1.0], [1])


def test_gaussian_clips_gain_the_expected_maximum_times_the_correlation() -> None:
    rng, n = np.random.default_rng(0), [1, 2, 4, 16, 64]
    largest = [quad(lambda x: x * m * norm.pdf(x) * norm.cdf(x) ** (m - 1), -12, 12)[0] for m in n]  # noqa: B023
    proxy, other = rng.normal(size=(2, 600, 64))
    for rho in (1.0, 0.6, 0.0):
        rows = np.array([best_of_n(a, rho * a + math.sqrt(1 - rho**2) * b, n) for a, b in zip(proxy, other, strict=True)])  # [P,2,K]
        mean, error = rows.mean(0), rows.std(0) / math.sqrt(600)
        assert (np.abs(mean[0] - largest) < 4 * error[0]).all() and (np.abs(mean[1] - rho * np.array(largest)) < 4 * error[1]).all()


def test_sizes_are_about_even_in_their_logarithm() -> None:
    assert sizes_up_to(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20] and sizes_up_to(1) == [1] and sizes_up_to(64)[-2:] == [48, 64]


# The KL


def test_the_kl_is_that_of_the_density_of_the_best_of_n() -> None:
    """Where nothing ties, the best of n is n u^(n-1) times as likely at the quantile u of the proxy."""
    for n in (1, 2, 7, 64):
        expected = quad(lambda u: n * u ** (n - 1) * math.log(n * u ** (n - 1)) if u else 0.0, 0, 1)[0]  # noqa: B023
        assert kl_of_best_of_n([n])[0] == pytest.approx(expected, abs=1e-9)


def test_the_kl_is_an_upper_bound_where_clips_come_up_twice_or_tie() -> None:
    rng = np.random.default_rng(0)
    for shares in (np.array([0.5, 0.5]), np.array([0.9, 0.1]), rng.dirichlet(np.ones(6)), np.full(1000, 1e-3)):
        below = np.concatenate([[0.0], np.cumsum(shares)])
        below[-1] = 1.0
        for n in (1, 2, 10, 100):
            of_best = np.diff(below**n)
            there = of_best > 0
            exact = float((of_best[there] * np.log(of_best[there] / shares[there])).sum())
            assert exact <= kl_of_best_of_n([n])[0] + 1e-12 and exact <= -math.log(shares[-1]) + 1e-12
    assert exact == pytest.approx(kl_of_best_of_n([100])[0], abs=2e-3), "a thousand levels hardly tie"


def test_the_number_of_clips_for_a_kl_is_the_inverse() -> None:
    for n in (1, 1.5, 4, 64, 1e6):
        assert clips_for_kl(float(kl_of_best_of_n([n])[0])) == pytest.approx(n, rel=1e-6)
    assert clips_for_kl(math.inf) == math.inf and clips_for_kl(1e4) == math.inf
    with pytest.raises(ValueError, match="not below 0"):
        clips_for_kl(-0.1)


# The forms


D = np.sqrt(kl_of_best_of_n([1, 2, 4, 8, 16, 32, 64, 128]))


@pytest.mark.parametrize(("form", "alpha", "beta"), [("best_of_n", 1.0, 0.3), ("best_of_n", 0.2, -0.1), ("rl", 0.8, 0.4), ("rl", -0.1, 0.2)])
def test_planted_parameters_come_back_and_the_peak_is_where_the_curve_is_highest(form: Any, alpha: float, beta: float) -> None:
    d = D if form == "best_of_n" else np.linspace(0, 12, 25)

    def curve(x: Array) -> Array:
        return x * (alpha - beta * (x if form == "best_of_n" else np.log(np.where(x > 0, x, 1))))

    rng = np.random.default_rng(0)
    own = rng.normal(size=(40, 1)) * curve(d)  # prompts differ in how much they gain, the mean is known
    found = fit_gao(form, d, curve(d) + own - own.mean(0))
    assert (found.alpha.mean, found.beta.mean) == pytest.approx((alpha, beta), abs=1e-12) and found.misfit < 1e-12
    np.testing.assert_allclose(found(d), curve(d), atol=1e-12)
    fine = np.linspace(0, 50, 500_001)
    if beta > 0:
        values = curve(fine)
        assert found.peak.mean == pytest.approx(fine[values.argmax()], abs=2e-4) and found.top.mean == pytest.approx(values.max(), abs=1e-6)
    else:
        assert found.peak == (math.inf, math.inf, math.inf) and found.top.mean == math.inf


def test_a_gold_that_only_falls_is_highest_at_the_start() -> None:
    found = fit_gao("best_of_n", D, np.tile(-D - D**2, (5, 1)))
    assert found.peak == (0, 0, 0) and found.top == (0, 0, 0)
    flat = fit_gao("best_of_n", D, np.zeros((5, len(D))))
    assert flat.alpha.mean == flat.beta.mean == flat.peak.mean == 0
    rising = fit_gao("rl", [0.0, 1.0, 2.0], np.tile([0.0, 1.0, 2.0 - 1e-12], (3, 1)))
    assert rising.peak.mean == math.inf, "beta is above 0 by rounding alone"


def test_intervals_are_over_prompts_and_hold_the_truth_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(0), np.zeros(3)
    for _ in range(200):
        alpha, beta = 1 + 0.5 * rng.normal(size=(60, 1)), 0.3 + 0.2 * rng.normal(size=(60, 1))
        found = fit_gao("best_of_n", D, D * (alpha - beta * D) + 0.05 * rng.normal(size=(60, len(D))), draws=300)
        held += [found.alpha.low <= 1 <= found.alpha.high, found.beta.low <= 0.3 <= found.beta.high, found.peak.low <= 1 / 0.6 <= found.peak.high]
    assert (held >= 0.90 * 200).all() and (held <= 0.985 * 200).all()


def test_prompts_of_one_cluster_are_resampled_together() -> None:
    rng = np.random.default_rng(0)
    gain = D * (1 + 0.5 * rng.normal(size=(30, 1)) - 0.3 * D)
    alone = fit_gao("best_of_n", D, gain)
    copies, names = np.repeat(gain, 4, axis=0), np.repeat([f"p{i}" for i in range(30)], 4)
    together = fit_gao("best_of_n", D, copies, names)
    assert together.alpha == pytest.approx(alone.alpha, abs=0.03)
    apart = fit_gao("best_of_n", D, copies)
    assert apart.alpha.high - apart.alpha.low < 0.6 * (together.alpha.high - together.alpha.low)
    for one, four in zip(mean_gains(gain)[1:], mean_gains(copies, names)[1:], strict=True):
        assert four.mean == pytest.approx(one.mean) and four.high - four.low == pytest.approx(one.high - one.low, rel=0.15)


def test_the_second_half_of_the_way_is_looked_at_where_it_was_said() -> None:
    d = np.array([0.0, 1.0, 1.9, 4.0])
    gain = np.array([[0.0, 1.0, 3.0, 2.0], [0.0, 2.0, 5.0, 3.0], [0.0, math.nan, 9.0, 99.0]])
    assert second_half(d, gain).mean == -1.5 and mean_gains(gain)[2].mean == 4
    with pytest.raises(ValueError, match="no prompt has a gain"):
        second_half(d, gain[2:])


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="two different d above 0"):
        fit_gao("rl", [0.0, 2.0, 2.0], np.zeros((3, 3)))
    with pytest.raises(ValueError, match="gains of every prompt at every d"):
        fit_gao("rl", [0.0, 1.0, 2.0], np.zeros((3, 2)))
    with pytest.raises(ValueError, match="no prompt has a gain"):
        fit_gao("rl", [0.0, 1.0, 2.0], np.full((3, 3), math.nan))


# Many prompts


def test_a_curve_is_about_the_same_prompts_at_every_n() -> None:
    rng = np.random.default_rng(0)
    proxy = [rng.normal(size=size) for size in (8, 8, 9, 3)]
    gold = [rng.normal(size=len(each)) for each in proxy]
    proxy[2][0], gold[1][2] = math.nan, math.nan
    found = curve_of(proxy, gold, 8)
    assert found.kept.tolist() == [True, False, True, False] and (found.unscored, found.unjudged) == (1, 1) and found.n.tolist() == [1, 2, 3, 4, 6, 8]
    for row, (a, b) in enumerate([(proxy[0], gold[0]), (proxy[2][1:], gold[2][1:])]):
        expected = np.array([over_all_sets(a, b, int(n)) for n in found.n]).T
        np.testing.assert_allclose([found.proxy[row], found.gold[row]], expected - expected[:, :1], atol=1e-13)
    assert found.gold_std == pytest.approx(math.sqrt((gold[0].var(ddof=1) + gold[2][1:].var(ddof=1)) / 2))
    np.testing.assert_allclose(found.d**2, np.log(found.n) - (found.n - 1) / found.n)


def test_n_goes_by_default_to_what_nine_of_ten_prompts_have() -> None:
    proxy = [np.arange(size, dtype=float) for size in (4, *[16] * 8, 20)]
    found = curve_of(proxy, proxy)
    assert found.n.max() == 16 and found.kept.tolist() == [False, *[True] * 9]
    assert curve_of(proxy[:-1], proxy[:-1]).n.max() == 4, "eight of nine are not nine of ten"
    for few in ([[1.0]] * 5, [], [[math.nan, 1.0]]):
        with pytest.raises(ValueError, match="best of"):
            curve_of(few, few)
