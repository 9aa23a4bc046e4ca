"""Doubt about a score: against derivatives by torch, brute force, scipy, and worlds whose weights and misfits are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor

from reward import doubt
from reward.doubt import LOGISTIC, fit_misfit, robust_covariance
from reward.ranking import davidson, davidson_luce, weak_orders
from reward.selection import laplace_posterior, prior

NO_TIES = torch.tensor([-math.inf])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# The weights


def test_the_covariance_is_made_of_the_slopes_and_the_curvature_that_torch_finds() -> None:
    features, index, log_tie = normal(20, 3), torch.randint(20, (12, 3), generator=generator(1)), torch.tensor([-0.4, -1.3])
    ranks = weak_orders(3)[torch.randint(13, (12,), generator=generator(2))]
    ranks[3], ranks[4] = torch.tensor([1, 2, 0]), torch.tensor([0, 0, 0])
    weight, cluster = torch.rand(12, generator=generator(3)) + 0.2, torch.tensor([0, 0, 2, 2, 2, 5, 6, 7, 8, 9, 9, 9])  # seven prompts; some numbers are nobody's
    precision, theta = torch.diag(torch.tensor([2.0, 1.0, 0.5])), normal(3, seed=4)

    def told(theta: Tensor, rows: Tensor) -> Tensor:
        value = davidson_luce((features @ theta)[index[rows]], ranks[rows], log_tie.double())
        return (weight[rows].double() * value).sum()

    everything = torch.arange(12)
    curvature = -torch.autograd.functional.hessian(lambda t: told(t, everything), theta)
    slopes = torch.stack([torch.autograd.functional.jacobian(lambda t, rows=rows: told(t, rows), theta) for rows in (everything[cluster == n] for n in cluster.unique())])
    inverse = torch.linalg.inv(precision.double() + curvature)
    used = torch.trace(inverse @ curvature)
    expected = inverse @ (precision.double() + slopes.T @ slopes * 7 / (7 - used)) @ inverse
    found = robust_covariance(theta.float().double(), precision, features, index, ranks, log_tie, weight=weight, cluster=cluster)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_with_many_answers_by_the_model_it_is_the_posterior_that_brute_force_finds() -> None:
    """4,000 pairs, two weights: mean and covariance of the posterior on a grid."""
    away, truth = normal(4_000, 2), torch.tensor([0.8, -0.5], dtype=torch.float64)
    won = torch.rand(4_000, generator=generator(1), dtype=torch.float64) < torch.sigmoid(away @ truth)
    features, index = torch.cat([away, torch.zeros(1, 2, dtype=torch.float64)]), torch.stack([torch.arange(4_000), torch.full((4_000,), 4_000)], dim=1)
    ranks = torch.where(won[:, None], torch.tensor([1, 2]), torch.tensor([2, 1]))
    found = laplace_posterior(prior(2, 4.0), features, index, ranks, NO_TIES)
    width = found.covariance.diagonal().sqrt()
    side = torch.linspace(-6, 6, 121, dtype=torch.float64)
    grid = found.mean + width * torch.cartesian_prod(side, side)  # [G,2]
    log_p = torch.cat([torch.nn.functional.logsigmoid((some @ away.T) * (2 * won.double() - 1)).sum(1) for some in grid.split(1_000)]) - 2 * grid.square().sum(1)
    share = (log_p - log_p.max()).softmax(0)
    mean = share @ grid
    covariance = (grid - mean).T @ (share[:, None] * (grid - mean))
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=0.05 * float(width.min()))
    torch.testing.assert_close(found.covariance, covariance, rtol=0.01, atol=0.01 * float(covariance.diagonal().max()))
    robust = robust_covariance(found.mean, torch.eye(2) * 4.0, features, index, ranks, NO_TIES, weight=torch.ones(4_000), cluster=torch.arange(4_000))
    torch.testing.assert_close(robust, covariance, rtol=0.06, atol=0.06 * float(covariance.diagonal().max()))


def test_without_answers_the_doubt_is_the_priors() -> None:
    nothing = torch.zeros(0, 2, dtype=torch.long)
    found = robust_covariance(torch.zeros(3), 2 * torch.eye(3), normal(4, 3), nothing, nothing, NO_TIES, weight=torch.zeros(0), cluster=torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64) / 2)
    one = torch.tensor([[0, 1]])
    alone = robust_covariance(torch.zeros(3), 2 * torch.eye(3), 10 * normal(4, 3), one, one + 1, NO_TIES, weight=torch.ones(1), cluster=torch.tensor([3]))
    assert torch.isfinite(alone).all() and (torch.linalg.eigvalsh(alone) > 0).all(), "one prompt is fewer than the effective number of weights and one"


def test_intervals_hold_where_people_rank_the_same_clips_and_those_of_the_curvature_do_not() -> None:
    """Eight people rank each of 60 pairs, whose misfit is in all their answers. 90 % intervals of differences of new clips, over 60 worlds.

    A normal misfit makes the best logistic weights flatter by a factor that is found with 100,000 pairs.
    """
    rng, d, people, pairs, sd, deviation = np.random.default_rng(0), 4, 8, 60, 2.0, 0.7

    def answers(truth: Tensor, number: int, judges: int) -> tuple[Tensor, Tensor]:
        away = torch.from_numpy(rng.normal(size=(number, d)))
        p = torch.sigmoid(away @ truth + sd * torch.from_numpy(rng.normal(size=number)))
        return away, torch.from_numpy(rng.random((judges, number))) < p

    def fitted(away: Tensor, won: Tensor, precision: float) -> tuple[Tensor, Tensor, Tensor]:
        """The weights, the curvature's covariance and the robust one."""
        number, judges = len(away), len(won)
        features = torch.cat([away, torch.zeros(1, d, dtype=torch.float64)])
        index = torch.stack([torch.arange(number), torch.full((number,), number)], dim=1).repeat(judges, 1)
        ranks = torch.where(won.flatten()[:, None], torch.tensor([1, 2]), torch.tensor([2, 1]))
        found = laplace_posterior(prior(d, precision), features, index, ranks, NO_TIES)
        given = {"weight": torch.ones(len(index)), "cluster": torch.arange(number).repeat(judges)}
        return found.mean, found.covariance, robust_covariance(found.mean, precision * torch.eye(d), features, index, ranks, NO_TIES, **given)

    direction = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    flatter = float(fitted(*answers(direction, 100_000, 1), 1e-6)[0][0])
    hits = np.zeros(2)
    for _ in range(60):
        truth = deviation * torch.from_numpy(rng.normal(size=d))
        mean, *covariances = fitted(*answers(truth, pairs, people), (flatter * deviation) ** -2)
        new = torch.from_numpy(rng.normal(size=(200, d)))
        error = (new @ (mean - flatter * truth)).abs()
        hits += [float((error < 1.645 * ((new @ each) * new).sum(-1).sqrt()).double().mean()) / 60 for each in covariances]
    assert hits[0] < 0.75 and 0.86 < hits[1] < 0.94, hits


# The misfit


def simulated(tau: float, people: int, *, pairs: int = 6_000, kind: str = "double exponential", alone: bool = False, slope: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Votes and differences of a world of that misfit, in which people tie. alone: everybody has another misfit, which is then no misfit but noise."""
    rng = np.random.default_rng(seed)
    shared = 2 * tau**2 * slope**2 / LOGISTIC
    difference = torch.from_numpy(1.5 * rng.normal(size=pairs))
    size = (people if alone else 1, pairs)
    eta = math.sqrt(2) * tau * torch.from_numpy(rng.normal(size=size) if kind == "normal" else rng.laplace(size=size) / math.sqrt(2))
    p = davidson(slope / math.sqrt(1 - shared) * (difference + eta), torch.tensor(-0.5)).exp().expand(people, pairs, 3)  # [people,P,3]
    answer = (torch.from_numpy(rng.random((people, pairs, 1))) > p.cumsum(-1)).sum(-1).clamp(max=2)
    return torch.nn.functional.one_hot(answer, 3).sum(0), difference


@pytest.mark.parametrize(("tau", "slope"), [(0.3, 1.0), (0.7, 1.0), (1.1, 1.0), (0.5, 1.4)])
def test_a_planted_misfit_is_found(tau: float, slope: float) -> None:
    found = fit_misfit(*simulated(tau, 3, slope=slope))
    assert found.std == pytest.approx(tau, rel=0.08, abs=0.04) and found.shared == pytest.approx(2 * tau**2 * slope**2 / LOGISTIC, abs=0.05) and found.pairs == 6_000


def test_a_normal_misfit_is_found_nearly_as_well() -> None:
    assert fit_misfit(*simulated(0.7, 3, kind="normal")).std == pytest.approx(0.7, rel=0.2)


def test_noise_that_nobody_shares_is_no_misfit() -> None:
    """Answers scatter as much as with a misfit of 0.9; but where people disagree, it is not about the clip."""
    assert fit_misfit(*simulated(0.9, 3, alone=True)).std < 0.25


def test_what_one_person_judged_tells_nothing_of_the_misfit() -> None:
    votes, difference = simulated(0.7, 3, pairs=300)
    single, gap = simulated(0.1, 1, pairs=2_000, seed=1)
    assert fit_misfit(torch.cat([votes, single]), torch.cat([difference, gap])) == fit_misfit(votes, difference)
    nothing = fit_misfit(single, gap)
    assert nothing == fit_misfit(torch.zeros(0, 3), torch.zeros(0)) and nothing.pairs == 0
    assert nothing.shared == pytest.approx(0.5) and nothing.std == pytest.approx(math.sqrt(LOGISTIC / 4))


def test_which_clip_is_the_first_and_how_many_pairs_are_held_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    votes, difference = simulated(0.7, 2, pairs=400)
    found = fit_misfit(votes, difference)
    assert fit_misfit(votes.flip(1), -difference).std == pytest.approx(found.std, rel=1e-4)
    monkeypatch.setattr(doubt, "AT_ONCE", 150)
    assert fit_misfit(votes, difference).std == pytest.approx(found.std, rel=1e-4)


def test_certain_answers_keep_the_misfit_finite() -> None:
    """Everybody agrees and the score is always right; or always wrong."""
    difference = normal(200).abs() + 0.1
    for sign in (1, -1):
        found = fit_misfit(torch.tensor([[3, 0, 0]]).expand(200, 3), sign * difference)
        assert math.isfinite(found.std) and 0 < found.shared < 1


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_quadrature_is_the_integral(scale: float) -> None:
    node, log_weight = doubt._double_exponential(doubt.NODES)
    for mean in (-2.0, 0.0, 0.7):

        def integrand(z: float, mean: float = mean) -> float:
            return math.exp(-math.sqrt(2) * abs(z)) / math.sqrt(2) / (1 + math.exp(-mean - scale * z))

        expected = sum(integrate.quad(integrand, *ends)[0] for ends in ((-30, 0), (0, 30)))
        assert float((log_weight.exp() * torch.sigmoid(mean + scale * node)).sum()) == pytest.approx(expected, abs=2e-3)
    assert float((log_weight.exp() * node**2).sum()) == pytest.approx(1.0) and float((log_weight.exp() * node).sum()) == pytest.approx(0.0, abs=1e-12)
