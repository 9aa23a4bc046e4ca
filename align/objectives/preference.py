"""Preferences: make the better clip of a pair likelier than the worse one, measured against a reference, without a reward model and without a density.

The likelihood of a clip is stood in for by its velocity error at a noise level; both clips of a pair are noised to the SAME t with the SAME eps (`pair_errors`), or the
difference of their errors is mostly noise. Pairs come from stored rankings or from rewards of fresh clips alike (`preference_pairs`). beta means nothing without its
reduction: errors here are means over a clip's D latent elements, so a beta for sums is D times smaller (`mean_beta`, `describe_beta`).
Letters: B clips, P pairs, C F H W latent channels/frames/height/width, D = C F H W; win and lose: the better and the worse clip of a pair.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.advantage import Groups, grouping
from align.objectives import Loss, masked_mean
from align.objectives.regression import clip_error
from base_model.paths import add_noise
from base_model.types import Conditioning, VideoModel

METRICS = {
    "preference/loss": "The DPO loss: mean of -log sigmoid of the margin; log 2 = 0.693 where the policy is the reference.",
    "preference/accuracy": "Share of pairs whose better clip has the larger implicit reward; a tie counts half, so 0.5 at the start.",
    "preference/margin": "Mean implicit reward of the better clip less that of the worse one, in nats.",
    "preference/error_win": "Mean velocity error of the better clips, velocity^2 per latent element.",
    "preference/error_lose": "Mean velocity error of the worse clips, velocity^2 per latent element.",
    "preference/error_win_change": "The same of the better clips, less the reference's. Above 0 the policy forgets the good clips too, though the loss may fall.",
    "preference/error_lose_change": "The same of the worse clips, less the reference's.",
}

Reduction = Literal["mean", "sum"]


class Pairs(NamedTuple):
    """Which clip beat which."""

    win: Tensor  # [P] long, row of the better clip
    lose: Tensor  # [P] long, row of the worse clip
    weight: Tensor  # [P] 1 / pairs of its group, so that every group counts once


def preference_pairs(score: Tensor, groups: Groups, *, which: Literal["extremes", "all"] = "extremes", margin: float = 0.0) -> Pairs:
    """Pairs within each group whose scores differ by more than margin; score [B], larger is better: rewards of fresh clips, or -rank of ranked ones.

    extremes: the best and the worst of each group (online DPO's choice). all: every pair, weighted to one a group; K clips have only K - 1 independent
    comparisons, so pairs of a long ranking say less than their number. Unknown scores (nan) and ties make no pair. Raises ValueError where margin is negative.
    """
    if margin < 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    cells = grouping(score, groups)
    table = cells.fill(score)  # [N,G]
    clips = cells.fill(torch.arange(len(score), device=score.device))  # [N,G] row of each clip
    ahead = table[:, :, None] - table[:, None, :] > margin  # [N,G,G] nan is never ahead
    if which == "extremes":
        best, worst = table.nan_to_num(-torch.inf).argmax(1), table.nan_to_num(torch.inf).argmin(1)  # [N] each
        rows = torch.arange(len(table), device=score.device)
        chosen = torch.zeros_like(ahead)
        chosen[rows, best, worst] = True
        ahead = ahead & chosen
    row, i, j = ahead.nonzero(as_tuple=True)  # [P] each
    return Pairs(clips[row, i].long(), clips[row, j].long(), 1 / ahead.sum((1, 2))[row])


def pair_errors(model: VideoModel, win: Tensor, lose: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """Velocity errors of both clips of each pair, [P] and [P], noised alike; win, lose (finished latents) and eps [P,C,F,H,W], t [P], cond P.

    One forward pass of 2 P clips; what a visual prompt gives (`cond.known`) takes no part. Call it for the policy with gradient and for the reference without,
    with the same eps and t.
    """
    x0, eps, t, cond = torch.cat([win, lose]), torch.cat([eps, eps]), torch.cat([t, t]), cond[torch.arange(len(cond)).repeat(2)]  # 2P each
    u = model(add_noise(model.path, x0, eps, t), t, cond)  # [2P,C,F,H,W]
    keep = None if cond.known is None else ~cond.known.mask[:, None]  # [2P,1,F,H,W]
    error_win, error_lose = clip_error(u, model.path.velocity(x0, eps, t), keep=keep).chunk(2)
    return error_win, error_lose


def flow_dpo(
    error_win: Tensor,
    error_lose: Tensor,
    reference_win: Tensor,
    reference_lose: Tensor,
    beta: float,
    *,
    time_weight: Tensor | None = None,
    pair_weight: Tensor | None = None,
    valid: Tensor | None = None,
) -> Loss:
    """mean over valid pairs of -log sigmoid(-(beta/2) w_t [(e_win - e_win^ref) - (e_lose - e_lose^ref)]); all [P], errors from `pair_errors`.

    Flow-DPO (arXiv 2501.13918, eq. 6) with time_weight None (constant, which worked best there) or (1 - t)^2. Diffusion-DPO (arXiv 2311.12908, eq. 14), whose errors
    are those of eps, with time_weight alpha(t)^2; its T omega(lambda_t) is part of beta. beta: on errors that are means over elements (500-5000 in public code); see `mean_beta`.
    pair_weight: `Pairs.weight`. Known failure: the loss falls just as well when both errors grow, the loser's faster; look at both changes, which are logged, and stop.
    Raises ValueError where beta is not positive.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    change_win, change_lose = error_win - reference_win.detach(), error_lose - reference_lose.detach()  # [P] each
    margin = -beta / 2 * (change_win - change_lose)  # [P]
    margin = margin if time_weight is None else margin * time_weight.detach()
    margin = margin if valid is None else margin.where(valid, 0)  # before the sigmoid, whose gradient at nan is nan
    loss = -logsigmoid(margin)  # [P]
    value = masked_mean(loss if pair_weight is None else loss * pair_weight.detach(), valid)
    stats = {
        "preference/loss": masked_mean(loss, valid),
        "preference/accuracy": masked_mean((margin.sign() + 1) / 2, valid),
        "preference/margin": masked_mean(margin, valid),
        "preference/error_win": masked_mean(error_win, valid),
        "preference/error_lose": masked_mean(error_lose, valid),
        "preference/error_win_change": masked_mean(change_win, valid),
        "preference/error_lose_change": masked_mean(change_lose, valid),
    }
    return Loss(value, {name: stat.detach() for name, stat in stats.items()})


def mean_beta(beta: float, reduction: Reduction, elements: int) -> float:
    """beta for errors that are means over a clip's `elements`: the same, or `elements` times a beta for sums (norms squared)."""
    return beta if reduction == "mean" else beta * elements


def describe_beta(beta: float, reduction: Reduction, elements: int) -> str:
    """beta with its reduction, in both units, for the log of a run."""
    on_mean = mean_beta(beta, reduction, elements)
    return f"beta {on_mean:g} on the mean, {on_mean / elements:g} on the sum of the squared errors of {elements} latent elements"
