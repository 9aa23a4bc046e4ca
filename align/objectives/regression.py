"""Flow matching: regress the velocity of the path. SFT, pretraining, and the held-out loss.

Two reductions, one after the other, and both are means: first over the elements of one clip (so every clip counts the same whatever its
length and size), then over clips. Letters: B clips, C F H W latent channels/frames/height/width, N tokens of a pack, c values a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align.objectives import Loss, masked_mean

METRICS = {
    "flow_matching/loss": "The weighted flow-matching loss.",
    "flow_matching/error": "Mean over clips of the squared velocity error per latent element, without weights.",
}


def clip_error(u: Tensor, target: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """Mean squared error of each clip, u and target [B,C,F,H,W] -> [B] float32, unit velocity^2 per latent element.

    keep: bool, broadcastable to u; what is False (given by a visual prompt) takes no part in the mean. nan for a clip that keeps nothing.
    """
    error = (u.float() - target.float()).square()  # [B,C,F,H,W]
    if keep is None:
        return error.flatten(1).mean(1)  # [B]
    kept = keep.expand_as(error).flatten(1)  # [B,CFHW]
    return error.flatten(1).where(kept, 0).sum(1) / kept.sum(1)  # [B]


def packed_clip_error(u: Tensor, target: Tensor, segment: Tensor, num_clips: int, *, keep: Tensor | None = None) -> Tensor:
    """The same mean of each clip for packed tokens: u and target [N,c], segment [N] long = clip of each token -> [num_clips] float32.

    keep: bool [N]; tokens that are False take no part. nan for a clip that keeps no token.
    """
    error = (u.float() - target.float()).square().mean(1)  # [N]
    kept = torch.ones_like(error) if keep is None else keep.to(error)  # [N]
    total = error.new_zeros(num_clips).index_add(0, segment, error.where(kept > 0, 0))  # [num_clips]
    return total / error.new_zeros(num_clips).index_add(0, segment, kept)  # [num_clips]


def flow_matching(error: Tensor, *, weight: Tensor | None = None, valid: Tensor | None = None) -> Loss:
    """mean over valid clips of weight * error, error [B] from `clip_error` or `packed_clip_error`.

    Conditional flow matching, Lipman et al. 2023 (arXiv 2210.02747), eq. 9; the target is `path.velocity(x0, eps, t)`. `weight` [B] is not
    normalised: it may be a function of t, or a reward (RWR). Known failure: the loss of one batch says little, its variance over t dwarfs
    any progress; watch the held-out loss at fixed quantiles (`base_model.times.quantile_times`).
    """
    value = masked_mean(error if weight is None else error * weight.detach(), valid)
    return Loss(value, {"flow_matching/loss": value.detach(), "flow_matching/error": masked_mean(error.detach(), valid)})
