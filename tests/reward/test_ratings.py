"""Ratings against their formulas, against logistic regression, and where they are missing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit

from reward.ranking import bradley_terry, masked_mean
from reward.ratings import cost_pair, cost_sign, ordinal, rising

THRESHOLDS = torch.tensor([-1.5, -0.2, 0.4, 3.0], dtype=torch.float64)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Levels


def test_levels_have_the_differences_of_the_cumulative_logit_and_sum_to_one() -> None:
    score = double(-4, -0.3, 0, 1.7, 6)
    found = torch.stack([ordinal(score, torch.full_like(score, level), THRESHOLDS) for level in range(1, 6)]).exp()  # [5, 5]
    cumulative = expit(np.array([-np.inf, *THRESHOLDS.tolist(), np.inf])[:, None] - score.numpy())
    np.testing.assert_allclose(found.numpy(), np.diff(cumulative, axis=0), rtol=1e-10)
    torch.testing.assert_close(found.sum(0), torch.ones_like(score), rtol=0, atol=1e-12)


def test_two_levels_are_logistic_regression() -> None:
    score = double(-3, 0.2, 5)
    found = ordinal(score, double(2, 2, 1), double(0.5))
    torch.testing.assert_close(found, torch.nn.functional.logsigmoid(double(1, 1, -1) * (score - 0.5)), rtol=0, atol=1e-12)


def test_far_scores_and_narrow_levels_stay_exact() -> None:
    found = ordinal(torch.tensor([60.0, 60.0, -1e4]), torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 1.0, 1.0001, 2.0]))
    assert found[0].item() == pytest.approx(-60, rel=1e-6) and found[2].item() == pytest.approx(-10002, rel=1e-6)
    assert found[1].item() == pytest.approx(1.00005 - 60 + math.log(1e-4), rel=1e-4), "the density times the width, far in the tail"


def test_a_missing_level_says_nothing_and_pulls_nowhere() -> None:
    score = double(0.3, 2).requires_grad_()
    found = ordinal(score, double(math.nan, 4), THRESHOLDS)
    assert found[0].item() == 0
    found.sum().backward()
    assert score.grad is not None and score.grad[0] == 0 and score.grad[1] != 0
    assert ordinal(double(), double(), THRESHOLDS).shape == (0,)


def test_every_dimension_has_thresholds_of_its_own() -> None:
    score, level = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([[1.0, 3.0]]).expand(6, 2).double()
    thresholds = torch.stack([THRESHOLDS, THRESHOLDS * 2 + 1])
    apart = torch.stack([ordinal(score[:, k], level[:, k], thresholds[k]) for k in range(2)], dim=-1)
    torch.testing.assert_close(ordinal(score, level, thresholds), apart, rtol=0, atol=0)


def test_thresholds_rise_whatever_the_parameters_and_gradients_reach_them() -> None:
    first, gaps = double(-3, 2), torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    assert (rising(first, gaps).diff(dim=-1) > 0).all() and rising(first, gaps)[:, 0].tolist() == [-3, 2]
    torch.testing.assert_close(rising(double(1)[0], double(0, 1)).diff(), torch.nn.functional.softplus(double(0, 1)), rtol=0, atol=1e-12)
    level = double(1, 2, 3, 4, 5, math.nan)
    score = double(-1, 0.5, 2, 0, -2, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, f, g: ordinal(s, level, rising(f, g)), (score, double(-1)[0].requires_grad_(), double(0.1, -0.5, 2).requires_grad_()))


@pytest.mark.parametrize("level", [0.0, 6.0, 2.5, -1.0, math.inf])
def test_levels_that_are_none_are_refused(level: float) -> None:
    with pytest.raises(ValueError, match="whole numbers from 1 to 5"):
        ordinal(double(0), double(level), THRESHOLDS)


@pytest.mark.parametrize("thresholds", [double(0, 0), double(1, -1), double(0, math.nan)])
def test_thresholds_that_do_not_rise_are_refused(thresholds: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must rise"):
        ordinal(double(0), double(1), thresholds)


def test_the_scale_a_simulated_rater_used_is_found_again() -> None:
    generator = torch.Generator().manual_seed(2)
    score = 2 * torch.randn(4_000, dtype=torch.float64, generator=generator)
    noise = torch.rand(4_000, dtype=torch.float64, generator=generator).logit()
    level = 1 + (score + noise > THRESHOLDS[:, None]).sum(0).double()
    first, gaps = double(0)[0].requires_grad_(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([first, gaps], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -ordinal(score, level, rising(first, gaps)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(rising(first, gaps).detach(), THRESHOLDS, rtol=0, atol=0.15)


# Costs


def test_the_sign_of_the_cost_is_safe_or_unsafe_and_both_sum_to_one() -> None:
    cost = double(-3, 0, 0.5, 40)
    unsafe, safe = cost_sign(cost, torch.ones_like(cost)), cost_sign(cost, torch.zeros_like(cost))
    torch.testing.assert_close(unsafe.exp() + safe.exp(), torch.ones_like(cost), rtol=0, atol=1e-12)
    torch.testing.assert_close(unsafe.exp(), torch.sigmoid(cost), rtol=0, atol=1e-12)


def test_a_pair_of_costs_is_the_loss_of_safe_rlhf_on_two_numbers() -> None:
    """Dai et al. 2023: - log s(c_w - c_l) - log s(s_w c_w) - log s(s_l c_l), w = the more harmful, s = +1 unsafe, -1 safe."""
    worse, better = double(0.4, 2.0, -1.0), double(-0.3, 1.0, -2.0)
    signs = [(1, -1), (1, 1), (-1, -1)]
    log_prob = cost_pair(worse, better, double(1, 1, 0), double(0, 1, 0))
    for k, (s_w, s_l) in enumerate(signs):
        w, l = worse[k].item(), better[k].item()
        expected = math.log(expit(w - l)) + math.log(expit(s_w * w)) + math.log(expit(s_l * l))
        assert log_prob[k].item() == pytest.approx(expected, abs=1e-12)
    # by hand: c = 1 (unsafe) against c = -1 (safe): ln s(2) + 2 ln s(1)
    assert cost_pair(double(1), double(-1), double(1), double(0)).item() == pytest.approx(-0.126928011 - 2 * 0.313261688, abs=1e-8)


def test_the_gradient_of_a_pair_of_costs_is_that_of_finite_differences() -> None:
    worse, better = double(0.4, 2.0, -1.0, 0.0), double(-0.3, 1.0, -2.0, 0.7)
    unsafe = double(1, 1, 0, math.nan), double(0, 1, 0.25, math.nan)
    costs = [each.clone().requires_grad_() for each in (worse, better)]
    cost_pair(*costs, *unsafe).sum().backward()
    step = 1e-6
    for k, cost in enumerate(costs):
        ends = [[worse + sign * step * (k == 0), better + sign * step * (k == 1)] for sign in (1, -1)]
        high, low = (cost_pair(*end, *unsafe) for end in ends)
        assert cost.grad is not None
        torch.testing.assert_close(cost.grad, (high - low) / (2 * step), rtol=0, atol=1e-8)
    assert costs[0].grad is not None and costs[0].grad[0] == pytest.approx(expit(-0.7) + expit(-0.4))


def test_signs_give_costs_a_zero_that_pairs_do_not() -> None:
    cost = double(1.0, -2.0)
    assert bradley_terry(cost[0] - cost[1]) == bradley_terry((cost[0] + 5) - (cost[1] + 5))
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    cost_sign(cost + 5 + shift, double(1, 0)).sum().backward()
    assert shift.grad is not None and shift.grad < 0, "the safe clip's cost is pulled below zero"


def test_shares_of_people_are_graded_and_missing_ones_say_nothing() -> None:
    cost = double(0.7, 0.7, -2).requires_grad_()
    found = cost_sign(cost, double(0.25, math.nan, 1))
    assert found[0].item() == pytest.approx(0.25 * math.log(expit(0.7)) + 0.75 * math.log(expit(-0.7)), abs=1e-12)
    assert found[1].item() == 0
    judged = torch.tensor([True, False, True])
    assert masked_mean(found, judged).item() == pytest.approx((found[0] + found[2]).item() / 2)
    assert torch.autograd.gradcheck(lambda c: cost_sign(c, double(0.25, math.nan, 1)), (cost,))
    for wrong in (-1.0, 1.5, math.inf):
        with pytest.raises(ValueError, match="between 0"):
            cost_sign(double(0), double(wrong))
