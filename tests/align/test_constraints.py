"""Multipliers on problems whose saddle point is known, and constrained advantages by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.testing import assert_close

from align.constraints import Multiplier, all_violating, constrained_advantage, gate

NAN = float("nan")


def flash(**settings: float) -> Multiplier:
    return Multiplier("flash", limit=settings.pop("limit", 0.02), **settings)


def test_the_target_is_a_quarter_of_the_limit_unless_given() -> None:
    assert flash().target == 0.005 and flash(target=0.01).target == 0.01
    with pytest.raises(ValueError, match="at most the limit"):
        flash(target=0.03)
    with pytest.raises(ValueError, match="floor"):
        flash(initial=0.0)


def test_a_multiplier_and_its_policy_settle_on_the_known_saddle_point() -> None:
    """maximise -(x - 2)^2 / 2 subject to sigmoid(x) <= 0.3: x* = logit 0.3, lambda* = (2 - x*) / (0.3 * 0.7)."""
    x, multiplier = 2.0, flash(limit=0.3, target=0.3, rate=0.05, decay=0.5)
    for _ in range(3000):
        cost = 1 / (1 + math.exp(-x))
        multiplier.update(torch.tensor([cost], dtype=torch.float64))
        price = multiplier.value
        x += 0.2 * ((2 - x) - price * cost * (1 - cost)) / (1 + price)
    best = math.log(0.3 / 0.7)
    print(x, best, multiplier.value, (2 - best) / 0.21)
    assert x == pytest.approx(best, abs=1e-6)
    assert multiplier.value == pytest.approx((2 - best) / 0.21, rel=1e-6)


def test_two_multipliers_settle_on_the_known_saddle_point_where_only_one_constraint_binds() -> None:
    """maximise x + y - (x^2 + y^2) / 2 subject to x^2 <= 0.25 and y^2 <= 4: x = 0.5, lambda_x = 0.5; y = 1 is free, lambda_y falls to its floor."""
    x, y = 0.0, 0.0
    first = Multiplier("x", limit=0.25, target=0.25, rate=0.05, decay=0.5)
    second = Multiplier("y", limit=4.0, target=4.0, rate=0.05, decay=0.5)
    for _ in range(3000):
        first.update(torch.tensor([x * x], dtype=torch.float64))
        second.update(torch.tensor([y * y], dtype=torch.float64))
        x += 0.1 * (1 - x - first.value * 2 * x)
        y += 0.1 * (1 - y - second.value * 2 * y)
    print(x, first.value, y, second.value)
    assert (x, first.value) == pytest.approx((0.5, 0.5), abs=1e-5)
    assert second.value == pytest.approx(1e-3) and y == pytest.approx(1.0, abs=0.01)


def test_one_update_by_hand_and_never_more_than_its_rate() -> None:
    multiplier = flash(limit=0.4, rate=0.1, decay=0.75)
    multiplier.update(torch.tensor([0.0, 1.0, NAN, 0.2]))
    assert multiplier.cost == pytest.approx(0.4)
    assert multiplier.log_value == pytest.approx(0.1 * 0.3 / 0.4)
    multiplier.update(torch.tensor([0.0]))
    assert multiplier.cost == pytest.approx(0.3) and multiplier.log_value == pytest.approx(0.075 + 0.1 * 0.2 / 0.3)
    for cost, factor in ((1e9, math.exp(0.1)), (0.0, math.exp(-0.1))):
        fresh = flash(rate=0.1)
        fresh.update(torch.tensor([cost]))
        assert fresh.value == pytest.approx(factor, rel=1e-6)


def test_a_multiplier_stays_between_its_floor_and_its_cap() -> None:
    multiplier = flash(cap=2.0, floor=0.5)
    for _ in range(100):
        multiplier.update(torch.ones(4))
    assert multiplier.value == pytest.approx(2.0)
    for _ in range(300):
        multiplier.update(torch.zeros(4))
    assert multiplier.value == pytest.approx(0.5)


def test_unknown_costs_move_nothing_and_the_state_resumes_exactly() -> None:
    multiplier = flash()
    multiplier.update(torch.full((4,), NAN))
    assert multiplier.value == 1.0 and multiplier.cost is None and math.isnan(multiplier.stats()["constraint/flash/cost"])
    multiplier.update(torch.tensor([1 / 3]))
    other = flash()
    other.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert (other.log_value, other.cost) == (multiplier.log_value, multiplier.cost)
    with pytest.raises(ValueError, match="'flash'"):
        Multiplier("gore", limit=0.1).load_state_dict(multiplier.state_dict())


def test_the_constrained_advantage_by_hand() -> None:
    """lambda 1 and 3: (A - 1 (c - mean of the others) - 3 (d - mean of the others)) / 5."""
    advantage = torch.tensor([1.0, -1.0, 0.5])
    c, d = torch.tensor([0.9, 0.0, 0.3]), torch.tensor([0.0, 0.0, 0.6])
    got = constrained_advantage(advantage, {"c": c, "d": d}, [Multiplier("c", limit=1, initial=1), Multiplier("d", limit=1, initial=3)], 3)
    want = torch.tensor([1 - (0.9 - 0.15) - 3 * (0 - 0.3), -1 - (0 - 0.6) - 3 * (0 - 0.3), 0.5 - (0.3 - 0.45) - 3 * (0.6 - 0)]) / 5
    assert_close(got.advantage, want, atol=1e-6, rtol=0)
    assert got.valid.all()


def test_costs_are_not_divided_by_their_spread_and_the_limit_does_not_enter() -> None:
    advantage, cost = torch.zeros(4), torch.tensor([1.0, 0, 0, 0])
    one = constrained_advantage(advantage, {"flash": cost}, [flash()], 4).advantage
    assert_close(constrained_advantage(advantage, {"flash": cost / 10}, [flash(limit=1.0)], 4).advantage * 10, one, atol=1e-6, rtol=0)
    assert_close(one, torch.tensor([-1.0, 1 / 3, 1 / 3, 1 / 3]) / 2)


def test_without_a_price_the_reward_decides_and_with_an_endless_one_the_cost_does() -> None:
    advantage, cost = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.0])
    free = constrained_advantage(advantage, {"flash": cost}, [flash(initial=1e-9, floor=1e-9)], 2).advantage
    dear = constrained_advantage(advantage, {"flash": cost}, [flash(initial=1e9, cap=1e9)], 2).advantage
    assert_close(free, advantage, atol=1e-6, rtol=0)
    assert_close(dear, torch.tensor([-1.0, 1.0]), atol=1e-6, rtol=0)


def test_an_unknown_cost_is_never_safe_it_masks_its_clip_and_is_counted() -> None:
    cost = torch.tensor([NAN, 0.0, 1.0, NAN, NAN, 0.2])
    valid = torch.tensor([True, False, True, True, True, True])
    got = constrained_advantage(torch.ones(6), {"flash": cost}, [flash()], 3, valid=valid)
    assert got.valid.tolist() == [False, False, True, False, False, False]
    assert got.advantage.tolist() == [0, 0, 0, 0, 0, 0]
    assert got.stats == {"constraint/unknown_share": 0.5, "constraint/masked_share": pytest.approx(5 / 6)}
    unknown_reward = constrained_advantage(torch.tensor([NAN, 1.0, 1.0]), {"flash": torch.zeros(3)}, [flash()], 3)
    assert unknown_reward.valid.tolist() == [False, True, True]


def test_a_policy_without_a_multiplier_is_refused() -> None:
    with pytest.raises(ValueError, match="every policy needs both"):
        constrained_advantage(torch.zeros(2), {"gore": torch.zeros(2)}, [flash()], 2)


def test_the_gate_caps_violators_where_a_clip_of_their_prompt_does_not_violate() -> None:
    advantage, violated = torch.tensor([3.0, -2.0, 3.0, 0.5, -0.5, 0.0]), torch.tensor([True, True, False, True, True, True])
    assert gate(advantage, violated, 3).tolist() == [-1, -2, 3, 0.5, -0.5, 0]
    with pytest.raises(ValueError, match="negative"):
        gate(advantage, violated, 3, at_most=0.0)


def test_prompts_whose_clips_all_violate_are_counted() -> None:
    assert all_violating(torch.tensor([True, True, True, False, False, False]), 2) == pytest.approx(1 / 3)
