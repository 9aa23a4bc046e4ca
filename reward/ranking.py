"""Likelihoods of rankings, as pure functions of scores.

One event is one person's ranking of K clips: `scores` [B,K] (log-worth, any real number) and `ranks` [B,K] (1 = best, equal numbers = tie,
0 = not ranked: the clip takes no part, and its score, nan too, is not read). All functions return log-probabilities in nats, differentiable in scores
and parameters; an event that tells nothing has log-probability 0.

    Davidson-Luce  --K = 2-->  Davidson  --no ties-->  Bradley-Terry
         |--no ties-->  Plackett-Luce  --K = 2-->  Bradley-Terry
    Rao-Kupper  --k = 1-->  Bradley-Terry  <--no spread--  heteroscedastic
    best and worst  --K = 2-->  Bradley-Terry

What one person does to the likelihood is in `labelers.py`; ratings of one clip at a time are in `ratings.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
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


def rao_kupper(difference: Tensor, log_k: Tensor) -> Tensor:
    """Pairs with ties by a threshold (Rao & Kupper 1967): P(A > B) = s(d - ln k), P(B > A) = s(-d - ln k), P(tie) = (k^2 - 1) s(d - ln k) s(-d - ln k).

    VideoAlign's "BTT" has k = 5 fixed, so that two thirds of equally good pairs tie. k = 1 is Bradley-Terry: a tie has log-probability -inf and no slope, so to
    learn k keep log k above 0 by softplus.

    difference r_A - r_B [...], log_k broadcastable -> log-probabilities of A, tie, B [..., 3]. Raises ValueError for log_k < 0.
    """
    if (log_k < 0).any():
        raise ValueError(f"rao_kupper needs k >= 1, got log_k = {log_k.min().item():.3g}; learn it through softplus")
    better, worse = F.logsigmoid(difference - log_k), F.logsigmoid(-difference - log_k)
    tie = 2 * log_k + torch.log(-torch.expm1(-2 * log_k)) + better + worse  # ln(k^2 - 1), which does not overflow
    return torch.stack([better, tie, worse], dim=-1)  # [..., 3]


def heteroscedastic(difference: Tensor, spread_a: Tensor, spread_b: Tensor) -> Tensor:
    """log P(A > B) where scores are uncertain, each a normal with its own standard deviation: log E[s(d + sqrt(spread_a^2 + spread_b^2) z)], z ~ N(0, 1).

    The model of HPSv3's uncertainty loss, which draws 1,000 z; here 20 nodes of Gauss-Hermite quadrature, the same at every call. The error of the probability is
    below 1e-5 where the joint spread (the root) is at most 2, 3e-4 at 3, 2e-3 at 4 and 0.03 at 10. difference r_A - r_B and spreads broadcast to [...] -> [...].
    """
    node, log_weight = (torch.from_numpy(each).to(difference) for each in _gauss_hermite(20))  # [20], [20]
    smallest = torch.finfo(difference.dtype).tiny  # the root has a slope there; at spread 0 the gradient is 0, which is right
    spread = (spread_a.square() + spread_b.square()).clamp(min=smallest).sqrt()
    return (log_weight + F.logsigmoid(difference[..., None] + spread[..., None] * node)).logsumexp(-1)  # [...]


def plackett_luce(scores: Tensor, ranks: Tensor, below: Tensor | None = None) -> Tensor:
    """Strict rankings: at each place the best of what remains is chosen by softmax (Luce 1959, Plackett 1975).

    scores [B,K], ranks [B,K] without ties among the ranked -> [B]. `below` [B,K] as in `davidson_luce`. Raises ValueError on a tie.
    """
    ranked = ranks > 0  # [B, K]
    same = (ranks[:, None, :] == ranks[:, :, None]) & ranked[:, None, :]  # [B, K, K]
    if (same.sum(-1) > 1).logical_and(ranked).any():
        raise ValueError("plackett_luce takes strict rankings; use davidson_luce where clips tie")
    scores, remaining = _taking_part(scores, ranks, below), _remaining(ranks, below)  # [B, K], [B, K, K]
    worth = torch.where(remaining | ~ranked[:, :, None], scores[:, None, :], -math.inf)  # [B, K, K]
    return torch.where(ranked, scores - worth.logsumexp(-1), 0.0).sum(-1)  # [B]


def davidson_luce(scores: Tensor, ranks: Tensor, log_tie: Tensor, below: Tensor | None = None) -> Tensor:
    """Rankings with ties of any order (Firth, Kosmidis & Turner 2019, arXiv 1902.02901, eq. 2-3).

    From the clips that remain, the set S that shares the next place is chosen with probability proportional to
    delta_|S| * (product of worths in S)^(1/|S|), where delta_1 = 1 and log delta_n = log_tie[n - 2].

    scores [B,K], ranks [B,K] -> log-probability [B]. `log_tie` is [K-1] (or longer) or [B,K-1]; -inf forbids ties of that order.
    `below` [B,K] bool: clips that are not ranked but are known to be worse than all that are ("the best two of four"); they can be chosen at every place, and where
    they come among themselves is not asked. Raises ValueError where a clip is both ranked and below.
    """
    scores = _taking_part(scores, ranks, below)
    subsets = _subsets(scores.shape[-1], scores.device)  # [M, K]
    size = subsets.sum(-1)  # [M]
    delta = torch.cat([log_tie.new_zeros((*log_tie.shape[:-1], 1)), log_tie], dim=-1)[..., size - 1]  # [M] or [B, M]
    worth = delta + scores @ (subsets.to(scores) / size.to(scores)[:, None]).T  # [B, M] log delta_|S| + mean score of S

    ranked = ranks > 0  # [B, K]
    tied = (ranks[:, None, :] == ranks[:, :, None]) & ranked[:, None, :] & ranked[:, :, None]  # [B, K, K] j shares the place of i
    remaining = _remaining(ranks, below)  # [B, K, K]
    possible = ((~remaining).to(scores) @ subsets.to(scores).T == 0) | ~ranked[:, :, None]  # [B, K, M]
    chosen = (tied[:, :, None, :] == subsets).all(-1) & ranked[:, :, None]  # [B, K, M]
    numerator = torch.where(chosen, worth[:, None, :], 0.0).sum(-1)  # [B, K]
    denominator = torch.where(possible, worth[:, None, :], -math.inf).logsumexp(-1)  # [B, K]
    step = torch.where(ranked, numerator - denominator, 0.0)  # [B, K] the place of i; a tied place appears once for each of its clips
    return (step / tied.sum(-1).clamp(min=1)).sum(-1)  # [B]


def best_worst(scores: Tensor, best: Tensor, worst: Tensor, shown: Tensor | None = None) -> Tensor:
    """The best clip is named, the worst, or both: first the best of those shown by softmax(scores), then the worst of the others by softmax(-scores).

    The best alone is the first place of Plackett-Luce. The worst is the first place of Plackett-Luce on minus the scores (Marley & Louviere 2005), which is another
    model: in a ranking drawn from Plackett-Luce the last place is distributed a little differently unless K = 2. Named together, the best goes first and takes no
    part in the second choice (sequential best-worst, not "maxdiff"), so that two clips are Bradley-Terry.

    scores [B,K], best and worst [B] = which clip, -1 = not named -> [B]. `shown` [B,K] bool: the clips there were (all). Raises ValueError where one that is named was not shown,
    or is both.
    """
    there = torch.ones_like(scores, dtype=torch.bool) if shown is None else shown  # [B, K]
    index = torch.arange(scores.shape[-1], device=scores.device)  # [K]
    first, last = best[:, None] == index, worst[:, None] == index  # [B, K]
    scores, named = torch.where(there, scores, 0.0), torch.stack([best, worst])  # [B, K], [2, B]
    if (first & last).any() or ((first | last) & ~there).any() or ((named < -1) | (named >= len(index))).any():
        raise ValueError("best_worst: the best and the worst must be two different clips among those shown; -1 = not named")
    return _chosen(scores, first, there) + _chosen(-scores, last, there & ~first)


def all_pairs(scores: Tensor, ranks: Tensor, tie_model: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Every pair of a ranking as if it had been asked alone, times 1 / C(k,2), where k clips are ranked: InstructGPT (Ouyang et al. 2022, eq. 1).

    Without the factor a ranking of four would count as six independent answers, and is worth about four. `tie_model`: score differences -> log-probabilities of A, tie, B,
    as `partial(davidson, log_tie=...)` and `partial(rao_kupper, log_k=...)`. Without it pairs are Bradley-Terry, and tied ones are passed over: they
    count in C(k,2) and add nothing, so an event in which all clips tie has no weight.

    scores [B,K], ranks [B,K] -> [B]: a mean over pairs, not the log-probability of the ranking.
    """
    i, j = torch.combinations(torch.arange(ranks.shape[-1], device=ranks.device)).unbind(-1)  # [P]
    scores = _taking_part(scores, ranks)
    difference = scores[:, i] - scores[:, j]  # [B, P]
    outcome, known = pair_outcomes(ranks)  # [B, P]
    if tie_model is None:
        told, log_prob = known & (outcome != 0), bradley_terry(outcome * difference)  # [B, P]
    else:
        told, log_prob = known, tie_model(difference).gather(-1, 1 - outcome.long()[..., None])[..., 0]  # [B, P]
    return torch.where(told, log_prob, 0.0).sum(-1) / known.sum(-1).clamp(min=1)  # [B]


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


def tie_threshold(share: float) -> float:
    """log k of Rao & Kupper's model whose equally good pairs tie with probability `share` in [0, 1): (k - 1) / (k + 1) = share."""
    return math.log((1 + share) / (1 - share))


# Averages over events


def masked_mean(value: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean of value [B,...] over its valid entries only, so that a dimension nobody judged neither counts nor dilutes; weight [B] or as value.

    Scalar; 0, with gradient 0, where nothing is valid. What stands at other entries, nan too, is never read.
    """
    weights = torch.ones_like(value) if weight is None else weight.reshape(weight.shape + (1,) * (value.dim() - weight.dim())).expand_as(value)
    kept = torch.where(valid, weights, 0.0)
    total = kept.sum()
    return (kept * torch.where(valid, value, 0.0)).sum() / torch.where(total > 0, total, 1.0)


# Parts


def _taking_part(scores: Tensor, ranks: Tensor, below: Tensor | None = None) -> Tensor:
    """Scores [B,K], 0 where a clip takes no part: nan there would spread through products with 0."""
    return torch.where(ranks > 0 if below is None else (ranks > 0) | below, scores, 0.0)


def _remaining(ranks: Tensor, below: Tensor | None) -> Tensor:
    """[B,K,K]: clip j can still be chosen when the place of clip i is given."""
    ranked = ranks > 0  # [B, K]
    remaining = (ranks[:, None, :] >= ranks[:, :, None]) & ranked[:, None, :]  # [B, K, K]
    if below is None:
        return remaining
    if (below & ranked).any():
        raise ValueError("a clip is both ranked and below all that are ranked")
    return remaining | below[:, None, :]


def _chosen(worth: Tensor, choice: Tensor, among: Tensor) -> Tensor:
    """log softmax of worth [B,K] among some, at the choice [B,K] (one a row, or none) -> [B]."""
    anything = choice.any(-1, keepdim=True)  # [B, 1]
    log_prob = worth - torch.where(among | ~anything, worth, -math.inf).logsumexp(-1, keepdim=True)  # [B, K]
    return torch.where(choice, log_prob, 0.0).sum(-1)  # [B]


@lru_cache(maxsize=8)
def _gauss_hermite(number: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and log-weights of E[f(z)], z ~ N(0, 1): sum of weight * f(node)."""
    node, weight = np.polynomial.hermite_e.hermegauss(number)
    return node, np.log(weight / weight.sum())


@lru_cache(maxsize=32)
def _subsets(k: int, device: torch.device) -> Tensor:
    """The 2^k - 1 non-empty subsets of k clips as bool rows [M,k]."""
    codes = torch.arange(1, 2**k, device=device)
    return (codes[:, None] >> torch.arange(k, device=device)) & 1 == 1
