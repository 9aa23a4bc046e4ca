"""How far a linear score that was learned from rankings can be believed.

    what people share about a clip  =  w . x  +  delta,    w ~ N(fitted, covariance),    delta ~ (0, tau^2), another one for every clip

`robust_covariance` says what the weights w may be, `fit_misfit` how large the misfit delta is: what people see in a clip and its inputs x do not tell. More rankings make the
first smaller, never the second. A score of one clip alone is known up to what all clips have in common; a difference of two has the variance

    (x_a - x_b)^T covariance (x_a - x_b)  +  2 tau^2

Letters: C clips, d inputs, E events (rankings) of up to K clips, P pairs of clips, S nodes of quadrature.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reward.ranking import davidson
from reward.selection import derivatives

LOGISTIC = math.pi**2 / 3
"""Variance of the noise in a pair's answer at a score in log-odds."""
SLOPE = 0.3
"""Scores that were fitted to the same answers need a factor of about 1: its logarithm is N(0, SLOPE^2)."""
NODES = 16
AT_ONCE = 20_000  # pairs


# The weights


def robust_covariance(theta: Tensor, precision: Tensor, features: Tensor, index: Tensor, ranks: Tensor, log_tie: Tensor, *, weight: Tensor, cluster: Tensor) -> Tensor:
    """Covariance [d,d], float64, of weights theta [d] at the maximum of a penalised Davidson-Luce likelihood: H^-1 (precision + B) H^-1.

    features [C,d], index [E,K] rows of features, ranks [E,K] (1 = best, equal = tie, 0 = not ranked), log_tie [K-1], weight [E] of each event, cluster [E] the number of its
    prompt. H [d,d] is the curvature, precision [d,d] the part of it that is the prior's (the penalty's). B sums g g^T over prompts, g [d] the slope of all that was said of one.

    Where people answer as the model says, with weights of 1 and nobody ranking what another one has ranked, B is the likelihood's curvature on average, and this is Laplace's H^-1.
    Where several people rank the same clips, whose misfit is in all their answers, or weights make of the likelihood a pseudo-likelihood, H^-1 is wrong and this is not
    (Huber 1967; clusters: Liang & Zeger 1986). Slopes at the fit are smaller than at the truth: B is raised by n / (n - effective number of weights), for n prompts
    (MacKinnon & White 1985).
    """
    rows, w = features.double()[index], weight.double()  # [E,K,d], [E]
    _, slope, curve = derivatives(rows @ theta.double(), ranks, log_tie.double())
    curvature = torch.einsum("e,ekd,ekl,elf->df", w, rows, curve, rows)
    inverse = torch.linalg.inv(precision.double() + curvature)
    by_prompt = torch.zeros(int(cluster.max()) + 1 if len(cluster) else 0, len(theta), dtype=torch.float64)
    by_prompt.index_add_(0, cluster, torch.einsum("e,ek,ekd->ed", w, slope, rows))  # [n,d]
    n, used = len(cluster.unique()), float(torch.trace(inverse @ curvature))
    middle = precision.double() + by_prompt.T @ by_prompt * n / max(n - used, 1.0)
    return inverse @ middle @ inverse


# The misfit


class Misfit(NamedTuple):
    """What a clip's inputs do not tell of it."""

    std: float  # tau, in the unit of the scores
    shared: float  # of the noise in people's answers at given scores, the share that is about the clip: whoever else judges it, too, sees it
    pairs: int  # of clips, judged by several people: all that is known of it is from these


def fit_misfit(votes: Tensor, difference: Tensor) -> Misfit:
    """How large the misfit is, by empirical Bayes from how far people agree beyond the scores.

    votes [P,3]: how many people called the first clip of a pair better, the two equal, the second one better. difference [P]: score of the first clip minus score of the
    second, of scores that were fitted to these answers. A person's answer about a pair is Davidson's of c (difference + eta); eta is the same for all who judge the pair, has the
    variance 2 tau^2, and is integrated out. c is so large that the person's own noise and eta together are the logistic noise of a score in log-odds, were it k times as steep:

        2 tau^2 = shared LOGISTIC / k^2        c = k / sqrt(1 - shared)        shared uniform on (0, 1), log k ~ N(0, SLOPE^2), log tie parameter ~ N(0, 3^2)

    One person's noise and a misfit look alike in one answer, so pairs that one person judged are left out; without any other, half of the noise is taken for misfit. eta is double
    exponential: small for most pairs and large for some, as where a shape was misread; a normal one gave a tau too small by a tenth or more for the people of
    `rushes bench calibration`. Pairs count as independent, though those of one ranking are not: a composite likelihood (Varin et al. 2011), which aims at the same tau and is only
    too sure of it.
    """
    several = votes.sum(-1) > 1  # [P]
    counts, gap = votes[several].double(), difference[several].double()
    node, log_weight = _double_exponential(NODES)
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # log k, logit of shared, log tie parameter
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        log_k, logit, log_tie = parameters
        loss = (log_k / SLOPE).square() / 2 + (log_tie / 3).square() / 2 - torch.nn.functional.logsigmoid(torch.stack([logit, -logit])).sum()
        loss.backward()
        total = float(loss.detach())
        for some in torch.arange(len(gap)).split(AT_ONCE):
            log_k, logit, log_tie = parameters
            eta = (logit.sigmoid() * LOGISTIC).sqrt() * (-log_k).exp() * node  # [S]
            log_prob = davidson((log_k - torch.nn.functional.logsigmoid(-logit) / 2).exp() * (gap[some, None] + eta), log_tie)  # [P,S,3]
            part = -(torch.einsum("pso,po->ps", log_prob, counts[some]) + log_weight).logsumexp(-1).sum()
            part.backward()
            total += float(part.detach())
        return total

    optimizer.step(closure)
    log_k, logit, _ = parameters.detach()
    shared = float(logit.sigmoid())
    return Misfit(math.sqrt(shared * LOGISTIC / 2) * math.exp(-float(log_k)), shared, len(gap))


@lru_cache(maxsize=4)
def _double_exponential(number: int) -> tuple[Tensor, Tensor]:
    """Nodes and log-weights [2 number] of E[f(z)], z double exponential with mean 0 and variance 1 (Gauss-Laguerre on either side)."""
    node, weight = np.polynomial.laguerre.laggauss(number)
    half = np.log(weight / weight.sum() / 2)
    return torch.from_numpy(np.concatenate([-node, node])) / math.sqrt(2), torch.from_numpy(np.concatenate([half, half]))
