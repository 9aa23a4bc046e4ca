"""Analytic worlds: the "videos" are Gaussian, so the exact denoiser, velocity, marginals, KL and sampler moments are known.

Everything here is written from the definitions, without a line of `align`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from base_model.paths import Path, RectifiedFlow, VariancePreserving
from base_model.types import Conditioning, LatentSpec

RECTIFIED = RectifiedFlow()
PATHS: tuple[Path, ...] = (RECTIFIED, VariancePreserving())


@dataclass(frozen=True)
class GaussianWorld:
    """Every latent element of a clip is N(mean, std^2), independently."""

    path: Path = RECTIFIED
    mean: float = 0.4
    std: float = 0.5

    def coefficients(self, t: float) -> tuple[float, float]:
        """(alpha, sigma) at t, in Python floats, written from the definition of each path."""
        if isinstance(self.path, RectifiedFlow):
            return 1 - t, t
        return (0.0 if t == self.path.t_max else math.cos(t)), math.sin(t)

    def slopes(self, t: float) -> tuple[float, float]:
        """(alpha', sigma') at t."""
        return (-1.0, 1.0) if isinstance(self.path, RectifiedFlow) else (-math.sin(t), math.cos(t))

    def marginal(self, t: float) -> tuple[float, float]:
        """Mean and std of x_t."""
        alpha, sigma = self.coefficients(t)
        return alpha * self.mean, math.hypot(alpha * self.std, sigma)

    def denoiser(self, t: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """E[x0 | x_t] = p x_t + q and E[eps | x_t] = p' x_t + q', as ((p, q), (p', q'))."""
        alpha, sigma = self.coefficients(t)
        mean, std = self.marginal(t)
        p, p_eps = alpha * self.std**2 / std**2, sigma / std**2
        return (p, self.mean - p * mean), (p_eps, -p_eps * mean)

    def velocity(self, t: float) -> tuple[float, float]:
        """E[u | x_t] = a x_t + b, as (a, b)."""
        (p, q), (p_eps, q_eps) = self.denoiser(t)
        d_alpha, d_sigma = self.slopes(t)
        return d_alpha * p + d_sigma * p_eps, d_alpha * q + d_sigma * q_eps

    def kl(self, other: GaussianWorld) -> float:
        """KL(self || other) of the data, nats per latent element."""
        return math.log(other.std / self.std) + (self.std**2 + (self.mean - other.mean) ** 2) / (2 * other.std**2) - 0.5

    def grid(self, num_steps: int) -> list[float]:
        """Uniform in t, exact."""
        return [self.path.t_max * (num_steps - k) / num_steps for k in range(num_steps + 1)]


class _Shift(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


class GaussianModel:
    """A VideoModel whose velocity is the world's exact one plus a trainable constant. Keeps the dtype of x (float32 or float64)."""

    latents = LatentSpec(channels=1, time_stride=1, space_stride=1)

    def __init__(self, world: GaussianWorld, shift: float = 0.0) -> None:
        self.world, self.path, self.network = world, world.path, _Shift(shift)
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls += 1
        slope, offset = zip(*(self.world.velocity(float(time)) for time in t), strict=True)
        shape = (len(t),) + (1,) * (x_t.dim() - 1)
        a, b = (torch.tensor(values, dtype=x_t.dtype).reshape(shape) for values in (slope, offset))
        return a * x_t + b + self.network.value.to(x_t.dtype)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return conditions(len(prompts))

    def encode(self, video: Tensor) -> Tensor:
        return video.movedim(2, 1)[:, :1]

    def decode(self, x0: Tensor) -> Tensor:
        return x0.movedim(1, 2).expand(-1, -1, 3, -1, -1)


def conditions(n: int) -> Conditioning:
    """n empty prompts."""
    return Conditioning(("",) * n, torch.zeros(n, 1, 1), torch.ones(n, 1, dtype=torch.bool))


Rule = Callable[[GaussianWorld, float, float], tuple[float, float, float, float]]


def ancestral_rule(eta: float) -> Rule:
    """x_s = c_x0 x0 + c_eps eps + c_x x + std z, for DDIM with the posterior's std scaled by eta (DDIM eq. 12 and 16, alpha-bar = alpha^2)."""

    def rule(world: GaussianWorld, t: float, s: float) -> tuple[float, float, float, float]:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = world.coefficients(t), world.coefficients(s)
        r = alpha_t / alpha_s
        std = eta * math.sqrt(sigma_s**2 * (sigma_t**2 - r**2 * sigma_s**2) / sigma_t**2)
        return alpha_s, math.sqrt(sigma_s**2 - std**2), 0.0, std

    return rule


def cps_rule(eta: float) -> Rule:
    def rule(world: GaussianWorld, t: float, s: float) -> tuple[float, float, float, float]:
        alpha_s, sigma_s = world.coefficients(s)
        phi = eta * math.pi / 2
        return alpha_s, sigma_s * math.cos(phi), 0.0, sigma_s * math.sin(phi)

    return rule


def sde_rule(noise: Callable[[GaussianWorld, float, float], float]) -> Rule:
    """Euler-Maruyama of dx = (u - g^2/2 score) dt + g dw: x - u D - (g^2 D / 2 sigma) eps, with u = alpha' x0 + sigma' eps."""

    def rule(world: GaussianWorld, t: float, s: float) -> tuple[float, float, float, float]:
        g, delta = noise(world, t, s), t - s
        d_alpha, d_sigma = world.slopes(t)
        _, sigma = world.coefficients(t)
        return -d_alpha * delta, -d_sigma * delta - g**2 * delta / (2 * sigma), 1.0, g * math.sqrt(delta)

    return rule


def flow_noise(a: float) -> Callable[[GaussianWorld, float, float], float]:
    def g(world: GaussianWorld, t: float, s: float) -> float:
        alpha, sigma = world.coefficients(t)
        if alpha == 0:
            alpha, _ = world.coefficients(s)
        return a * math.sqrt(sigma / alpha)

    return g


def clipped(noise: Callable[[GaussianWorld, float, float], float], max_std: float) -> Callable[[GaussianWorld, float, float], float]:
    """g so small that g sqrt(t - s) is at most `max_std` (LongCat-Video)."""
    return lambda world, t, s: min(noise(world, t, s), max_std / math.sqrt(t - s))


def affine(world: GaussianWorld, rule: Rule, t: float, s: float) -> tuple[float, float, float]:
    """One step with the exact velocity: x_s = A x_t + b + std z, as (A, b, std)."""
    (p, q), (p_eps, q_eps) = world.denoiser(t)
    c_x0, c_eps, c_x, std = rule(world, t, s)
    return c_x0 * p + c_eps * p_eps + c_x, c_x0 * q + c_eps * q_eps, std


def pull(world: GaussianWorld, rule: Rule, t: float, s: float) -> float:
    """d mean / d u of one step: x = alpha x0 + sigma eps and u = alpha' x0 + sigma' eps, solved for d(x0, eps) / d u by Cramer's rule."""
    (alpha, sigma), (d_alpha, d_sigma) = world.coefficients(t), world.slopes(t)
    c_x0, c_eps, _, _ = rule(world, t, s)
    return (c_x0 * -sigma + c_eps * alpha) / (alpha * d_sigma - sigma * d_alpha)


def sampler_moments(
    world: GaussianWorld, rule: Rule, times: Sequence[float], *, noisy: Sequence[int] | None = None, shifts: Sequence[float] | None = None
) -> list[tuple[float, float]]:
    """Mean and std after each step from N(0, 1): the closed-form recursion. ODE steps but for `noisy` (default all but the last); shifts: added to each step's velocity."""
    mean, variance, out = 0.0, 1.0, []
    noisy = range(len(times) - 2) if noisy is None else noisy
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        here = rule if k in noisy else ancestral_rule(0.0)
        A, b, std = affine(world, here, t, s)
        mean, variance = A * mean + b + (pull(world, here, t, s) * shifts[k] if shifts else 0.0), A**2 * variance + std**2
        out.append((mean, math.sqrt(variance)))
    return out


def expected_reward(world: GaussianWorld, rule: Rule, times: Sequence[float], noisy: Sequence[int], shifts: Sequence[float]) -> float:
    """E[-(x0 - 1)^2] of the finished clips."""
    mean, std = sampler_moments(world, rule, times, noisy=noisy, shifts=shifts)[-1]
    return -((mean - 1) ** 2) - std**2


def reward_gradient(world: GaussianWorld, rule: Rule, times: Sequence[float], noisy: Sequence[int]) -> list[float]:
    """d E[-(x0 - 1)^2] / d shift of each step, by central differences, exact because the reward is quadratic in them."""
    steps = range(len(times) - 1)
    ends = [[expected_reward(world, rule, times, noisy, [h * (j == k) for j in steps]) for h in (0.5, -0.5)] for k in steps]
    return [high - low for high, low in ends]
