"""Which clips to have ranked next: how much an answer would tell. Whom to ask what is in `asking.py`.

What is known after some rankings is a Gaussian over the weights of a linear score, theta ~ N(mean, covariance): Laplace's approximation under the Davidson-Luce likelihood
(with log_tie = -inf and two clips: Bradley-Terry). An answer to the task of ranking K clips with features x [K,d] tells about theta:

    bald        I(answer; theta) = H(E p(answer | theta)) - E H(p(answer | theta))    (Houlsby et al. 2011, arXiv 1112.5745), in nats
    variance    tr(F V), V = x covariance x^T: of a pair without ties Var(s_A - s_B) p (1 - p); half of it is the first order of `bald`
    d_optimal   log det(I + F V), one task after the other, each knowing those before it: a batch that does not ask the same thing twice

with F the Fisher information [K,K] of a ranking at the mean scores. All in float64. A pool of tasks has one K.

Letters: C clips, d features, E events, N tasks of K clips, Y = rankings of K clips with ties, M = 2^K - 1 sets of clips, S nodes.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from reward.ranking import davidson_luce, weak_orders

Method = Literal["random", "variance", "bald", "d_optimal"]
METHODS: tuple[Method, ...] = ("random", "variance", "bald", "d_optimal")
IMPOSSIBLE = -1e4
"""Stands for a log tie parameter of -inf where it is multiplied by 0."""
ROUGH = 6
"""A grid with fewer nodes a direction is no better than draws."""
NUMBERS = 20_000_000
"""Numbers held at once."""


# What the rankings say


@dataclass(frozen=True)
class Posterior:
    """theta ~ N(mean, covariance)."""

    mean: Tensor  # [d] float64
    covariance: Tensor  # [d,d] float64

    def scores(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features [C,d] -> mean and standard deviation of their scores, [C] each."""
        x = features.double()
        return x @ self.mean, ((x @ self.covariance) * x).sum(-1).clamp(min=0).sqrt()


def prior(d: int, precision: float) -> Posterior:
    """theta ~ N(0, 1 / precision) in every direction. Raises ValueError unless precision is positive."""
    if not 0 < precision < math.inf:
        raise ValueError(f"the precision of a prior is a positive number, got {precision}")
    return Posterior(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64) / precision)


def laplace_posterior(before: Posterior, features: Tensor, index: Tensor, ranks: Tensor, log_tie: Tensor, *, weight: Tensor | None = None) -> Posterior:
    """What is known after E events: the most probable theta, and the inverse of the curvature there (MacKay 1992).

    features [C,d], index [E,K] rows of features, ranks [E,K] (1 = best, equal = tie, 0 = not ranked), log_tie [K-1], weight [E] of each event.
    The log-likelihood is concave, so Newton's steps, halved where they go too far, end at its only maximum. Raises ValueError where features are not finite.
    """
    rows = features.double()[index]  # [E,K,d]
    check_finite(rows)
    w = torch.ones(len(index), dtype=torch.float64) if weight is None else weight.double()
    precision = torch.linalg.inv(before.covariance)  # [d,d]

    def told(theta: Tensor) -> tuple[float, Tensor, Tensor]:
        """Log-posterior up to a constant, its gradient [d] and minus its curvature [d,d]."""
        value, slope, curve = derivatives(rows @ theta, ranks, log_tie.double())
        away = theta - before.mean
        gradient = torch.einsum("e,ek,ekd->d", w, slope, rows) - precision @ away
        return float((w * value).sum() - 0.5 * away @ precision @ away), gradient, precision + torch.einsum("e,ekd,ekl,elf->df", w, rows, curve, rows)

    theta = before.mean.clone()
    value, gradient, curvature = told(theta)
    for _ in range(100):
        step = torch.linalg.solve(curvature, gradient)
        if gradient @ step < 1e-14:  # twice what can still be gained
            break
        size = 1.0
        while (new := told(theta + size * step))[0] < value and size > 1e-3:
            size /= 2
        if new[0] < value:
            break
        theta, (value, gradient, curvature) = theta + size * step, new
    return Posterior(theta, torch.linalg.inv(curvature))


def check_finite(features: Tensor) -> None:
    """Raises ValueError where they are not."""
    if not torch.isfinite(features).all():
        raise ValueError("features of clips must be finite: leave out clips that cannot be judged")


def derivatives(scores: Tensor, ranks: Tensor, log_tie: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of Davidson-Luce, log_tie [K-1]: scores [E,K] -> log-probabilities of the rankings [E], their gradients [E,K] and minus their second derivatives [E,K,K]."""
    with torch.enable_grad():
        s = scores.detach().requires_grad_()
        value = davidson_luce(s, ranks, log_tie.clamp(min=IMPOSSIBLE))
        (slope,) = torch.autograd.grad(value.sum(), s, create_graph=True)
        curve = [torch.autograd.grad(slope[:, k].sum(), s, retain_graph=True)[0] for k in range(s.shape[1])]
    return value.detach(), slope.detach(), -torch.stack(curve, dim=1)


# Every ranking of K clips at once


@lru_cache(maxsize=16)
def _rankings(k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of k clips: the mean of each set [M,K], which sets lie within which [M,M], and for each of `weak_orders` which sets were chosen, and from which sets, [Y,M] each."""
    codes = torch.arange(1, 2**k)
    member = ((codes[:, None] >> torch.arange(k)) & 1).double()  # [M,K]
    within = (codes[:, None] & codes[None, :]) == codes[None, :]  # [M,M] row: the set chosen from
    orders = weak_orders(k)
    chosen, present = torch.zeros(2, len(orders), len(codes), dtype=torch.float64)
    for y, ranks in enumerate(orders):
        for level in range(1, int(ranks.max()) + 1):
            for table, there in ((chosen, ranks == level), (present, ranks >= level)):
                table[y, int((there.long() << torch.arange(k)).sum()) - 1] += 1
    return member / member.sum(-1, keepdim=True), within, chosen, present


def ranking_log_probs(scores: Tensor, log_tie: Tensor) -> Tensor:
    """Log-probability of every ranking with ties, in the order of `ranking.weak_orders`: scores [...,K], log_tie [K-1] -> [...,Y] (Davidson-Luce)."""
    _, _, chosen, present = _rankings(scores.shape[-1])
    worth, total = _worths(scores, log_tie)
    return worth @ chosen.T - total @ present.T


def _worths(scores: Tensor, log_tie: Tensor) -> tuple[Tensor, Tensor]:
    """Log-worth of every set, and of all that could be chosen from it, [...,M] each."""
    mean, within, _, _ = _rankings(scores.shape[-1])
    size = (mean > 0).sum(-1)  # [M]
    delta = torch.cat([torch.zeros(1, dtype=torch.float64), log_tie.double().clamp(min=IMPOSSIBLE)])[size - 1]  # [M]
    worth = delta + scores.double() @ mean.T  # [...,M]
    return worth, worth[..., None, :].masked_fill(~within, -torch.inf).logsumexp(-1)


def fisher_information(scores: Tensor, log_tie: Tensor) -> Tensor:
    """What a ranking is expected to tell about the scores: scores [N,K] -> [N,K,K].

    Place by place: the probability that a set is what remains, times the covariance of the mean of the subset that is chosen from it.
    """
    mean, within, _, present = _rankings(scores.shape[-1])
    worth, total = _worths(scores, log_tie)
    visited = ranking_log_probs(scores, log_tie).exp() @ present  # [N,M]
    share = (worth[:, None, :] - total[:, :, None]).masked_fill(~within, -torch.inf).exp()  # [N,M,M]
    centre = share @ mean  # [N,M,K]
    square = torch.einsum("nrm,mk,ml->nrkl", share, mean, mean)
    return torch.einsum("nr,nrkl->nkl", visited, square - centre[..., :, None] * centre[..., None, :])


# How much a task would tell


def expected_information(posterior: Posterior, features: Tensor, tasks: Tensor, log_tie: Tensor, *, nodes: int = 400, seed: int = 0) -> Tensor:
    """`bald` of each task: features [C,d], tasks [N,K] rows of them -> nats [N].

    The K - 1 differences of scores are integrated on a Gauss-Hermite grid of at most `nodes` places, or with as many seeded draws where such a grid is too rough (K > 4).
    """
    k = tasks.shape[1]
    z, w = _nodes(k - 1, nodes, seed)  # [S,K-1], [S]
    x = features.double()
    rows = len(_rankings(k)[2]) * len(z)
    return torch.cat([_bald(posterior, x[some], log_tie, z, w) for some in tasks.split(max(1, NUMBERS // rows))])


def _bald(posterior: Posterior, x: Tensor, log_tie: Tensor, z: Tensor, w: Tensor) -> Tensor:
    """x [N,K,d] -> [N]."""
    away = x[:, 1:] - x[:, :1]  # [N,K-1,d]
    value, vector = torch.linalg.eigh(away @ posterior.covariance @ away.transpose(1, 2))
    root = vector * value.clamp(min=0).sqrt()[:, None, :]  # [N,K-1,K-1]
    other = (away @ posterior.mean)[:, None] + z @ root.transpose(1, 2)  # [N,S,K-1]
    log_p = ranking_log_probs(torch.cat([torch.zeros_like(other[..., :1]), other], dim=-1), log_tie)  # [N,S,Y]
    p = log_p.exp()
    mixture = torch.einsum("nsy,s->ny", p, w)
    return torch.special.entr(mixture).sum(-1) + torch.einsum("nsy,s->n", p * log_p, w)


@lru_cache(maxsize=16)
def _nodes(d: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places [S,d] and weights [S] of a standard normal."""
    number = min(64, int(most ** (1 / d) + 1e-9))
    if number < ROUGH:
        half = torch.from_numpy(np.random.default_rng(seed).standard_normal((most // 2, d)))
        return torch.cat([half, -half]), torch.full((2 * len(half),), 0.5 / len(half), dtype=torch.float64)
    place, weight = np.polynomial.hermite_e.hermegauss(number)
    grid = np.array(list(itertools.product(place, repeat=d)))
    shares = np.array([math.prod(each) for each in itertools.product(weight / weight.sum(), repeat=d)])
    return torch.from_numpy(grid), torch.from_numpy(shares)


def variance_information(posterior: Posterior, features: Tensor, tasks: Tensor, log_tie: Tensor) -> Tensor:
    """`variance` of each task: features [C,d], tasks [N,K] -> [N]."""
    x = features.double()[tasks]  # [N,K,d]
    return torch.einsum("nkl,nlk->n", fisher_information(x @ posterior.mean, log_tie), x @ posterior.covariance @ x.transpose(1, 2))


def d_optimal(posterior: Posterior, features: Tensor, tasks: Tensor, log_tie: Tensor, number: int) -> tuple[list[int], Tensor]:
    """The first `number` tasks of a D-optimal batch, greedily, and what each added to the log-determinant of the precision: features [C,d], tasks [N,K].

    F is taken at the mean scores. A task adds the K rows of F^(1/2) x to the design; log det(I + U covariance U^T) is its gain (matrix determinant lemma), and
    the covariance takes its rows one at a time (Sherman & Morrison 1950).
    """
    x = features.double()[tasks]  # [N,K,d]
    value, vector = torch.linalg.eigh(fisher_information(x @ posterior.mean, log_tie))
    design = value.clamp(min=0).sqrt()[..., None] * (vector.transpose(1, 2) @ x)  # [N,K,d]
    covariance = posterior.covariance.clone()
    told = design @ covariance @ design.transpose(1, 2)  # [N,K,K]
    free = torch.ones(len(tasks), dtype=torch.bool)
    order, gains = [], []
    for _ in range(min(number, len(tasks))):
        gain = torch.logdet(torch.eye(tasks.shape[1], dtype=torch.float64) + told).masked_fill(~free, -torch.inf)  # [N]
        best = int(gain.argmax())
        free[best] = False
        order.append(best)
        gains.append(gain[best])
        for row in design[best]:
            along = covariance @ row  # [d]
            size = 1 + row @ along
            covariance -= along[:, None] * along[None, :] / size
            across = design @ along  # [N,K]
            told -= across[:, :, None] * across[:, None, :] / size
    return order, torch.stack(gains) if gains else torch.zeros(0, dtype=torch.float64)


def best_first(method: Method, posterior: Posterior, features: Tensor, tasks: Tensor, log_tie: Tensor, *, number: int, seed: int) -> list[int]:
    """Every row of the tasks [N,K], the `number` most worthwhile first, the best of all in front; the others, and equal ones, in an order drawn from the seed.

    Raises ValueError where features of their clips, or tie parameters but -inf, are not finite: an unknown worth would come first.
    """
    check_finite(features[tasks])
    if torch.isnan(log_tie).any() or (log_tie == torch.inf).any():
        raise ValueError(f"log tie parameters are finite numbers or -inf, got {log_tie.tolist()}")
    shuffled = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(tasks)))
    if method == "random" or not len(tasks):
        return shuffled.tolist()
    mixed = tasks[shuffled]
    if method == "d_optimal":
        first, _ = d_optimal(posterior, features, mixed, log_tie, number)
    else:
        value = (expected_information if method == "bald" else variance_information)(posterior, features, mixed, log_tie)
        first = value.argsort(descending=True, stable=True)[:number].tolist()
    taken = set(first)
    return shuffled[first + [row for row in range(len(tasks)) if row not in taken]].tolist()
