"""Policy gradients on Gaussian denoising steps: DDPO, PPO and GRPO all end here; they differ in the kernel and in the advantage.

Log-probabilities are nats PER LATENT ELEMENT, so the ratio below is the true density ratio to the power 1/D, D latent elements a clip.
A clip range c means +-c D nats on the true ratio and does not transfer between resolutions or frame counts; log the KL, per element and
total, beside it.
Letters: B clips, K noisy steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.objectives import Loss, masked_mean

METRICS = {
    "policy/loss": "The policy-gradient loss of the replayed steps, before any added term.",
    "policy/ratio": "Mean over clips of rho, the density ratio of new to old policy to the power 1/D; 1 before the first update.",
    "policy/clip_share": "Share of clips whose rho is outside 1 +- the clip range.",
    "policy/approx_kl": "Mean of -log rho, an unbiased estimate of KL(old policy, new policy) in nats per latent element; can be negative by chance.",
    "policy/kl": "Mean exact KL(old policy, new policy) of the replayed steps, nats per latent element; times the latent elements of a clip, nats of the clip.",
    "policy/masked_share": "Share of clips whose gradient the KL mask stops.",
}


def score_function(log_prob: Tensor, advantage: Tensor, *, valid: Tensor | None = None, weight: Tensor | None = None) -> Loss:
    """mean over valid clips of -weight A log_prob, all [B]: REINFORCE on denoising steps.

    DDPO_SF (Black et al. 2023, arXiv 2305.13301, section 4.3). Right for a single update per rollout, where its gradient is `ppo_clip`'s: the old log-probability
    need not be known. Known failure: at the second update the clips come from another policy than the one that learns, and nothing notices.
    """
    valid = torch.ones_like(log_prob, dtype=torch.bool) if valid is None else valid
    loss = -advantage.detach() * log_prob.where(valid, 0)  # [B]
    value = masked_mean(loss if weight is None else loss * weight.detach(), valid)
    return Loss(value, {"policy/loss": value.detach()})


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
    weight: `kernels.step_weight`. A clip_range of inf is DDPO-IS without clipping. With a single update per rollout rho is 1 and the gradient is
    REINFORCE's. Known failure: for a total KL above about 2 nats almost every rho is below 1, so positive samples are never clipped while negative ones lose their gradient.
    policy/approx_kl is the mean of -log rho, unbiased for KL(old, new) in nats per latent element; the usual rho - 1 - log rho would be off
    by a factor of about D, because rho is a D-th root. Raises ValueError where clip_range is not positive.
    """
    if clip_range <= 0:
        raise ValueError(f"clip_range must be positive, got {clip_range}")
    valid = torch.ones_like(log_prob, dtype=torch.bool) if valid is None else valid
    advantage = advantage.detach()  # [B]
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


def kl_mask(
    log_prob: Tensor,
    old_log_prob: Tensor,
    kl: Tensor,
    advantage: Tensor,
    threshold: float,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Loss:
    """mean over valid clips of weight * -A rho, without the clips further than `threshold` from the old policy that would go further still. All [B].

    Flow-DPPO (arXiv 2606.11025, eq. 17-18): a clip is left out where kl > threshold and (A > 0 and rho > 1, or A < 0 and rho < 1); what leads back stays. kl: `old.kl(new)`
    (eq. 14), nats per latent element, so the threshold is too, as in its code (1e-5); the paper's own sum over the clip is `kl_total`. The region is exact, where the
    ratio's is a single noisy draw. An unknown kl (nan) counts as outside; masked clips count in the mean. Known failure: nothing pulls a policy back that is outside and
    where every clip is masked; keep a KL penalty. Raises ValueError where threshold is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    valid = torch.ones_like(log_prob, dtype=torch.bool) if valid is None else valid
    advantage = advantage.detach()  # [B]
    log_ratio = (log_prob - old_log_prob.detach()).where(valid, 0)  # [B]
    away = ~(kl <= threshold) & (advantage * log_ratio > 0)  # [B]
    loss = -advantage * log_ratio.exp() * (~away)  # [B]
    value = masked_mean(loss if weight is None else loss * weight.detach(), valid)
    stats = {
        "policy/loss": value,
        "policy/ratio": masked_mean(log_ratio.exp(), valid),
        "policy/masked_share": masked_mean(away.to(loss), valid),
        "policy/kl": masked_mean(kl, valid),
    }
    return Loss(value, {name: stat.detach() for name, stat in stats.items()})


def kl_penalty(kl: Tensor, coef: float, *, valid: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """coef * mean of kl [B] -> []: the KL term of Flow-GRPO (arXiv 2505.05470, eq. 5) and of DPOK (arXiv 2305.16381).

    kl in x: `policy.kl(reference)`, nats per latent element; or `kl_total`, nats of the clip. kl in v: `clip_error(u, u_reference)`, velocity^2 per latent element, as NFT and
    DGPO charge it; it is 2/kappa^2 of the first, so a coef means another thing in each and at each step: log it with its unit.
    The reference is computed without gradient, the policy with: a KL under no_grad trains nothing (`selfcheck.kl_gradient` looks).
    """
    return coef * masked_mean(kl if weight is None else kl * weight.detach(), valid)


def step_rewards(reward: Tensor, kl: Tensor, coef: float) -> Tensor:
    """The KL in the reward: -coef kl_k at each step, and the clip's reward at the last; reward [B], kl [K,B] -> [K,B].

    InstructGPT (arXiv 2203.02155, eq. 2) over denoising steps. `critic.gae` takes it as it is; for group advantages sum over the K steps. It moves the policy
    through its log-probability only; `kl_penalty` in the loss has the smaller variance. So kl must depend on the step that was taken: its log-ratio
    log p - log p_ref, whose mean is the KL. The exact KL of a state is the same whatever step is taken there, and teaches nothing about that step.
    An unknown reward (nan) stays so.
    """
    return torch.cat([-coef * kl[:-1], (reward - coef * kl[-1])[None]]).detach()
