"""Paths against their definitions, finite differences and the Gaussian world."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from base_model.paths import Path, RectifiedFlow, VariancePreserving, add_noise, like
from tests.worlds import PATHS, GaussianWorld


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(5, 2, 3, generator=g, dtype=torch.float64), torch.randn(5, 2, 3, generator=g, dtype=torch.float64)


def test_coefficients_are_the_published_ones() -> None:
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert_close(RectifiedFlow().alpha(t), torch.tensor([1.0, 0.75, 0.0], dtype=torch.float64))
    assert_close(RectifiedFlow().sigma(t), t)
    angle = t * math.pi / 2
    vp = VariancePreserving()
    assert_close(vp.alpha(angle).square() + vp.sigma(angle).square(), torch.ones_like(t))
    assert_close(vp.sigma(angle), torch.tensor([0.0, math.sin(math.pi / 8), 1.0], dtype=torch.float64))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_velocity_is_the_time_derivative_of_the_path(path: Path) -> None:
    x0, eps = draw()
    t, h = torch.linspace(0.1, 0.9, 5, dtype=torch.float64) * path.t_max, 1e-5
    slope = (add_noise(path, x0, eps, t + h) - add_noise(path, x0, eps, t - h)) / (2 * h)
    assert_close(path.velocity(x0, eps, t), slope, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_split_undoes_the_pair_at_both_ends_too(path: Path) -> None:
    x0, eps = draw()
    t = torch.linspace(0, 1, 5, dtype=torch.float64) * path.t_max
    assert_close(path.split(add_noise(path, x0, eps, t), path.velocity(x0, eps, t), t), (x0, eps), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_exact_velocity_of_the_world_is_the_least_squares_fit_to_samples(path: Path) -> None:
    world, t, n = GaussianWorld(path), 0.6 * path.t_max, 200_000
    g = torch.Generator().manual_seed(1)
    x0 = world.mean + world.std * torch.randn(n, generator=g, dtype=torch.float64)
    eps = torch.randn(n, generator=g, dtype=torch.float64)
    times = torch.full((n,), t, dtype=torch.float64)
    x_t, u = add_noise(path, x0, eps, times), path.velocity(x0, eps, times)
    fit = torch.linalg.lstsq(torch.stack([x_t, torch.ones_like(x_t)], 1), u).solution
    mean, std = world.marginal(t)
    print(fit, world.velocity(t))
    assert_close(fit, torch.tensor(world.velocity(t), dtype=torch.float64), atol=0.01, rtol=0)
    assert abs(float(x_t.mean()) - mean) < 0.01 and abs(float(x_t.std()) - std) < 0.01


def test_like_broadcasts_clips_and_scalars() -> None:
    x = torch.zeros(3, 2, 4)
    assert like(torch.zeros(3), x).shape == (3, 1, 1) and like(torch.tensor(0.0), x).shape == (1, 1, 1)
