"""Likelihoods of ratings of one clip at a time: an ordinal scale, and safe or unsafe. Pure functions of scores, in nats.

Rankings say only which clip is better, so a score learned from them has no zero. Ratings add one: a level on a scale, or the line between safe and unsafe.
A rating that is missing (nan) has log-probability 0, and its gradient is 0; average with `ranking.masked_mean(value, ~rating.isnan())`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.ranking import bradley_terry


def ordinal(score: Tensor, level: Tensor, thresholds: Tensor) -> Tensor:
    """Ratings on a scale of L levels (a cumulative logit: McCullagh 1980): P(level <= l) = s(threshold_l - score).

    score and level [...], level 1..L or nan = missing; thresholds [L-1], or [...,L-1] that broadcast (one set a dimension), rising -> [...]. Two levels are logistic regression.
    Raises ValueError for another level, and where thresholds do not rise. `rising` makes thresholds that do.
    """
    known = ~level.isnan()
    index = torch.where(known, level, 1.0).long() - 1  # [...] 0..L-1
    levels = thresholds.shape[-1] + 1
    if ((index < 0) | (index >= levels)).any() or (level != level.round()).logical_and(known).any():
        raise ValueError(f"ordinal: levels are whole numbers from 1 to {levels}, or nan where missing")
    if not (thresholds.diff(dim=-1) > 0).all():
        raise ValueError("ordinal: thresholds must rise; make them with `rising`")
    ends = thresholds.new_full((*thresholds.shape[:-1], 1), math.inf)
    edges = torch.cat([-ends, thresholds, ends], dim=-1).expand(*score.shape, levels + 1)  # [..., L+1]
    low, high = (edges.gather(-1, (index + k)[..., None])[..., 0] for k in (0, 1))  # [...]
    # s(b) - s(a) = s(b) s(-a) (1 - e^(a - b)): no difference of two numbers near 1
    log_prob = F.logsigmoid(high - score) + F.logsigmoid(score - low) + torch.log(-torch.expm1(low - high))  # [...]
    return torch.where(known, log_prob, 0.0)


def rising(first: Tensor, gaps: Tensor) -> Tensor:
    """Thresholds that rise whatever the parameters are: first [...], then steps softplus(gaps) [...,L-2] -> [...,L-1]."""
    return torch.cat([first[..., None], first[..., None] + F.softplus(gaps).cumsum(-1)], dim=-1)


def cost_sign(cost: Tensor, unsafe: Tensor) -> Tensor:
    """Whether a clip is safe, told by the sign of its cost: log s(cost) where unsafe, log s(-cost) where safe. It gives costs the zero that rankings cannot.

    cost and unsafe [...], unsafe in [0, 1] (in between: the share of people who say so) or nan = not judged -> [...]. Raises ValueError for another value.
    """
    known = ~unsafe.isnan()
    share = torch.where(known, unsafe, 0.0)
    if ((share < 0) | (share > 1)).any():
        raise ValueError("cost_sign: unsafe is between 0 (safe) and 1 (unsafe), or nan where not judged")
    return torch.where(known, share * F.logsigmoid(cost) + (1 - share) * F.logsigmoid(-cost), 0.0)


def cost_pair(worse: Tensor, better: Tensor, worse_unsafe: Tensor, better_unsafe: Tensor) -> Tensor:
    """A pair of clips of which one is more harmful, and whether each is safe: minus the loss of Safe RLHF's cost model (Dai et al. 2023, arXiv 2310.12773, section 3.2),

        log s(c_worse - c_better) + log s(sign_worse c_worse) + log s(sign_better c_better),    sign = +1 unsafe, -1 safe.

    Costs [...]; unsafe [...] in [0, 1] or nan = not judged, whose term is left out -> [...]. Any other likelihood of rankings will do for the first term, with 1 = most harmful.
    """
    return bradley_terry(worse - better) + cost_sign(worse, worse_unsafe) + cost_sign(better, better_unsafe)
