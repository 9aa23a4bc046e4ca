"""Grids and densities against their formulas and against scipy's logit-normal quantiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from base_model.paths import Path, RectifiedFlow, VariancePreserving
from base_model.times import log_ratio, logit_normal, quantile_times, sampling_times, shift_time, square_root_shift, stratified_logit_normal, time_at
from tests.worlds import PATHS

RF = RectifiedFlow()
VP = VariancePreserving()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_grid_goes_from_noise_to_exactly_zero_and_decreases(path: Path) -> None:
    for shift in (1.0, 3.0, 0.2):
        times = sampling_times(path, 8, shift=shift)
        assert times.shape == (9,) and times.dtype == torch.float32
        assert times[0] == torch.tensor(path.t_max) and times[-1] == 0 and bool((times.diff() < 0).all())
    assert_close(sampling_times(path, 4), torch.linspace(path.t_max, 0, 5), atol=1e-7, rtol=0)


def test_a_shift_on_the_rectified_path_is_sd3s_formula() -> None:
    t = torch.linspace(0, 1, 11)
    assert_close(shift_time(RF, t, 3.0), 3 * t / (1 + 2 * t), atol=1e-7, rtol=0)
    assert_close(sampling_times(RF, 10, shift=3.0), (3 * t / (1 + 2 * t)).flip(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_shift_multiplies_the_noise_ratio_on_every_path(path: Path) -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64) * path.t_max
    moved = shift_time(path, t, 2.5).double()
    assert_close(path.sigma(moved) / path.alpha(moved), 2.5 * path.sigma(t) / path.alpha(t), atol=0, rtol=1e-5)
    assert_close(time_at(path, log_ratio(path, t)), t, atol=1e-12, rtol=0)


def test_shifts_compose_and_one_changes_nothing() -> None:
    t = torch.linspace(0, 1, 7)
    assert_close(shift_time(RF, shift_time(RF, t, 2.0), 3.0), shift_time(RF, t, 6.0), atol=1e-6, rtol=0)
    assert_close(shift_time(VP, t, 1.0), t, atol=1e-7, rtol=0)


def test_each_clip_may_have_its_own_grid() -> None:
    grid = sampling_times(RF, 8, shift=torch.tensor([1.0, 3.0]))
    assert grid.shape == (9, 2)
    assert_close(grid[:, 0], sampling_times(RF, 8), rtol=0, atol=0)
    assert_close(grid[:, 1], sampling_times(RF, 8, shift=3.0), rtol=0, atol=0)


def test_logit_normal_shifted_by_s_is_logit_normal_of_log_s() -> None:
    """The same noise, shifted by the formula, and scipy's distribution function."""
    plain, shifted = (logit_normal(RF, 20_000, shift=s, generator=seeded()).double() for s in (1.0, 3.0))
    assert_close(shifted, 3 * plain / (1 + 2 * plain), atol=1e-6, rtol=0)
    p = stats.kstest(torch.logit(shifted).numpy(), stats.norm(math.log(3), 1).cdf).pvalue
    print("p =", p)
    assert p > 0.01
    angle = logit_normal(VP, 20_000, shift=3.0, generator=seeded()).double()
    assert_close(torch.tan(angle), shifted / (1 - shifted), atol=0, rtol=1e-4)


def test_stratified_times_have_one_draw_in_each_stratum_in_random_order() -> None:
    t = stratified_logit_normal(RF, 64, shift=2.0, generator=seeded()).double().numpy()
    share = stats.norm(math.log(2), 1).cdf(np.log(t / (1 - t)))
    assert sorted((share * 64).astype(int)) == list(range(64))
    assert abs(stats.spearmanr(t, np.arange(64)).statistic) < 0.3


def test_stratified_times_are_logit_normal_one_by_one_and_have_a_steadier_mean() -> None:
    g = seeded(1)
    batches = torch.stack([stratified_logit_normal(RF, 8, generator=g) for _ in range(1000)])
    p = stats.kstest(torch.logit(batches[:, 3].double()).numpy(), stats.norm(0, 1).cdf).pvalue
    loose = torch.stack([logit_normal(RF, 8, generator=g) for _ in range(1000)])
    print("p =", p, "std of the batch mean", batches.mean(1).std(), loose.mean(1).std())
    assert p > 0.01 and batches.mean(1).std() < 0.25 * loose.mean(1).std()


def test_quantile_times_are_scipys_quantiles() -> None:
    want = stats.norm(math.log(3), 1).ppf((np.arange(10) + 0.5) / 10)
    assert_close(quantile_times(RF, 10, shift=3.0), torch.tensor(1 / (1 + np.exp(-want)), dtype=torch.float32), atol=1e-7, rtol=0)
    assert quantile_times(RF, 10, shift=torch.tensor([1.0, 3.0])).shape == (10, 2)


def test_each_clip_may_have_its_own_shift_in_training() -> None:
    shift = torch.tensor([1.0, 3.0, 5.0])
    plain = logit_normal(RF, 3, generator=seeded())
    assert_close(logit_normal(RF, 3, shift=shift, generator=seeded()), shift * plain / (1 + (shift - 1) * plain), atol=1e-6, rtol=0)


def test_the_shift_of_a_clip_follows_the_square_root_of_its_own_tokens() -> None:
    shift = square_root_shift(torch.tensor([64, 256, 16]), reference_shift=3.0, reference_tokens=64)
    assert_close(shift, torch.tensor([3.0, 6.0, 1.5], dtype=torch.float64))
    t = logit_normal(RF, 60_000, shift=shift.repeat(20_000), generator=seeded()).double().unflatten(0, (-1, 3))  # each of a pack of three, many times
    medians = torch.logit(t).median(0).values
    assert_close(medians, shift.log(), atol=0.03, rtol=0)
    even = stratified_logit_normal(RF, 3, shift=shift, generator=seeded()).double()
    plain = stratified_logit_normal(RF, 3, generator=seeded()).double()
    assert_close(torch.logit(even), torch.logit(plain) + shift.log(), atol=1e-5, rtol=0)


def test_wrong_arguments_are_refused() -> None:
    for tokens, reference in (([64, 0], 64), ([64], 0)):
        with pytest.raises(ValueError, match="must be positive"):
            square_root_shift(torch.tensor(tokens), reference_shift=3.0, reference_tokens=reference)
    with pytest.raises(ValueError, match="shift must be positive"):
        shift_time(RF, torch.tensor(0.5), 0.0)
    with pytest.raises(ValueError, match="num_steps"):
        sampling_times(RF, 0)
    with pytest.raises(ValueError, match="no inverse schedule"):
        time_at(RectifiedFlow(t_max=2.0), torch.tensor(0.0))
