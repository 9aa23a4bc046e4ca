"""Predictions against their definitions in float64: round trips, both ends of the path, weights of losses, and a wrapped network."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from base_model.networks.packing import Segments
from base_model.paths import Path, RectifiedFlow, VariancePreserving, add_noise
from base_model.predictions import Prediction, Velocity, convert, from_pair, loss_ratio, to_pair
from tests.worlds import PATHS, GaussianWorld

KINDS: tuple[Prediction, ...] = get_args(Prediction)
EACH_PATH = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def draw(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, 3, 4, generator=g, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64) * path.t_max
    return x0, eps, t, add_noise(path, x0, eps, t)


def test_a_rectified_path_in_closed_form() -> None:
    x0, eps, t, x_t = draw(RectifiedFlow())
    s, u = t[:, None, None], eps - x0
    angle = torch.atan2(s, 1 - s)
    wanted: dict[Prediction, Tensor] = {"u": u, "x0": x_t - s * u, "eps": x_t + (1 - s) * u, "v": angle.cos() * eps - angle.sin() * x0}
    for a, b in itertools.product(KINDS, KINDS):
        assert_close(convert(RectifiedFlow(), wanted[a], x_t, t, kind=a, to=b), wanted[b], atol=1e-12, rtol=1e-12)


def test_a_variance_preserving_path_in_closed_form() -> None:
    x0, eps, t, x_t = draw(VariancePreserving())
    cos, sin = t.cos()[:, None, None], t.sin()[:, None, None]
    v = cos * eps - sin * x0
    wanted: dict[Prediction, Tensor] = {"u": v, "v": v, "x0": cos * x_t - sin * v, "eps": sin * x_t + cos * v}
    for a, b in itertools.product(KINDS, KINDS):
        assert_close(convert(VariancePreserving(), wanted[a], x_t, t, kind=a, to=b), wanted[b], atol=1e-12, rtol=1e-12)


def test_v_means_the_same_on_both_paths_at_the_same_noise_ratio() -> None:
    x0, eps, t, _ = draw(RectifiedFlow())
    angle = torch.atan2(t, 1 - t)
    assert_close(from_pair(RectifiedFlow(), x0, eps, t, kind="v"), from_pair(VariancePreserving(), x0, eps, angle, kind="v"), atol=1e-12, rtol=1e-12)


@EACH_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_prediction_comes_back_too_and_stays_on_the_state(path: Path, kind: Prediction) -> None:
    """Any prediction, not only a right one, is a pair (x0, eps) that makes x_t."""
    _, _, t, x_t = draw(path)
    wild = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0, eps = to_pair(path, wild, x_t, t, kind=kind)
    assert_close(add_noise(path, x0, eps, t), x_t, atol=1e-12, rtol=1e-12)
    for other in KINDS:
        there = convert(path, wild, x_t, t, kind=kind, to=other)
        assert_close(convert(path, there, x_t, t, kind=other, to=kind), wild, atol=1e-11, rtol=1e-11)


@EACH_PATH
def test_losses_are_weighted_losses_of_the_velocity(path: Path) -> None:
    x0, eps, t, x_t = draw(path)
    u = path.velocity(x0, eps, t)
    wrong = u + torch.randn(u.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u_loss = (wrong - u).square().mean((1, 2))  # [B]
    for kind in KINDS:
        loss = (convert(path, wrong, x_t, t, kind="u", to=kind) - convert(path, u, x_t, t, kind="u", to=kind)).square().mean((1, 2))
        assert_close(loss, loss_ratio(path, t, kind=kind) * u_loss, atol=1e-12, rtol=1e-12)
    if isinstance(path, RectifiedFlow):
        assert_close(loss_ratio(path, t, kind="x0"), t**2)
        assert_close(loss_ratio(path, t, kind="eps"), (1 - t) ** 2)
        assert_close(loss_ratio(path, t, kind="v"), (1 - t) ** 2 + t**2)


@EACH_PATH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_ends_the_half_that_is_not_told_is_its_mean(path: Path, dtype: torch.dtype) -> None:
    x0, eps, _, _ = (x.to(dtype) for x in draw(path))
    end, start = torch.full((7,), path.t_max, dtype=dtype), torch.zeros(7, dtype=dtype)
    assert to_pair(path, eps, add_noise(path, x0, eps, end), end, kind="eps")[0].abs().max() == 0
    assert to_pair(path, x0, add_noise(path, x0, eps, start), start, kind="x0")[1].abs().max() == 0
    for t in (end, start):
        x_t = add_noise(path, x0, eps, t)
        for kind in ("u", "v"):
            assert_close(to_pair(path, from_pair(path, x0, eps, t, kind=kind), x_t, t, kind=kind), (x0, eps), atol=1e-6, rtol=1e-6)
        guess = eps.clone().requires_grad_()
        convert(path, guess, x_t, t, kind="eps", to="u").sum().backward()
        assert guess.grad is not None and bool(guess.grad.isfinite().all())


# A network that predicts something else


class Exact(nn.Module):
    """The best prediction of a Gaussian world, [N,1], as a network on packed tokens."""

    def __init__(self, world: GaussianWorld, kind: Prediction) -> None:
        super().__init__()
        self.world, self.kind = world, kind

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, route: object = None) -> Tensor:
        level = t if len(t) == len(tokens) else segments.spread(t)
        rows = []
        for x, at in zip(tokens, level.tolist(), strict=True):
            (p, q), (p_eps, q_eps) = self.world.denoiser(at)
            x0, eps, (a, b) = p * x + q, p_eps * x + q_eps, self.world.velocity(at)
            alpha, sigma = self.world.coefficients(at)
            rows.append({"x0": x0, "eps": eps, "u": a * x + b, "v": (alpha * eps - sigma * x0) / math.hypot(alpha, sigma)}[self.kind])
        return torch.stack(rows)


@EACH_PATH
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_network_gives_the_exact_velocity_of_the_gaussian_world(path: Path, kind: Prediction) -> None:
    world, segments = GaussianWorld(path), Segments((2, 3))
    tokens = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    arguments = tokens, torch.zeros(5, 3), segments
    for t in (torch.tensor([0.3, 0.8]) * path.t_max, torch.tensor([0.1, 0.4, 0.5, 0.7, 0.9]) * path.t_max):
        u = Velocity(Exact(world, kind), path, kind)(*arguments, t, torch.zeros(2, 1), Segments((1, 1)))
        assert_close(u, Exact(world, "u")(*arguments, t, torch.zeros(2, 1), Segments((1, 1))), atol=1e-5, rtol=1e-5)
