"""Ranking likelihoods against each other, against choix and R's PlackettLuce, against quadrature, and against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import choix
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

from reward.ranking import (
    all_pairs,
    best_worst,
    bradley_terry,
    davidson,
    davidson_luce,
    heteroscedastic,
    masked_mean,
    pair_outcomes,
    plackett_luce,
    rao_kupper,
    tie_parameter,
    tie_threshold,
    weak_orders,
)

NO_TIES = torch.tensor([-math.inf] * 3, dtype=torch.float64)
TIES = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)


def scores(batch: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strict_ranks(batch: int, k: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, k, generator=torch.Generator().manual_seed(seed)).argsort(-1).argsort(-1) + 1


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def maximise(log_likelihood: Callable[[torch.Tensor], torch.Tensor], size: int) -> torch.Tensor:
    """The parameters [size] at the top, by Newton steps from 0."""
    parameters = torch.zeros(size, dtype=torch.float64)
    for _ in range(50):
        gradient = torch.autograd.functional.jacobian(log_likelihood, parameters)
        step = torch.linalg.solve(torch.autograd.functional.hessian(log_likelihood, parameters), gradient)
        parameters = parameters - step * min(1.0, 2 / step.norm().item())
        if step.norm() < 1e-12:
            return parameters
    raise AssertionError(f"no maximum after 50 steps, {parameters}")


def worths_of(parameters: torch.Tensor) -> torch.Tensor:
    """The first clip's worth is 0, as in R."""
    return torch.cat([parameters.new_zeros(1), parameters])


def test_davidson_luce_of_two_clips_is_davidson() -> None:
    r = scores(50, 2)
    log_tie = torch.tensor(0.3, dtype=torch.float64)
    expected = davidson(r[:, 0] - r[:, 1], log_tie)  # [50, 3]
    for outcome, ranks in enumerate([(1, 2), (1, 1), (2, 1)]):
        found = davidson_luce(r, torch.tensor(ranks).expand(50, 2), log_tie[None])
        torch.testing.assert_close(found, expected[:, outcome], rtol=0, atol=1e-12)


def test_davidson_without_ties_is_bradley_terry() -> None:
    d = scores(50, 1)[:, 0]
    found = davidson(d, torch.tensor(-math.inf, dtype=torch.float64))
    torch.testing.assert_close(found[:, 0], bradley_terry(d), rtol=0, atol=1e-12)
    assert torch.all(found[:, 1] == -math.inf)


def test_davidson_luce_without_ties_is_plackett_luce_for_partial_rankings_too() -> None:
    r, ranks = scores(60, 4), strict_ranks(60, 4)
    ranks[:20, 2] = 0
    ranks[10:15, 0] = 0
    torch.testing.assert_close(davidson_luce(r, ranks, NO_TIES), plackett_luce(r, ranks), rtol=0, atol=1e-12)


def test_plackett_luce_of_two_clips_is_bradley_terry() -> None:
    r = scores(40, 2)
    found = plackett_luce(r, torch.tensor([1, 2]).expand(40, 2))
    torch.testing.assert_close(found, bradley_terry(r[:, 0] - r[:, 1]), rtol=0, atol=1e-12)


def test_plackett_luce_agrees_with_choix() -> None:
    worths = scores(1, 6)[0]
    generator = np.random.default_rng(3)
    data = [tuple(int(i) for i in generator.permutation(6)[:4]) for _ in range(200)]  # choix: best first
    ranks = torch.tensor([[1, 2, 3, 4]] * len(data))
    ours = plackett_luce(worths[torch.tensor(data)], ranks)
    # choix takes a ranking of a subset to be complete on that subset only
    assert -ours.sum().item() == pytest.approx(_choix_cost(worths.numpy(), data), abs=1e-6)


def _choix_cost(worths: np.ndarray, data: list[tuple[int, ...]]) -> float:
    as_top1 = [(ranking[i], ranking[i + 1 :]) for ranking in data for i in range(len(ranking) - 1)]
    return float(choix.opt.Top1Fcts(as_top1, penalty=0.0).objective(worths))


def test_the_worths_that_maximise_plackett_luce_and_bradley_terry_are_those_of_choix() -> None:
    data = [tuple(int(i) for i in np.random.default_rng(seed).permutation(5)) for seed in range(60)]
    ranks = torch.arange(1, 6).expand(len(data), 5)
    ours = worths_of(maximise(lambda p: plackett_luce(worths_of(p)[torch.tensor(data)], ranks).sum(), 4))
    expected = torch.from_numpy(choix.opt_rankings(5, data, alpha=0, tol=1e-12))
    torch.testing.assert_close(ours - ours.mean(), expected - expected.mean(), rtol=0, atol=1e-6)
    pairs = [(a, b) for ranking in data for a, b in itertools.pairwise(ranking)]  # choix: the winner first
    winner, loser = torch.tensor(pairs).T
    ours = worths_of(maximise(lambda p: bradley_terry(worths_of(p)[winner] - worths_of(p)[loser]).sum(), 4))
    expected = torch.from_numpy(choix.opt_pairwise(5, pairs, alpha=0, tol=1e-12))
    torch.testing.assert_close(ours - ours.mean(), expected - expected.mean(), rtol=0, atol=1e-6)


# R's PlackettLuce. Fruits: the example of ?PlackettLuce and what its page prints (https://hturner.github.io/PlackettLuce/reference/PlackettLuce.html, version 0.4.4).
# Pudding: Davidson (1970), example 2, `pudding` of that package; estimates and errors as `summary(mod)` and `qvcalc(mod)` print them in its vignette "Overview".

FRUITS = torch.tensor([[1, 2, 0, 0], [4, 1, 2, 3], [2, 1, 1, 1], [1, 2, 3, 0], [2, 1, 1, 0], [1, 0, 3, 2]])  # apple, banana, orange, pear; 0 = not ranked
PUDDING = torch.tensor(
    [  # brands i and j, times i was preferred, times j was, ties
        *([1, 2, 19, 22, 16], [1, 3, 16, 19, 12], [2, 3, 19, 19, 10], [1, 4, 18, 23, 13], [2, 4, 23, 19, 9]),
        *([3, 4, 19, 20, 15], [1, 5, 13, 19, 18], [2, 5, 16, 20, 12], [3, 5, 16, 15, 17], [4, 5, 17, 14, 16]),
        *([1, 6, 18, 21, 12], [2, 6, 22, 20, 12], [3, 6, 13, 18, 10], [4, 6, 14, 19, 18], [5, 6, 11, 21, 12]),
    ]
)


def fruits(parameters: torch.Tensor) -> torch.Tensor:
    """Worths of three clips, log delta_2 and log delta_3; nobody ties four, which R leaves out of the model."""
    log_tie = torch.cat([parameters[3:], NO_TIES[:1]])
    return davidson_luce(worths_of(parameters[:3]).expand(6, 4), FRUITS, log_tie).sum()


def test_maximum_likelihood_with_ties_and_partial_rankings_is_that_of_r() -> None:
    found = maximise(fruits, 5)
    torch.testing.assert_close(found, double(0.2942875, -0.7335113, -0.1190960, -1.8619467, -0.7369735), rtol=0, atol=1e-6)


def test_the_posterior_mode_with_ties_under_a_normal_prior_is_that_of_r() -> None:
    """R: independent N(0, 9) on all four log-worths, none fixed; printed with the first at 0, to the tolerance of its BFGS."""

    def log_posterior(p: torch.Tensor) -> torch.Tensor:
        log_tie = torch.cat([p[4:], NO_TIES[:1]])
        return davidson_luce(p[:4].expand(6, 4), FRUITS, log_tie).sum() - p[:4].square().sum() / 18

    found = maximise(log_posterior, 6)
    printed = torch.cat([found[1:4] - found[0], found[4:]])
    torch.testing.assert_close(printed, double(0.2753696, -0.6772960, -0.1030173, -1.8679502, -0.7453151), rtol=0, atol=3e-5)


def test_estimates_errors_and_deviance_of_the_pudding_data_are_those_of_r() -> None:
    """R stopped after seven iterations, to print what Davidson did, so its last digits are not the maximum's."""
    i, j, *times = PUDDING.T
    ranks = torch.tensor([[1, 2], [2, 1], [1, 1]]).repeat_interleave(15, 0)
    weight = torch.cat(times)

    def log_likelihood(p: torch.Tensor) -> torch.Tensor:
        worth = worths_of(p[:5])
        return (davidson_luce(torch.stack([worth[i - 1], worth[j - 1]], -1).repeat(3, 1), ranks, p[5:]) * weight).sum()

    assert weight.sum() == 745
    found = maximise(log_likelihood, 6)
    torch.testing.assert_close(found, double(0.2202447, 0.1529644, 0.1752864, 0.1338550, 0.3771362, -0.291938), rtol=0, atol=2e-4)
    error = torch.linalg.inv(-torch.autograd.functional.hessian(log_likelihood, found)).diagonal().sqrt()
    torch.testing.assert_close(error, double(0.1872168, 0.1935181, 0.1882110, 0.1927043, 0.1924059, 0.082499), rtol=0, atol=1e-5)
    assert -2 * log_likelihood(found).item() == pytest.approx(1619.4, abs=0.05)
    worth = worths_of(found[:5]).softmax(0)
    torch.testing.assert_close(worth, double(0.1388005, 0.1729985, 0.1617420, 0.1653930, 0.1586805, 0.2023855), rtol=0, atol=3e-5)
    assert found[5].exp().item() == pytest.approx(0.7468147, abs=1e-5)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_probabilities_of_all_rankings_with_ties_sum_to_one(k: int) -> None:
    orders = weak_orders(k)
    assert len(orders) == {2: 3, 3: 13, 4: 75}[k]
    total = davidson_luce(scores(1, k).expand(len(orders), k), orders, TIES).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-12)


def test_a_likelihood_written_as_loops_agrees() -> None:
    r, log_tie = scores(1, 4)[0], torch.tensor([0.1, -0.4, -0.9], dtype=torch.float64)

    def worth(clips: tuple[int, ...]) -> float:
        delta = 1.0 if len(clips) == 1 else math.exp(log_tie[len(clips) - 2])
        return delta * math.exp(sum(r[i].item() for i in clips) / len(clips))

    for ranks in weak_orders(4).tolist():
        remaining, expected = list(range(4)), 0.0
        for place in range(1, max(ranks) + 1):
            choice = tuple(i for i in remaining if ranks[i] == place)
            options = itertools.chain.from_iterable(itertools.combinations(remaining, n) for n in range(1, len(remaining) + 1))
            expected += math.log(worth(choice) / sum(worth(option) for option in options))
            remaining = [i for i in remaining if i not in choice]
        assert davidson_luce(r[None], torch.tensor([ranks]), log_tie).item() == pytest.approx(expected, abs=1e-12)


def test_only_the_order_of_ranks_counts_and_clips_may_be_permuted() -> None:
    r = scores(75, 4)
    ranks = weak_orders(4)
    found = davidson_luce(r, ranks, TIES)
    torch.testing.assert_close(davidson_luce(r, 3 * ranks + 2, TIES), found, rtol=0, atol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(davidson_luce(r[:, order], ranks[:, order], TIES), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(davidson_luce(r + 5, ranks, TIES), found, rtol=0, atol=1e-12)
    by_pairs = all_pairs(r, ranks, partial(davidson, log_tie=TIES[0]))
    torch.testing.assert_close(all_pairs(r[:, order], ranks[:, order], partial(davidson, log_tie=TIES[0])), by_pairs, rtol=0, atol=1e-12)
    best, worst = torch.arange(75) % 4, (torch.arange(75) + 1) % 4
    there = order.argsort()  # where each clip went
    torch.testing.assert_close(best_worst(r[:, order], there[best], there[worst]), best_worst(r, best, worst), rtol=0, atol=1e-12)


def test_one_tie_parameter_per_event_equals_separate_calls() -> None:
    r, ranks = scores(75, 4), weak_orders(4)
    log_tie = scores(75, 3, seed=4)
    separate = torch.cat([davidson_luce(r[i : i + 1], ranks[i : i + 1], log_tie[i]) for i in range(75)])
    torch.testing.assert_close(davidson_luce(r, ranks, log_tie), separate, rtol=0, atol=1e-12)


def test_gradients_in_scores_and_tie_parameters() -> None:
    ranks = torch.cat([weak_orders(4)[::7], torch.tensor([[1, 0, 2, 2], [0, 0, 1, 2]])])
    r = scores(len(ranks), 4).requires_grad_()
    log_tie = TIES.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: davidson_luce(a, ranks, b), (r, log_tie))
    strict = strict_ranks(8, 4)
    assert torch.autograd.gradcheck(lambda a: plackett_luce(a, strict), (scores(8, 4).requires_grad_(),))
    top = torch.tensor([[1, 0, 2, 0]])
    assert torch.autograd.gradcheck(lambda a, b: davidson_luce(a, top, b, top == 0), (scores(1, 4).requires_grad_(), log_tie))


def test_gradients_of_pairs_and_choices() -> None:
    d, log_k = scores(6, 1)[:, 0].requires_grad_(), double(0.7).requires_grad_()
    assert torch.autograd.gradcheck(rao_kupper, (d, log_k))
    spread = scores(6, 2, seed=3).abs()
    assert torch.autograd.gradcheck(heteroscedastic, (d, spread[:, 0].clone().requires_grad_(), spread[:, 1].clone().requires_grad_()))
    best, worst = torch.tensor([0, 3, -1, -1]), torch.tensor([2, -1, 1, -1])
    assert torch.autograd.gradcheck(lambda a: best_worst(a, best, worst), (scores(4, 4).requires_grad_(),))
    ranks = torch.tensor([[1, 2, 2, 4], [0, 1, 2, 0], [1, 1, 1, 1]])
    for tie_model in (None, lambda x: rao_kupper(x, log_k.detach())):
        assert torch.autograd.gradcheck(lambda a, model=tie_model: all_pairs(a, ranks, model), (scores(3, 4).requires_grad_(),))


def test_gradients_stay_finite_when_ties_are_forbidden_and_clips_unranked() -> None:
    r = scores(3, 4).requires_grad_()
    davidson_luce(r, torch.tensor([[1, 2, 3, 4], [0, 2, 1, 0], [0, 0, 0, 0]]), NO_TIES).sum().backward()
    assert r.grad is not None and torch.isfinite(r.grad).all() and torch.all(r.grad[2] == 0)


def test_the_score_of_a_clip_that_takes_no_part_is_not_read() -> None:
    r = scores(2, 4)
    r[:, 1] = math.nan
    r.requires_grad_()
    ranks = torch.tensor([[1, 0, 2, 3], [2, 0, 1, 0]])
    shown, below = torch.tensor([True, False, True, True]).expand(2, 4), torch.tensor([[False] * 4, [False] * 3 + [True]])
    found = (
        *(plackett_luce(r, ranks, below), davidson_luce(r, ranks, TIES), all_pairs(r, ranks), all_pairs(r, ranks, partial(davidson, log_tie=TIES[0]))),
        best_worst(r, torch.tensor([0, 2]), torch.tensor([3, -1]), shown),
    )
    for log_prob in found:
        (gradient,) = torch.autograd.grad(log_prob.sum(), r)
        assert torch.isfinite(log_prob).all() and torch.isfinite(gradient).all() and torch.all(gradient[:, 1] == 0)


def test_equal_clips_tie_with_the_share_the_tie_parameter_came_from() -> None:
    log_tie = torch.tensor(tie_parameter(0.37), dtype=torch.float64)
    assert davidson(torch.zeros(1, dtype=torch.float64), log_tie)[0, 1].exp().item() == pytest.approx(0.37, abs=1e-12)


def test_plackett_luce_refuses_ties() -> None:
    with pytest.raises(ValueError, match="strict rankings"):
        plackett_luce(scores(1, 3), torch.tensor([[1, 1, 2]]))


def test_pair_outcomes_read_ranks_and_skip_unranked_clips() -> None:
    outcome, known = pair_outcomes(torch.tensor([[1, 3, 3, 0]]))
    assert outcome[known].tolist() == [1, 1, 0]
    assert known.tolist() == [[True, True, False, True, False, False]]


# Pairs with a threshold, pairs with a spread


@pytest.mark.parametrize("k", [1.0, 1.5, 5.0])
def test_rao_kupper_is_its_formula_and_sums_to_one(k: float) -> None:
    d = double(-30, -2, -0.1, 0, 0.7, 4, 30)
    found = rao_kupper(d, double(k).log()).exp()
    better, worse = expit(d.numpy() - math.log(k)), expit(-d.numpy() - math.log(k))
    np.testing.assert_allclose(found.T.numpy(), [better, (k**2 - 1) * better * worse, worse], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.sum(-1), torch.ones_like(d), rtol=0, atol=1e-12)


def test_rao_kupper_with_k_of_one_is_bradley_terry_and_learns_the_scores() -> None:
    d = scores(50, 1)[:, 0].requires_grad_()
    found = rao_kupper(d, double(0.0))
    torch.testing.assert_close(found[:, 0], bradley_terry(d), rtol=0, atol=1e-12)
    assert torch.all(found[:, 1] == -math.inf)
    found[:, 0].sum().backward()
    torch.testing.assert_close(d.grad, torch.sigmoid(-d), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="k >= 1"):
        rao_kupper(d, double(-0.1))


def test_thresholds_do_not_overflow_and_rare_outcomes_stay_finite() -> None:
    huge = torch.tensor([-1e4, 0.0, 1e4], requires_grad=True)
    found = rao_kupper(huge, torch.tensor(500.0, requires_grad=True))
    assert torch.isfinite(found).all() and found[1, 1].item() == pytest.approx(0, abs=1e-3), "equal clips nearly always tie"
    found.sum().backward()
    assert huge.grad is not None and torch.isfinite(huge.grad).all()


@pytest.mark.parametrize("share", [0.0, 0.37, 2 / 3])
def test_equal_clips_tie_with_the_share_the_threshold_came_from(share: float) -> None:
    found = rao_kupper(double(0.0), double(tie_threshold(share)))
    assert found[0, 1].exp().item() == pytest.approx(share, abs=1e-12)
    assert tie_threshold(2 / 3) == pytest.approx(math.log(5)), "VideoAlign's k"


@pytest.mark.parametrize("spreads", [(0.0, 0.3), (0.6, 0.8), (1.2, 1.6)])
def test_uncertain_scores_give_the_integral_over_them(spreads: tuple[float, float]) -> None:
    for d in (-5.0, -1.0, 0.0, 0.3, 8.0):
        exact = quad(lambda z, d=d: expit(d + math.hypot(*spreads) * z) * norm.pdf(z), -12, 12, epsabs=1e-13)[0]
        assert heteroscedastic(double(d), double(spreads[0]), double(spreads[1])).exp().item() == pytest.approx(exact, abs=1e-5)


def test_either_of_two_uncertain_clips_is_better_and_without_spread_it_is_bradley_terry() -> None:
    d, spread = scores(40, 1)[:, 0] * 3, scores(40, 2, seed=5).abs()
    total = heteroscedastic(d, spread[:, 0], spread[:, 1]).exp() + heteroscedastic(-d, spread[:, 1], spread[:, 0]).exp()
    torch.testing.assert_close(total, torch.ones_like(d), rtol=0, atol=1e-12)
    none = torch.zeros_like(d).requires_grad_()
    found = heteroscedastic(d, none, none)
    torch.testing.assert_close(found, bradley_terry(d), rtol=0, atol=1e-12)
    found.sum().backward()
    assert torch.equal(none.grad, torch.zeros_like(d)), "by symmetry"
    assert torch.isfinite(heteroscedastic(double(-1e4), double(3), double(0))).all()
    with torch.inference_mode():
        heteroscedastic(d, none.detach(), none.detach())
    heteroscedastic(d, spread[:, 0].requires_grad_(), none).sum().backward()  # nothing made under inference mode is kept


# Partial rankings, best and worst


@pytest.mark.parametrize("places", [1, 2, 3])
def test_the_first_places_of_four_are_the_sum_over_all_ways_the_rest_could_come(places: int) -> None:
    r = scores(1, 4)
    full = torch.tensor(list(itertools.permutations(range(1, 5))))
    top = torch.where(full <= places, full, 0)
    every = plackett_luce(r.expand(24, 4), full).exp()
    summed = torch.stack([every[(top == row).all(-1)].sum() for row in top])
    torch.testing.assert_close(plackett_luce(r.expand(24, 4), top, top == 0).exp(), summed, rtol=0, atol=1e-12)
    torch.testing.assert_close(davidson_luce(r.expand(24, 4), top, NO_TIES, top == 0).exp(), summed, rtol=0, atol=1e-12)


def test_tied_first_places_sum_over_the_rest_too() -> None:
    r, orders = scores(1, 4), weak_orders(4)
    every = davidson_luce(r.expand(75, 4), orders, TIES).exp()
    top = torch.where(orders == 1, 1, 0)
    summed = torch.stack([every[(top == row).all(-1)].sum() for row in top])
    torch.testing.assert_close(davidson_luce(r.expand(75, 4), top, TIES, top == 0).exp(), summed, rtol=0, atol=1e-12)


def test_below_and_not_ranked_at_all_are_told_apart() -> None:
    r, ranks = scores(1, 3), torch.tensor([[1, 0, 0]])
    assert plackett_luce(r, ranks).item() == 0, "one clip alone says nothing"
    assert plackett_luce(r, ranks, torch.tensor([[False, True, False]])).item() == pytest.approx(bradley_terry(r[0, 0] - r[0, 1]).item(), abs=1e-12)
    for likelihood in (plackett_luce, partial(davidson_luce, log_tie=NO_TIES)):
        with pytest.raises(ValueError, match="both ranked and below"):
            likelihood(r, ranks, below=torch.ones(1, 3, dtype=torch.bool))


def test_the_best_alone_is_the_first_place_and_the_worst_alone_that_of_minus_the_scores() -> None:
    r, nobody = scores(4, 4), torch.full((4,), -1)
    each = torch.arange(4)
    torch.testing.assert_close(best_worst(r, each, nobody), r.log_softmax(-1).diagonal(), rtol=0, atol=1e-12)
    torch.testing.assert_close(best_worst(r, nobody, each), (-r).log_softmax(-1).diagonal(), rtol=0, atol=1e-12)
    assert torch.equal(best_worst(r, nobody, nobody), torch.zeros(4, dtype=torch.float64))
    first = torch.eye(4, dtype=torch.int64)
    torch.testing.assert_close(plackett_luce(r, first, first == 0), best_worst(r, each, nobody), rtol=0, atol=1e-12)


def test_best_and_worst_sum_to_one_over_all_two_clips_and_three_clips_are_ranked_by_them() -> None:
    r = scores(1, 4)
    pairs = torch.tensor(list(itertools.permutations(range(4), 2)))
    assert best_worst(r.expand(12, 4), pairs[:, 0], pairs[:, 1]).exp().sum().item() == pytest.approx(1, abs=1e-12)
    shown = torch.tensor([[True, True, False, False]])
    found = best_worst(r, torch.tensor([0]), torch.tensor([1]), shown)
    torch.testing.assert_close(found, bradley_terry(r[:, 0] - r[:, 1]), rtol=0, atol=1e-12)
    expected = r[0].log_softmax(0)[2] + torch.log_softmax(-r[0, [0, 1, 3]], 0)[1]
    assert best_worst(r, torch.tensor([2]), torch.tensor([1])).item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("best", "worst", "shown"), [(1, 1, [1, 1, 1]), (2, 0, [1, 1, 0]), (-1, 2, [1, 1, 0]), (3, -1, [1, 1, 1]), (-2, 0, [1, 1, 1])])
def test_a_choice_that_cannot_be_is_refused(best: int, worst: int, shown: list[int]) -> None:
    with pytest.raises(ValueError, match="two different clips among those shown"):
        best_worst(scores(1, 3), torch.tensor([best]), torch.tensor([worst]), torch.tensor([shown]).bool())


# All pairs


def test_all_pairs_are_the_mean_over_the_pairs_of_a_strict_ranking() -> None:
    r = scores(1, 4)
    ordered = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = sum(math.log(expit((r[0, i] - r[0, j]).item())) for i, j in ordered) / math.comb(4, 2)
    assert all_pairs(r, torch.tensor([[1, 2, 3, 4]])).item() == pytest.approx(expected, abs=1e-12)
    pair = scores(20, 2)
    torch.testing.assert_close(all_pairs(pair, torch.tensor([[1, 2]]).expand(20, 2)), bradley_terry(pair[:, 0] - pair[:, 1]), rtol=0, atol=1e-12)


def test_tied_pairs_keep_their_weight_and_unranked_clips_have_none() -> None:
    r = scores(1, 4)
    found = all_pairs(r, torch.tensor([[1, 2, 0, 2]])).item()
    wins = math.log(expit((r[0, 0] - r[0, 1]).item())) + math.log(expit((r[0, 0] - r[0, 3]).item()))
    assert found == pytest.approx(wins / 3, abs=1e-12)
    with_ties = all_pairs(r, torch.tensor([[1, 2, 0, 2]]), partial(davidson, log_tie=TIES[0])).item()
    three = davidson(torch.stack([r[0, 0] - r[0, 1], r[0, 0] - r[0, 3], r[0, 1] - r[0, 3]]), TIES[0])
    assert with_ties == pytest.approx((three[0, 0] + three[1, 0] + three[2, 1]).item() / 3, abs=1e-12)


def test_rankings_without_a_pair_to_order_weigh_nothing() -> None:
    r = scores(4, 3).requires_grad_()
    found = all_pairs(r, torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [0, 2, 2]]))
    assert torch.equal(found, torch.zeros(4, dtype=torch.float64))
    found.sum().backward()
    assert torch.equal(r.grad, torch.zeros_like(r))


# Averages


def test_missing_entries_do_not_dilute_the_mean_and_are_never_read() -> None:
    value = torch.tensor([[1.0, math.nan], [3.0, 5.0], [math.inf, math.nan]], requires_grad=True)
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    assert masked_mean(value, valid).item() == 3
    weighted = masked_mean(value, valid, torch.tensor([2.0, 1.0, 7.0]))
    assert weighted.item() == pytest.approx((2 * 1 + 3 + 5) / 4)
    weighted.backward()
    torch.testing.assert_close(value.grad, torch.tensor([[0.5, 0.0], [0.25, 0.25], [0.0, 0.0]]))


def test_a_mean_of_nothing_is_zero_and_pulls_nowhere() -> None:
    value = torch.ones(3, 2, requires_grad=True)
    for valid, weight in ((torch.zeros(3, 2, dtype=torch.bool), None), (torch.ones(3, 2, dtype=torch.bool), torch.zeros(3))):
        found = masked_mean(value, valid, weight)
        assert found.item() == 0
        (gradient,) = torch.autograd.grad(found, value)
        assert torch.equal(gradient, torch.zeros(3, 2))
    assert masked_mean(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool)).item() == 0
