"""Likelihoods of rankings with ties, as pure functions of scores.

One event is one person's ranking of K clips: `scores` [B,K] (log-worth, any real number) and `ranks` [B,K] (1 = best, equal numbers = tie,
0 = not ranked: the clip takes no part). All functions return log-probabilities in nats, differentiable in scores and tie parameters.

    Davidson-Luce  --K = 2-->  Davidson  --no ties-->  Bradley-Terry
         |--no ties-->  Plackett-Luce  --K = 2-->  Bradley-Terry
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(difference: Tensor) -> Tensor:
    """log P(A > B) for score differences r_A - r_B of any shape (Bradley & Terry 1952)."""
    return F.logsigmoid(difference)


def davidson(difference: Tensor, log_tie: Tensor) -> Tensor:
    """Pairs with ties (Davidson 1970, eq. 3.1): P(tie) is proportional to v sqrt(w_A w_B), v = exp(log_tie).

    difference r_A - r_B [...], log_tie broadcastable -> log-probabilities of A, tie, B [..., 3].
    """
    half = difference / 2
    return torch.log_softmax(torch.stack([half, log_tie.expand_as(half), -half], dim=-1), dim=-1)  # [..., 3]


def plackett_luce(scores: Tensor, ranks: Tensor) -> Tensor:
    """Strict rankings: at each place the best of what remains is chosen by softmax (Luce 1959, Plackett 1975).

    scores [B,K], ranks [B,K] without ties among the ranked -> [B]. Raises ValueError on a tie.
    """
    ranked = ranks > 0  # [B, K]
    same = (ranks[:, None, :] == ranks[:, :, None]) & ranked[:, None, :]  # [B, K, K]
    if (same.sum(-1) > 1).logical_and(ranked).any():
        raise ValueError("plackett_luce takes strict rankings; use davidson_luce where clips tie")
    remaining = (ranks[:, None, :] >= ranks[:, :, None]) & ranked[:, None, :]  # [B, K, K] j is there when the place of i is given
    worth = torch.where(remaining | ~ranked[:, :, None], scores[:, None, :], -math.inf)  # [B, K, K]
    return torch.where(ranked, scores - worth.logsumexp(-1), 0.0).sum(-1)  # [B]


def davidson_luce(scores: Tensor, ranks: Tensor, log_tie: Tensor) -> Tensor:
    """Rankings with ties of any order (Firth, Kosmidis & Turner 2019, arXiv 1902.02901, eq. 2-3).

    From the clips that remain, the set S that shares the next place is chosen with probability proportional to
    delta_|S| * (product of worths in S)^(1/|S|), where delta_1 = 1 and log delta_n = log_tie[n - 2].

    scores [B,K], ranks [B,K] -> log-probability [B]. `log_tie` is [K-1] (or longer) or [B,K-1]; -inf forbids ties of that order.
    """
    subsets = _subsets(scores.shape[-1], scores.device)  # [M, K]
    size = subsets.sum(-1)  # [M]
    delta = torch.cat([torch.zeros_like(log_tie[..., :1]), log_tie], dim=-1)[..., size - 1]  # [M] or [B, M]
    worth = delta + scores @ (subsets.to(scores) / size.to(scores)[:, None]).T  # [B, M] log delta_|S| + mean score of S

    ranked = ranks > 0  # [B, K]
    tied = (ranks[:, None, :] == ranks[:, :, None]) & ranked[:, None, :] & ranked[:, :, None]  # [B, K, K] j shares the place of i
    remaining = (ranks[:, None, :] >= ranks[:, :, None]) & ranked[:, None, :]  # [B, K, K] j is there when the place of i is given
    possible = ((~remaining).to(scores) @ subsets.to(scores).T == 0) | ~ranked[:, :, None]  # [B, K, M]
    chosen = (tied[:, :, None, :] == subsets).all(-1) & ranked[:, :, None]  # [B, K, M]
    numerator = torch.where(chosen, worth[:, None, :], 0.0).sum(-1)  # [B, K]
    denominator = torch.where(possible, worth[:, None, :], -math.inf).logsumexp(-1)  # [B, K]
    step = torch.where(ranked, numerator - denominator, 0.0)  # [B, K] the place of i; a tied place appears once for each of its clips
    return (step / tied.sum(-1).clamp(min=1)).sum(-1)  # [B]


def pair_outcomes(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair i < j of each event: outcome +1 (i better), 0 (tie), -1 (j better) and whether both were ranked.

    ranks [B,K] -> int8 [B,P] and bool [B,P], P = K(K-1)/2, in the order of `torch.combinations`.
    """
    i, j = torch.combinations(torch.arange(ranks.shape[-1], device=ranks.device)).unbind(-1)  # [P]
    first, second = ranks[:, i], ranks[:, j]  # [B, P]
    return torch.sign(second - first).to(torch.int8), (first > 0) & (second > 0)


def weak_orders(k: int) -> Tensor:
    """All rankings of k clips with ties, as dense ranks [M,k] int64 (1, 3, 13, 75, 541 of them for k = 1..5)."""
    orders = [ranks for ranks in itertools.product(range(1, k + 1), repeat=k) if set(ranks) == set(range(1, max(ranks) + 1))]
    return torch.tensor(orders)


def tie_parameter(share: float) -> float:
    """log v of Davidson's model whose equally good pairs tie with probability `share` in (0, 1): v / (2 + v) = share."""
    return math.log(2 * share / (1 - share))


@lru_cache(maxsize=32)
def _subsets(k: int, device: torch.device) -> Tensor:
    """The 2^k - 1 non-empty subsets of k clips as bool rows [M,k]."""
    codes = torch.arange(1, 2**k, device=device)
    return (codes[:, None] >> torch.arange(k, device=device)) & 1 == 1
