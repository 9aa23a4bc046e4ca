import math

import numpy as np
import pytest
import scipy.stats

from recipes.statistics import (
    UNKNOWN,
    Interval,
    bootstrap_crossed,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_prompts,
    bootstrap_ratio,
    clopper_pearson,
    pool_prompts,
)


def shares(n: int, seed: int = 0, p: float = 0.6) -> np.ndarray:
    return np.random.default_rng(seed).binomial(4, p, n) / 4


def test_the_bootstrap_agrees_with_scipys_percentile_bootstrap() -> None:
    values = shares(80)
    rng = np.random.default_rng(1)
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    ours = bootstrap_mean(values, draws=20_000)
    assert ours.mean == values.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)  # Monte Carlo error of either quantile: about 0.001


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_prompts() -> None:
    values = shares(2_000)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert bootstrap_mean(values)[1:] == pytest.approx((values.mean() - half, values.mean() + half), abs=0.0015)


def test_95_percent_intervals_cover_the_truth_about_95_times_in_100() -> None:
    covered = [low <= 0.6 <= high for seed in range(400) for _, low, high in [bootstrap_mean(shares(60, seed), draws=400)]]
    assert 0.91 <= np.mean(covered) <= 0.98  # percentile bootstrap at 60 prompts: about 0.94; three standard errors are 0.033


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_a_paired_difference_is_narrower_than_the_difference_of_two_means() -> None:
    before = shares(100)
    after = np.clip(before + 0.1, 0, 1)
    paired = bootstrap_difference(after, before)
    assert paired.mean == pytest.approx((after - before).mean())
    assert paired.high - paired.low < 0.3 * (bootstrap_mean(after).high - bootstrap_mean(after).low)


def test_a_paired_difference_agrees_with_scipys_paired_bootstrap() -> None:
    before, after = shares(60, 1, 0.5), shares(60, 2, 0.7)

    def gain(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis=axis) - b.mean(axis=axis)

    rng = np.random.default_rng(5)
    theirs = scipy.stats.bootstrap((after, before), gain, paired=True, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    ours = bootstrap_difference(after, before)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_a_ratio_of_a_constant_multiple_has_no_width() -> None:
    values = shares(50) + 0.5
    assert bootstrap_ratio(0.8 * values, values) == pytest.approx((0.8, 0.8, 0.8))


def test_a_ratio_over_a_mean_that_can_be_zero_is_unknown() -> None:
    assert all(math.isnan(number) for number in bootstrap_ratio([1.0, 1.0], [0.0, 1.0]))


def test_unknown_prompts_are_left_out_in_pairs() -> None:
    assert bootstrap_mean([1.0, math.nan, 1.0]) == (1.0, 1.0, 1.0)
    assert bootstrap_difference([1.0, math.nan, 1.0], [0.5, 0.0, math.nan]) == (0.5, 0.5, 0.5)


def test_nothing_measured_is_unknown_and_null_in_json() -> None:
    assert bootstrap_mean([]).as_json() == {"mean": None, "low": None, "high": None}
    assert clopper_pearson(0, 0).as_json() == {"mean": None, "low": None, "high": None}
    assert Interval(0.5, 0.25, 0.75).as_json() == {"mean": 0.5, "low": 0.25, "high": 0.75}


@pytest.mark.parametrize(("hits", "trials"), [(0, 1_000), (7, 1_000), (13, 20), (20, 20), (1, 1)])
def test_clopper_pearson_agrees_with_scipys_exact_binomial_test(hits: int, trials: int) -> None:
    theirs = scipy.stats.binomtest(hits, trials).proportion_ci(0.95, method="exact")
    assert clopper_pearson(hits, trials) == pytest.approx((hits / trials, theirs.low, theirs.high), abs=1e-12)


def test_clopper_pearson_of_no_hit_has_the_closed_form_of_the_rule_of_three() -> None:
    assert clopper_pearson(0, 1_000).high == pytest.approx(1 - 0.025 ** (1 / 1_000), abs=1e-12)
    with pytest.raises(ValueError, match="3 hits of 2 trials"):
        clopper_pearson(3, 2)


def test_pooling_seeds_keeps_one_value_a_prompt() -> None:
    pooled = pool_prompts([{"a": 0.0, "b": 1.0, "c": math.nan}, {"a": 1.0, "c": math.nan}])
    assert pooled["a"] == 0.5 and pooled["b"] == 1.0 and math.isnan(pooled["c"])


def test_values_must_be_one_per_prompt() -> None:
    with pytest.raises(ValueError, match="one value per prompt"):
        bootstrap_mean(np.zeros((3, 4)))


def test_the_crossed_bootstrap_is_the_plain_one_for_one_training_and_wider_where_trainings_differ() -> None:
    rng = np.random.default_rng(0)
    one = rng.random((1, 80))
    assert bootstrap_crossed(one, draws=4_000)[1:] == pytest.approx(bootstrap_mean(one[0], draws=4_000)[1:], abs=0.006)
    apart = one + np.array([[-0.3], [0.0], [0.3]])
    wide, same = bootstrap_crossed(apart), bootstrap_crossed(np.repeat(one, 3, axis=0))
    assert wide.mean == pytest.approx(same.mean) and wide.high - wide.low > 3 * (same.high - same.low)
    holes = np.array([[1.0, np.nan, 0.0], [np.nan, np.nan, 1.0]])
    assert bootstrap_crossed(holes).mean == pytest.approx(2 / 3)
    assert all(np.isnan(bootstrap_crossed(np.full((2, 3), np.nan))))
    with pytest.raises(ValueError, match="trainings x prompts"):
        bootstrap_crossed([1.0, 2.0])


def test_a_statistic_of_clips_is_resampled_by_prompts_and_not_by_clips() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 6)
    values = rng.normal(size=40)[prompts] + 0.01 * rng.normal(size=240)
    found = bootstrap_prompts(lambda rows: float(values[rows].mean()), prompts, draws=2000)
    by_prompt = bootstrap_mean(values.reshape(40, 6).mean(1))
    assert found.mean == pytest.approx(by_prompt.mean)
    assert found.high - found.low == pytest.approx(by_prompt.high - by_prompt.low, rel=0.1)
    assert found.high - found.low > 2 * (lambda each: each.high - each.low)(bootstrap_mean(values)), "clips of one prompt are not independent"
    assert found == bootstrap_prompts(lambda rows: float(values[rows].mean()), prompts, draws=2000)
    assert bootstrap_prompts(lambda rows: math.nan, prompts) is UNKNOWN
    sizes = []
    bootstrap_prompts(lambda rows: sizes.append(len(rows)) or 1.0, [0, 0, 0, 1], draws=50)
    assert sizes[0] == 4 and {2, 4, 6} == set(sizes[1:]), "a prompt comes with all its clips"
