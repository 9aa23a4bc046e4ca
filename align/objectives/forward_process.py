"""Reinforcement on the forward process: noise a finished clip, regress its velocity, with a sign. No log-probabilities, any sampler.

One objective, `signed_flow_matching`, and the one factor by which each published method differs from it:

    DiffusionNFT, weight 1   the objective itself, in value (less a constant, over beta)
    RWR                      a = 1, beta = 1, weight from `rwr_weight`: in value, less a constant
    DiffusionNFT, adaptive   a and weight from `nft_split`: in gradient, at every theta
    AWM                      weight w(t): in gradient at theta = theta_old; in full it is `ppo_clip` of `matching_log_prob`
    DGPO                     weight from `dgpo_weight`: in gradient at theta = theta_old; in full it is `flow_matching` with weight times A

Letters: B clips, C F H W latent channels/frames/height/width; u the policy's velocity, u_old that of the policy that made the clips, v = u(x0, eps, t) the
clip's own; d = u - u_old, e = u_old - v; <.,.> the mean over a clip's elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align.advantage import Groups, grouping
from align.objectives import Loss, masked_mean
from align.objectives.regression import clip_error

METRICS = {
    "forward/loss": "The signed flow-matching loss with its proximal term.",
    "forward/toward_good": "Mean over clips of -2 a <d, e>: how far the policy moved towards what was better than expected, away from what was worse.",
    "forward/drift": "Mean over clips of <d, d>: how far the policy is from the one that made the clips, unit velocity^2.",
}


def signed_flow_matching(
    u: Tensor, u_old: Tensor, target: Tensor, advantage: Tensor, proximal: float, *, weight: Tensor | None = None, valid: Tensor | None = None
) -> Loss:
    """mean over valid clips of weight (2 a <d, e> + beta <d, d>); u, u_old, target [B,C,F,H,W], a [B] in [-1, 1], beta = `proximal`, weight [B].

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117, eq. 5), its policy loss with weight 1, the constant <e, e> left out, over beta. For a = 1 and beta = 1 it is flow
    matching on the clip (up to that constant); for a = -1 the minimum lies as far on the other side of u_old. Known failure: a small beta lets the policy
    run away from clips it disliked, in directions nobody looked at. Raises ValueError where proximal is not positive.
    """
    if proximal <= 0:
        raise ValueError(f"proximal must be positive, got {proximal}")
    a = advantage.detach() if valid is None else advantage.detach().where(valid, 0)  # [B]
    u_old, target = u_old.detach().float(), target.float()
    moved = u.float() - u_old  # [B,C,F,H,W]
    toward = -2 * a * (moved * (u_old - target)).flatten(1).mean(1)  # [B]
    drift = clip_error(u, u_old)  # [B]
    loss = proximal * drift - toward  # [B]
    value = masked_mean(loss if weight is None else loss * weight.detach(), valid)
    stats = {"forward/loss": value, "forward/toward_good": masked_mean(toward, valid), "forward/drift": masked_mean(drift, valid)}
    return Loss(value, {name: stat.detach() for name, stat in stats.items()})


def implicit_split(advantage: Tensor, largest: float) -> Tensor:
    """2 q - 1 = clip(A / A_max, -1, 1), [B] -> [B] (DiffusionNFT, arXiv 2509.16117, section 3.3: its optimality reward is q). Raises ValueError where `largest` is not positive."""
    if largest <= 0:
        raise ValueError(f"the largest advantage must be positive, got {largest}")
    return torch.clamp(advantage / largest, -1, 1)


class Split(NamedTuple):
    """How good a clip counts as, and how much it counts."""

    advantage: Tensor  # [B] in [-1, 1]
    weight: Tensor  # [B]


def nft_split(u: Tensor, u_old: Tensor, target: Tensor, advantage: Tensor, proximal: float, sigma: Tensor, *, floor: float = 1e-5) -> Split:
    """DiffusionNFT's adaptive weights as another advantage and weight of `signed_flow_matching`; u, u_old, target [B,C,F,H,W], advantage (a) and sigma [B].

    The paper divides the error of the good policy's x0 by w+ = <|x0+ - x0|>, that of the bad one's by w-, both without gradient and at least `floor`; x0+- - x0 is
    -sigma (e +- beta d), for both paths here. With q = (1 + a)/2, p = q/w+ and n = (1 - q)/w- that is the signed objective with a' = (p - n)/(p + n) and weight
    sigma^2 (p + n): the same gradient at every theta, and at theta_old a' = a, weight = sigma^2/w. (arXiv 2509.16117, section 3.3, adaptive loss weighting.)
    Known failure: a clip the policy already fits weighs without bound, up to sigma^2/floor.
    """
    u, u_old, target = u.detach().float(), u_old.detach().float(), target.float()
    push, error = proximal * (u - u_old), u_old - target  # [B,C,F,H,W] each
    far_good = (sigma * (error + push).abs().flatten(1).mean(1)).clamp_min(floor)  # [B] w+
    far_bad = (sigma * (error - push).abs().flatten(1).mean(1)).clamp_min(floor)  # [B] w-
    good, bad = (1 + advantage) / 2 / far_good, (1 - advantage) / 2 / far_bad  # [B] each
    return Split((good - bad) / (good + bad), sigma.square() * (good + bad))


def matching_log_prob(error: Tensor, weight: Tensor | float = 1.0, *, power: float = 1.0) -> Tensor:
    """AWM's stand-in for a log-probability: -weight error^power / power, error [B] from `clip_error` -> [B] (arXiv 2509.25050).

    AWM is `ppo_clip(matching_log_prob(error), matching_log_prob(old_error), A, 1e-5)` with the same t and eps for both; its gradient at theta_old is that of
    `signed_flow_matching` with this weight. weight: 1, t or t^2; power 0.25 with weight t is the code's "ghuber". Known failure: no density and no nats: the ratio of two of
    these is no importance ratio, and its clip range has a unit of its own.
    """
    return -weight * error.pow(power) / power


def dgpo_weight(error: Tensor, reference_error: Tensor, advantage: Tensor, groups: Groups, beta: float, *, valid: Tensor | None = None) -> Tensor:
    """DGPO's weight of each group: sigmoid(beta mean over its valid clips of A (error - reference_error)), all [B] -> [B] without gradient (arXiv 2510.08425, eq. 17).

    DGPO is `flow_matching(error, weight=dgpo_weight(...) * A)`: the gradient, over beta, of -log sigmoid(-beta mean A (error - reference_error)). It is 1/2 where policy
    and reference agree, and falls to 0 for a group whose order is learned. beta: on errors that are means over elements (10-100 there). All clips of a group
    share t and eps. Known failure: a large beta turns it into a switch, and groups that are learned teach nothing.
    """
    margin = (advantage * (error - reference_error)).detach()  # [B]
    cells = grouping(margin, groups)
    table = cells.fill(margin if valid is None else margin.where(valid, torch.nan))  # [N,G]
    return torch.sigmoid(beta * cells.read(table.nanmean(1, keepdim=True).nan_to_num(0)))  # [B]


def rwr_weight(reward: Tensor, temperature: float) -> Tensor:
    """Reward-weighted regression: exp(reward / temperature), scaled to mean 1 over the known rewards, [B] -> [B]; 0 where the reward is unknown.

    Peters & Schaal 2007; for diffusion Lee et al. 2023 (arXiv 2302.12192) and Flow-RWR (arXiv 2501.13918, eq. 9). For `flow_matching(error, weight=...)`. Known failure: it only
    ever imitates; with a low temperature a few lucky clips, with a high one the average. Raises ValueError where temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    known = reward.isfinite()  # [B]
    share = torch.softmax((reward / temperature).where(known, -torch.inf), 0)  # [B]
    return (share * known.sum()).where(known, 0)


def old_policy_decay(iteration: int, *, flat: int = 0, rate: float = 0.001, largest: float = 0.5) -> float:
    """How much of the old policy stays after iteration 0, 1, ...: min(rate max(0, iteration - flat), largest) (DiffusionNFT, arXiv 2509.16117, section 3.3 and figure 8).

    u_old <- decay u_old + (1 - decay) u, by `base_model.lora.ShadowAdapter.follow(1 - decay)`. The other published schedule is flat 75, rate 0.0075, largest 0.999.
    """
    return min(rate * max(0, iteration - flat), largest)
