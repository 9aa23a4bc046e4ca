"""What must hold before the first update. Every check returns what it measured, or stops the run (GuardStop, exit status 3) with one line.

Most expensive failures in diffusion RL are silent: a replay that is not the sampler, rewards that are all alike, a KL term computed without gradient.
Letters: B clips, C F H W latent channels/frames/height/width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from align.advantage import Groups, grouping
from align.kernels import Gaussian
from base_model.errors import GuardStop

TOLERANCE = 1e-6  # ratio - 1 in other micro-batches than the rollout's, in nats per latent element


def first_ratio(log_prob: Tensor, old_log_prob: Tensor, *, same_batches: bool) -> float:
    """max |ratio - 1| over the replayed steps [B] before any update: exactly 0 in the rollout's own micro-batches, at most 1e-6 in others."""
    off = float((log_prob.detach() - old_log_prob).double().expm1().abs().max())
    allowed = 0.0 if same_batches else TOLERANCE
    if not off <= allowed:
        raise GuardStop(
            f"self-check: the first ratio is off by {off:.3g}, allowed {allowed:g}: replay differs from sampling"
            " (dropout, guidance, dtype or conditions). Make both call transition() with the same model state"
        )
    return off


def reward_spread(reward: Tensor, groups: Groups) -> float:
    """Largest standard deviation of the known rewards within a prompt's group, reward [B]: above 0, or nothing can be learned."""
    by_prompt = [group[group.isfinite()] for group in grouping(reward, groups).fill(reward)]
    spread = max((float(group.double().std(correction=0)) for group in by_prompt if len(group) > 1 and bool((group != group[0]).any())), default=0.0)
    if spread == 0:
        known = float(reward.isfinite().float().mean())
        raise GuardStop(
            f"self-check: no prompt has two clips with different rewards ({known:.0%} of the rewards are known)."
            " Look at the scorer, at the noise of the kernel and at the number of clips a prompt"
        )
    return spread


def kl_gradient(policy: Gaussian, reference: Gaussian, parameters: Iterable[nn.Parameter]) -> float:
    """Norm of the gradient of KL(policy || reference) with the reference moved away by one std; above 0, or the KL term trains nothing.

    Moved, because at step 0 the policy IS the reference and the true gradient is 0. The graph of `policy` is kept.
    """
    if reference.mean.requires_grad:
        raise GuardStop("self-check: the reference's velocity carries a gradient: compute it under no_grad, with the adapter disabled")
    moved = Gaussian(reference.mean + reference.std, reference.std)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    kl = policy.kl(moved).mean()
    gradients = torch.autograd.grad(kl, wanted, retain_graph=True, allow_unused=True) if kl.requires_grad and wanted else ()
    norm = float(sum((g.double().square().sum() for g in gradients if g is not None), torch.zeros((), dtype=torch.float64)).sqrt())
    if not 0 < norm < float("inf"):
        raise GuardStop(
            f"self-check: the gradient of the KL term is {norm:g}: it does not reach the trainable parameters."
            " Compute the policy's velocity with gradient"
        )
    return norm
