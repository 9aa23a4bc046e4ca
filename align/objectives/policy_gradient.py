"""Policy gradients on Gaussian denoising steps: DDPO, PPO and GRPO all end here; they differ in the kernel and in the advantage.

Log-probabilities are nats PER LATENT ELEMENT, so the ratio below is the true density ratio to the power 1/D, D latent elements a clip.
A clip range c means +-c D nats on the true ratio and does not transfer between resolutions or frame counts; log the KL, per element and
total, beside it.
Letters: B clips.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.objectives import Loss, masked_mean

METRICS = {
    "policy/loss": "The clipped policy-gradient loss of the replayed steps, before any added term.",
    "policy/ratio": "Mean over clips of rho, the density ratio of new to old policy to the power 1/D; 1 before the first update.",
    "policy/clip_share": "Share of clips whose rho is outside 1 +- the clip range.",
    "policy/approx_kl": "Mean of -log rho, an unbiased estimate of KL(old policy, new policy) in nats per latent element; can be negative by chance.",
}


def ppo_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Loss:
    """mean over valid clips of weight * max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(log_prob - old_log_prob). All [B].

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, negated to be minimised; DDPO-IS (arXiv 2305.13301), section 4.3, with clipping.
    weight: `kernels.step_weight`. With a single update per rollout rho is 1 and the gradient is REINFORCE's. Known failure: for a total
    KL above about 2 nats almost every rho is below 1, so positive samples are never clipped while negative ones lose their gradient.
    policy/approx_kl is the mean of -log rho, unbiased for KL(old, new) in nats per latent element; the usual rho - 1 - log rho would be off
    by a factor of about D, because rho is a D-th root. Raises ValueError where clip_range is not positive.
    """
    if clip_range <= 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    valid = torch.ones_like(log_prob, dtype=torch.bool) if valid is None else valid
    advantage = advantage.detach().where(valid, 0)  # [B]
    log_ratio = (log_prob - old_log_prob.detach()).where(valid, 0)  # [B]
    ratio = log_ratio.exp()  # [B]
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))  # [B]
    loss = loss if weight is None else loss * weight.detach()
    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    stats = {
        "policy/ratio": masked_mean(ratio, valid),
        "policy/clip_share": masked_mean(((ratio - 1).abs() > clip_range).to(ratio), valid),
        "policy/approx_kl": -masked_mean(log_ratio, valid),
    }
    value = masked_mean(loss, valid)
    return Loss(value, {"policy/loss": value.detach(), **stats})


def kl_penalty(kl: Tensor, coef: float, *, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """coef * mean of kl [B] (from `Gaussian.kl`, nats per latent element; use `kl_total` and say so for totals) -> [].

    The reference's Gaussian is computed without gradient, the policy's with: a KL under no_grad trains nothing (`selfcheck.kl_gradient` looks).
    """
    return coef * masked_mean(kl if weight is None else kl * weight.detach(), valid)
