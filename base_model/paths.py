"""Probability paths x_t = alpha(t) x0 + sigma(t) eps and their velocities u = alpha'(t) x0 + sigma'(t) eps.

Time runs from t_max (noise) to 0 (data). `split` inverts the pair (x_t, u) without ever dividing by sigma or alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """[B] (or []) -> broadcastable against x [B, ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.dim() - coefficient.dim()))


class Path(Protocol):
    """How noise is mixed in: x_t = alpha(t) x0 + sigma(t) eps, and the velocity of that, at times t [B]."""

    @property
    def t_max(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def split(self, x_t: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x0 + t eps, u = eps - x0 (Liu et al. 2022, arXiv 2209.03003, eq. 1)."""

    t_max: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def split(self, x_t: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, u) -> (x0, eps)."""
        t = like(t, x_t)
        return x_t - t * u, x_t + (1 - t) * u


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = cos(t) x0 + sin(t) eps, so u = cos(t) eps - sin(t) x0: v-prediction (Salimans & Ho 2022, arXiv 2202.00512, appendix D)."""

    t_max: float = math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        t = like(t, x0)
        return torch.cos(t) * eps - torch.sin(t) * x0

    def split(self, x_t: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, u) -> (x0, eps): the rotation by t, undone."""
        t = like(t, x_t)
        return torch.cos(t) * x_t - torch.sin(t) * u, torch.sin(t) * x_t + torch.cos(t) * u


def add_noise(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] at t [B]."""
    return like(path.alpha(t), x0) * x0 + like(path.sigma(t), x0) * eps


def velocity_towards(path: Path, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """The velocity at x_t [B, ...], t [B] > 0 of the path that ends in x0: the noise is what x_t leaves for it."""
    eps = (x_t - like(path.alpha(t), x_t) * x0) / like(path.sigma(t), x_t)
    return path.velocity(x0, eps, t)
