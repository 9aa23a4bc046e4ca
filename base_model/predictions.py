"""What a network may predict instead of the velocity: x0, eps, or the angular v, as parametrisations of one path.

With x_t known, any two of (x_t, x0, eps, u, v) fix the rest, so a prediction is a change of variables and its loss a weighted u-loss: nothing else differs.
v = cos(phi) eps - sin(phi) x0 with tan(phi) = sigma / alpha (Salimans & Ho 2022, arXiv 2202.00512, appendix D) exists on every path and is u itself on the
variance-preserving one. Letters: B clips, S segments, N packed tokens, c values of a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from base_model.networks.packing import Segments
from base_model.networks.routing import Route
from base_model.paths import Path, like

Prediction = Literal["u", "x0", "eps", "v"]
ROUNDING = 1e-6  # an alpha or sigma below it is a rounded 0: cos(pi/2) is -4e-8 in float32


def to_pair(path: Path, prediction: Tensor, x_t: Tensor, t: Tensor, *, kind: Prediction) -> tuple[Tensor, Tensor]:
    """(prediction, x_t) [B, ...] at t [B] -> (x0, eps), the pair that both agree on.

    Predicting eps says nothing of x0 where alpha is 0, nor x0 of eps where sigma is 0: there the other one is 0, its mean. Close to these ends errors are divided by alpha or
    sigma; u and v never divide.
    """
    alpha, sigma = like(path.alpha(t), x_t), like(path.sigma(t), x_t)
    if kind == "u":
        return path.split(x_t, prediction, t)
    if kind == "x0":
        return prediction, _quotient(x_t - alpha * prediction, sigma)
    if kind == "eps":
        return _quotient(x_t - sigma * prediction, alpha), prediction
    radius = torch.hypot(alpha, sigma)
    cos, sin, on_circle = alpha / radius, sigma / radius, x_t / radius
    return cos * on_circle - sin * prediction, sin * on_circle + cos * prediction


def from_pair(path: Path, x0: Tensor, eps: Tensor, t: Tensor, *, kind: Prediction) -> Tensor:
    """What a network of this kind should say about (x0, eps) [B, ...] at t [B]."""
    if kind == "u":
        return path.velocity(x0, eps, t)
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    alpha, sigma = like(path.alpha(t), x0), like(path.sigma(t), x0)
    return (alpha * eps - sigma * x0) / torch.hypot(alpha, sigma)


def convert(path: Path, prediction: Tensor, x_t: Tensor, t: Tensor, *, kind: Prediction, to: Prediction) -> Tensor:
    """The same belief about x_t [B, ...] at t [B] as a prediction of another kind."""
    return prediction if kind == to else from_pair(path, *to_pair(path, prediction, x_t, t, kind=kind), t, kind=to)


def loss_ratio(path: Path, t: Tensor, *, kind: Prediction) -> Tensor:
    """(squared error of a prediction of this kind) / (squared error of u) at t: sigma^2 for x0, alpha^2 for eps, alpha^2 + sigma^2 for v.

    Since x_t is known, alpha dx0 = -sigma deps; and alpha sigma' - sigma alpha' = 1 on both our paths, so du = -dx0 / sigma = deps / alpha.
    On the rectified path that is sigma^2, (1 - sigma)^2 and their sum. Weight the u-loss with it to train on the other loss.
    """
    alpha, sigma = path.alpha(t).square(), path.sigma(t).square()
    return {"u": torch.ones_like(alpha), "x0": sigma, "eps": alpha, "v": alpha + sigma}[kind]


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 (its gradient too) where `below` is a rounded 0."""
    nothing = below.abs() < ROUNDING
    return torch.where(nothing, 0, above / torch.where(nothing, 1, below))


class Velocity(nn.Module):
    """A network on packed tokens that predicts `kind`, as one that predicts its path's velocity: the only convention that recipes and samplers know.

    Called like `networks.dit.DiT`; converts in float32. Save and load `network`, not this.
    """

    def __init__(self, network: nn.Module, path: Path, kind: Prediction) -> None:
        super().__init__()
        self.network, self.path, self.kind = network, path, kind

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, route: Route | None = None) -> Tensor:
        prediction = self.network(tokens, positions, segments, t, text, text_segments, route)  # [N,c]
        t_token = t if len(t) == len(tokens) else segments.spread(t)  # [N]
        return convert(self.path, prediction.float(), tokens.float(), t_token.float(), kind=self.kind, to="u")  # [N,c]
