"""What people do to an answer that has nothing to do with the clips: a habit of place, and answers without looking. Pure functions, in nats.

    scores --with_position--> scores as this person sees them --davidson_luce--> careful --+
                                                                                           +--reliability_mixture--> log-probability
    no scores at all --with_position--> a habit --careless--> careless --------------------+

Parameters are of people, so look them up first: `advantage[labeler]` and `reliability[labeler]`, one value an event.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reward.ranking import davidson_luce


def with_position(scores: Tensor, shown_order: Tensor, advantage: Tensor) -> Tensor:
    """Scores with a habit of place: the clip shown first gains `advantage` (log-odds) over the one shown last, falling in equal steps; negative prefers the last.

    scores [B,K], shown_order [B,K] = place of each clip on the screen, 0 = first, -1 = not shown; advantage [] or [B] -> [B,K]. An event whose order was not recorded, all -1,
    keeps its scores. Raises ValueError where places are not 0, 1, ... each once.
    """
    shown = shown_order >= 0  # [B, K]
    number = shown.sum(-1, keepdim=True)  # [B, 1]
    same = (shown_order[:, None, :] == shown_order[:, :, None]) & shown[:, None, :]  # [B, K, K]
    if ((shown_order >= number) & shown).any() or ((same.sum(-1) > 1) & shown).any():
        raise ValueError("with_position: shown_order numbers the clips of a screen 0, 1, ... each once; -1 = not shown or not recorded")
    height = 1 - shown_order.to(scores) / (number - 1).clamp(min=1)  # [B, K] 1 for the first, 0 for the last
    return scores + advantage[..., None] * torch.where(shown, height, 0.0)


def careless(ranks: Tensor, log_tie: Tensor, habit: Tensor | None = None) -> Tensor:
    """How likely somebody who does not look gives this ranking: Davidson-Luce of equal clips, but for the habit, with tie parameters of its own.

    ranks [B,K], log_tie as in `davidson_luce`, habit [B,K] = `with_position` of zeros, None = no habit -> [B]. With log_tie = -inf and no habit all strict orders are equally
    likely, 1 / k!. (No tie parameters make all rankings with ties equally likely, unless K = 2 with delta_2 = 1.)
    """
    equal = torch.zeros(ranks.shape, dtype=log_tie.dtype, device=ranks.device)
    return davidson_luce(equal if habit is None else habit, ranks, log_tie)


def reliability_mixture(log_prob: Tensor, log_careless: Tensor, reliability: Tensor) -> Tensor:
    """log(h p + (1 - h) p_careless): a person looks at the clips with probability h = s(reliability), and otherwise answers as `careless` says; all [B] -> [B].

    Bounded below, so one wild answer cannot pull a score far. For pairs without ties and habit it is Crowd-BT with eta = (1 + h) / 2 >= 1/2.
    """
    return torch.logaddexp(F.logsigmoid(reliability) + log_prob, F.logsigmoid(-reliability) + log_careless)


def crowd_bradley_terry(difference: Tensor, reliability: Tensor) -> Tensor:
    """log(eta s(d) + (1 - eta) s(-d)), eta = s(reliability): Crowd-BT for pairs (Chen, Bennett, Collins-Thompson & Horvitz, WSDM 2013). [...] -> [...].

    Somebody turns a share 1 - eta of the answers over, so eta < 1/2 is one who answers against the clips, which no mixture with carelessness can say.
    """
    return torch.logaddexp(F.logsigmoid(reliability) + F.logsigmoid(difference), F.logsigmoid(-reliability) + F.logsigmoid(-difference))
