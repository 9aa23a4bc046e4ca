"""Habits and carelessness: they sum to one, reduce to what is known, and are found again in answers drawn from them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from reward.labelers import careless, crowd_bradley_terry, reliability_mixture, with_position
from reward.ranking import bradley_terry, davidson_luce, weak_orders

TIES = torch.tensor([0.4, -0.7, 0.2], dtype=torch.float64)
NO_TIES = torch.full((3,), -math.inf, dtype=torch.float64)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(batch: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Place


def test_the_first_place_gains_the_advantage_over_the_last_in_equal_steps() -> None:
    r = scores(3, 4)
    order = torch.tensor([[0, 1, 2, 3], [3, 0, 2, 1], [1, 0, -1, -1]])
    gained = with_position(r, order, double(0.9)[0]) - r
    expected = torch.tensor([[0.9, 0.6, 0.3, 0], [0, 0.9, 0.3, 0.6], [0, 0.9, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(gained, expected, rtol=0, atol=1e-12)
    each = with_position(r, order, double(0.9, -1, 0)) - r
    torch.testing.assert_close(each, expected * double(1, -1 / 0.9, 0)[:, None], rtol=0, atol=1e-12)


def test_an_order_nobody_recorded_changes_nothing() -> None:
    r, advantage = scores(2, 3), double(0.9)[0].requires_grad_()
    found = with_position(r, torch.full((2, 3), -1), advantage)
    assert torch.equal(found, r)
    found.square().sum().backward()
    assert advantage.grad == 0
    assert torch.equal(with_position(r[:, :1], torch.zeros(2, 1, dtype=torch.int64), double(0.5)[0])[:, 0], r[:, 0] + 0.5), "alone, and therefore first"


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [0, 2, -1], [0, 1, 1]])
def test_places_that_number_no_screen_are_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="each once"):
        with_position(scores(1, 3), torch.tensor([order]), double(1)[0])


def test_clips_and_their_places_may_be_permuted() -> None:
    r, ranks, shown = scores(75, 4), weak_orders(4), torch.tensor([2, 0, 1, 3]).expand(75, 4)
    order = torch.tensor([3, 1, 0, 2])

    def answer(r: torch.Tensor, ranks: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        habit = with_position(torch.zeros_like(r), shown, double(1.2)[0])
        careful = davidson_luce(with_position(r, shown, double(-0.4)[0]), ranks, TIES)
        return reliability_mixture(careful, careless(ranks, TIES - 1, habit), double(0.3)[0])

    torch.testing.assert_close(answer(r[:, order], ranks[:, order], shown[:, order]), answer(r, ranks, shown), rtol=0, atol=1e-12)


# Carelessness


@pytest.mark.parametrize("k", [2, 3, 4])
def test_careless_answers_are_any_strict_order_where_ties_are_forbidden(k: int) -> None:
    orders = weak_orders(k)
    found = careless(orders, NO_TIES[: k - 1]).exp()
    strict = (orders.max(-1).values == k).double()
    torch.testing.assert_close(found, strict / math.factorial(k), rtol=0, atol=1e-12)


def test_two_clips_are_called_better_worse_or_equal_alike_only_with_delta_of_one() -> None:
    torch.testing.assert_close(careless(weak_orders(2), double(0.0)).exp(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reliability", [-40.0, -1.0, 0.5, 40.0])
def test_the_mixture_sums_to_one_over_all_rankings(reliability: float) -> None:
    r, orders = scores(1, 4).expand(75, 4), weak_orders(4)
    shown = torch.tensor([2, 0, 1, 3]).expand(75, 4)
    habit = with_position(torch.zeros_like(r), shown, double(0.8)[0])
    careful = davidson_luce(with_position(r, shown, double(0.3)[0]), orders, TIES)
    found = reliability_mixture(careful, careless(orders, TIES - 2, habit), double(reliability)[0])
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_who_always_looks_is_careful_and_who_never_does_is_careless() -> None:
    log_prob, log_careless = double(-0.3, -9), double(-1.1, -1.1)
    assert torch.equal(reliability_mixture(log_prob, log_careless, double(math.inf)), log_prob)
    assert torch.equal(reliability_mixture(log_prob, log_careless, double(-math.inf)), log_careless)
    half = reliability_mixture(log_prob, log_careless, double(0.0))
    torch.testing.assert_close(half.exp(), (log_prob.exp() + log_careless.exp()) / 2, rtol=0, atol=1e-12)


def test_one_wild_answer_is_bounded() -> None:
    found = reliability_mixture(bradley_terry(double(-1e4)), double(math.log(0.5)), double(2.0))
    assert found.item() == pytest.approx(math.log(0.5) + logsigmoid(double(-2.0)).item(), abs=1e-12)


def test_crowd_bt_is_the_careless_mixture_of_pairs_with_eta_of_half_one_plus_h() -> None:
    d, h = scores(30, 1)[:, 0] * 3, 0.64
    mixture = reliability_mixture(bradley_terry(d), double(math.log(0.5)), double(h).logit())
    torch.testing.assert_close(crowd_bradley_terry(d, double((1 + h) / 2).logit()), mixture, rtol=0, atol=1e-12)
    against = crowd_bradley_terry(d, double(0.1).logit())
    torch.testing.assert_close(against.exp(), 0.1 * torch.sigmoid(d) + 0.9 * torch.sigmoid(-d), rtol=0, atol=1e-12)
    assert torch.equal(crowd_bradley_terry(d, double(math.inf)), bradley_terry(d))


def test_gradients_in_scores_and_in_what_people_do() -> None:
    orders = weak_orders(3)[::3]
    shown = torch.tensor(list(itertools.permutations(range(3))))[: len(orders)]

    def answer(r: torch.Tensor, advantage: torch.Tensor, reliability: torch.Tensor, log_tie: torch.Tensor, log_tie_careless: torch.Tensor) -> torch.Tensor:
        habit = with_position(torch.zeros_like(r), shown, advantage[1])
        careful = davidson_luce(with_position(r, shown, advantage[0]), orders, log_tie)
        return reliability_mixture(careful, careless(orders, log_tie_careless, habit), reliability)

    inputs = (scores(len(orders), 3), double(0.5, -0.3), scores(1, len(orders), seed=2)[0], double(0.2, -1), double(-1, 0))
    assert torch.autograd.gradcheck(answer, tuple(each.requires_grad_() for each in inputs))
    assert torch.autograd.gradcheck(crowd_bradley_terry, (scores(4, 1)[:, 0].requires_grad_(), scores(4, 1, seed=1)[:, 0].requires_grad_()))
