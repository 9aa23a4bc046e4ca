"""A critic for denoising: V(x_t, t, c), the reward to be expected of a clip that is not finished yet, and advantages step by step from it.

The critic sees what any `VideoModel` has: latents of `model.latents.channels` channels and any size, a time, a `Conditioning`. It shares no weights with the policy.
Letters: B clips, K noisy steps of a clip in the order they were taken, C F H W latent channels/frames/height/width, L D text tokens/width, w width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool3d, silu

from align.objectives import Loss, masked_mean
from base_model.networks.layers import time_features
from base_model.types import Conditioning

METRICS = {
    "value/loss": "Half the squared error of the critic, the larger of clipped and plain, in the reward's unit squared.",
    "value/explained_variance": "1 - Var(return - V) / Var(return): 1 is a perfect critic, 0 one that knows no more than the mean, below 0 one that misleads.",
    "value/clip_share": "Share of the values that moved further than the clip range from those of the rollout.",
}

GRID = (2, 4, 4)  # frames, height and width that latents of any size are pooled to
TIME_WIDTH = 64


class Critic(nn.Module):
    """V [B], in the unit of the reward; 0 everywhere at the start. As DPOK's value function (arXiv 2305.16381), on latents pooled to a coarse grid.

    Pooled means and the standard deviation of each channel, the mean text token and sinusoids of the time are embedded, added and read by two hidden layers. Known
    failure: what pooling wipes out (texture, small things) it cannot value; then V falls back to what prompt and time tell, and GAE to a baseline a prompt.
    """

    def __init__(self, channels: int, text_width: int, *, width: int = 128, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.latents_in = nn.Linear(channels * (GRID[0] * GRID[1] * GRID[2] + 1), width)
            self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
            self.time_in = nn.Linear(TIME_WIDTH, width)
            self.hidden = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.value = nn.Linear(width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x [B,C,F,H,W]: the state x_t, or what the policy makes of it (its x0); t [B] or []; cond B -> [B]. No gradient reaches x."""
        x = x.detach().float()
        pooled = adaptive_avg_pool3d(x, GRID).flatten(1)  # [B,32C]
        spread = x.flatten(2).std(2, correction=0)  # [B,C]
        words = (cond.text.float() * cond.mask[..., None]).sum(1) / cond.mask.sum(1, keepdim=True).clamp_min(1)  # [B,D]
        hidden = self.latents_in(torch.cat([pooled, spread], 1)) + self.text_in(words) + self.time_in(time_features(t, TIME_WIDTH))  # [B,w]
        return self.value(self.hidden(silu(hidden))).squeeze(1)  # [B]


class Advantages(NamedTuple):
    """What the critic makes of the rewards of B clips."""

    advantage: Tensor  # [K,B]; 0 where not valid
    returns: Tensor  # [K,B] what the critic should have said: advantage + V; 0 where not valid
    valid: Tensor  # [B] bool; False where a reward or value of the clip is unknown


def gae(rewards: Tensor, values: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """A_k = sum_l (gamma lam)^l delta_{k+l}, delta_k = r_k + gamma V_{k+1} - V_k, V_K = 0; rewards and values [K,B] (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    rewards: `policy_gradient.step_rewards`, or 0 but for the clip's reward at the last step. The K steps are the noisy ones, the decisions of the policy:
    deterministic steps between them belong to the world. lam 1: reward minus V, unbiased whatever the critic says; lam 0: the least variance, and all of the critic's errors.
    The advantage of a step is for `ppo_clip` on that step. Raises ValueError where the shapes differ.
    """
    if rewards.shape != values.shape or rewards.dim() != 2 or not len(rewards):
        raise ValueError(f"gae needs rewards and values [K,B] of the same shape, K at least 1, got {list(rewards.shape)} and {list(values.shape)}")
    rewards, values = rewards.detach(), values.detach()
    after = torch.zeros_like(values[0])  # [B] V_{k+1}
    running = torch.zeros_like(values[0])  # [B] A_{k+1}
    advantages = []
    for reward, value in zip(rewards.flip(0), values.flip(0), strict=True):
        running = reward + gamma * after - value + gamma * lam * running  # [B]
        advantages.append(running)
        after = value
    advantage = torch.stack(advantages[::-1])  # [K,B]
    valid = (rewards.isfinite() & values.isfinite()).all(0)  # [B]
    return Advantages(advantage.where(valid, 0), (advantage + values).where(valid, 0), valid)


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip_range: float, *, valid: Tensor | None = None) -> Loss:
    """mean over valid of max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2, any shape ([B] or [K,B]), valid of that shape.

    The value term of PPO (arXiv 1707.06347, eq. 9) as its authors' code clips it (baselines; detail 9 of Huang et al. 2022, "The 37 implementation details of PPO").
    clip_range: in the reward's unit; inf for no clipping. Known failure: a range below the reward's spread keeps the critic from learning.
    Raises ValueError where clip_range is not positive.
    """
    if clip_range <= 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    valid = torch.ones_like(value, dtype=torch.bool) if valid is None else valid
    value, old_value, returns = value.where(valid, 0), old_value.detach(), returns.detach()
    moved = value - old_value
    near = old_value + moved.clamp(-clip_range, clip_range)
    loss = masked_mean(torch.maximum((value - returns).square(), (near - returns).square()) / 2, valid)
    stats = {
        "value/loss": loss,
        "value/explained_variance": explained_variance(value, returns, valid=valid),
        "value/clip_share": masked_mean((moved.abs() > clip_range).to(loss), valid),
    }
    return Loss(loss, {name: stat.detach() for name, stat in stats.items()})


def explained_variance(value: Tensor, returns: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """1 - Var(returns - value) / Var(returns) over the valid entries, any shape -> []; nan where the returns do not vary, or none is valid."""
    valid = torch.ones_like(value, dtype=torch.bool) if valid is None else valid
    if not bool(valid.any()):
        return value.new_tensor(torch.nan)
    value, returns = value.detach()[valid], returns.detach()[valid]
    spread = returns.var(correction=0)  # []
    return torch.where(spread > 0, 1 - (returns - value).var(correction=0) / spread, torch.nan)
