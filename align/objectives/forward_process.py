"""Reinforcement on the forward process: noise a finished clip, regress its velocity, with a sign. No log-probabilities, any sampler.

Letters: B clips, C F H W latent channels/frames/height/width; u the policy's velocity, u_old that of the policy that made the clips, v = u(x0, eps, t) the
clip's own; d = u - u_old, e = u_old - v; <.,.> the mean over a clip's elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.objectives import Loss, masked_mean
from align.objectives.regression import clip_error

METRICS = {
    "forward/loss": "The signed flow-matching loss with its proximal term.",
    "forward/toward_good": "Mean over clips of -2 a <d, e>: how far the policy moved towards what was better than expected, away from what was worse.",
    "forward/drift": "Mean over clips of <d, d>: how far the policy is from the one that made the clips, unit velocity^2.",
}


def signed_flow_matching(u: Tensor, u_old: Tensor, target: Tensor, advantage: Tensor, proximal: float, *, valid: Tensor | None = None) -> Loss:
    """mean over valid clips of 2 a <d, e> + beta <d, d>; u, u_old, target [B,C,F,H,W], a [B] in [-1, 1], beta = `proximal`.

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), its policy loss with weight 1, the constant <e, e> left out, over beta. For a = 1 and beta = 1 it is flow
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
    value = masked_mean(proximal * drift - toward, valid)
    stats = {"forward/loss": value, "forward/toward_good": masked_mean(toward, valid), "forward/drift": masked_mean(drift, valid)}
    return Loss(value, {name: stat.detach() for name, stat in stats.items()})


def implicit_split(advantage: Tensor, largest: float) -> Tensor:
    """The paper's 2 q - 1 = clip(A / A_max, -1, 1), [B] -> [B]. Raises ValueError where `largest` is not positive."""
    if largest <= 0:
        raise ValueError(f"the largest advantage must be positive, got {largest}")
    return torch.clamp(advantage / largest, -1, 1)
