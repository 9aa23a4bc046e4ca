"""Multipliers on problems whose saddle point is known, and constrained advantages by hand."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from scipy.stats import binomtest, norm
from torch.testing import assert_close

from align.constraints import Multiplier, Multipliers, all_violating, constrained_advantage, gate, metrics, upper_bound

NAN = float("nan")


def flash(**settings: float) -> Multiplier:
    return Multiplier("flash", limit=settings.pop("limit", 0.02), **settings)


def test_the_target_is_a_quarter_of_the_limit_unless_given() -> None:
    assert flash().target == 0.005 and flash(target=0.01).target == 0.01
    with pytest.raises(ValueError, match="at most the limit"):
        flash(target=0.03)
    with pytest.raises(ValueError, match="floor"):
        flash(initial=0.0)
    for odd in ({"proportional": -1.0}, {"derivative": -1.0}, {"warm_up": -1}, {"confidence": 0.5}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=r"confidence above 0\.5"):
            flash(**odd)
    for odd in ({"target": 0.0}, {"target": -1.0}):
        with pytest.raises(ValueError, match="target must be above 0"):
            flash(**odd)
    for odd in ({"floor": 0.0}, {"floor": 2.0}, {"cap": 0.5}, {"rate": 0.0}, {"decay": 1.0}, {"decay": -0.1}):
        with pytest.raises(ValueError, match="floor"):
            flash(**odd)
    edge = flash(target=0.02, decay=0.0, floor=1.0, cap=1.0, warm_up=0, proportional=0.0)
    edge.update(torch.ones(3))
    assert edge.value == 1.0 and edge.limit == 0.02 and edge.target == 0.02


def test_a_corrected_rate_is_compared_in_place_of_the_running_mean() -> None:
    seen: list[tuple[float, float]] = []

    def doubled(share: float, clips: float) -> float:
        seen.append((share, clips))
        return 2 * share

    corrected, plain = (Multiplier("flash", limit=0.5, target=0.5, decay=0.5, correct=correct) for correct in (doubled, None))
    for multiplier in (corrected, plain):
        multiplier.update(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        multiplier.update(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]))
    assert corrected.bound == 0.5 and plain.bound == 0.25 and corrected.value == 1.0 > plain.value
    assert seen[0] == (0.25, 4.0) and seen[-1] == (0.25, pytest.approx(1 / (0.25 / 4 + 0.25 / 8)))
    with pytest.raises(ValueError, match="Give one of them"):
        Multiplier("flash", limit=0.5, confidence=0.9, correct=doubled)


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


def test_violations_may_be_truth_values_and_a_confidence_barely_above_a_half_is_one() -> None:
    multiplier = flash(limit=0.4, confidence=0.6)
    multiplier.update(torch.tensor([True, False, False]))
    assert multiplier.cost == pytest.approx(1 / 3, rel=1e-15) and multiplier.bound == pytest.approx(upper_bound(1 / 3, 3, 0.6))


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
    assert multiplier.value == 1.0 and multiplier.cost is None and math.isnan(multiplier.stats()["constraint/flash/cost"]) and math.isnan(multiplier.bound)
    multiplier.update(torch.tensor([1 / 3]))
    other = flash()
    other.load_state_dict(json.loads(json.dumps(multiplier.state_dict())))
    assert other.state_dict() == multiplier.state_dict() and other.num_updates == 1
    with pytest.raises(ValueError, match="'flash'"):
        Multiplier("gore", limit=0.1).load_state_dict(multiplier.state_dict())


@pytest.mark.parametrize(("successes", "count"), [(0, 20), (1, 20), (3, 7), (20, 20)])
def test_the_upper_bound_is_wilsons(successes: int, count: int) -> None:
    """scipy's two-sided Wilson interval of 90 % ends where the one-sided one of 95 % does."""
    want = binomtest(successes, count).proportion_ci(0.9, method="wilson").high
    assert upper_bound(successes / count, count, 0.95) == pytest.approx(want, rel=1e-12)


def test_the_upper_bound_of_nothing_seen_shrinks_with_the_number_of_draws() -> None:
    z2 = norm.ppf(0.9) ** 2
    assert upper_bound(0.0, 10, 0.9) == pytest.approx(z2 / (10 + z2)) and upper_bound(0.0, 1e9, 0.9) < 1e-8


def test_the_bound_covers_a_running_mean_as_often_as_it_says() -> None:
    """400 running means of violations with share 0.1: the 90 % bound of the last one lies above 0.1 in 87 to 94 % of them."""
    g, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        multiplier = flash(limit=0.1, confidence=0.9, decay=0.7)
        for _ in range(12):
            multiplier.update(torch.bernoulli(torch.full((16,), 0.1), generator=g))
        covered += multiplier.bound > 0.1
    print(covered / 400)
    assert 0.87 <= covered / 400 <= 0.94


def test_the_running_mean_rests_on_as_many_clips_as_its_variance_says() -> None:
    multiplier = flash(limit=0.4, confidence=0.9, decay=0.75)
    multiplier.update(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert multiplier.bound == pytest.approx(upper_bound(0.25, 4, 0.9))
    multiplier.update(torch.tensor([0.0, 0.0]))
    assert multiplier.cost == pytest.approx(0.1875) and multiplier.bound == pytest.approx(upper_bound(0.1875, 1 / (0.75**2 / 4 + 0.25**2 / 2), 0.9))


def test_thin_data_keep_the_price_up_where_the_mean_would_let_it_fall() -> None:
    careful, bold = flash(limit=0.1, confidence=0.9), flash(limit=0.1)
    for multiplier in (careful, bold):
        multiplier.update(torch.zeros(8))
    assert careful.value > 1 > bold.value
    for _ in range(40):
        careful.update(torch.zeros(200))
    assert careful.value < 1 and careful.stats()["constraint/flash/bound"] == careful.bound > 0 == careful.cost
    for odd in (torch.tensor([1.5]), torch.tensor([-0.5])):
        with pytest.raises(ValueError, match=r"costs in \[0, 1\]"):
            careful.update(odd)
    bold.update(torch.tensor([1.5]))
    edges = flash(limit=0.1, confidence=0.9)
    edges.update(torch.tensor([0.0, 1.0]))
    assert edges.cost == 0.5


def test_warming_up_measures_but_moves_nothing() -> None:
    multiplier = flash(limit=0.4, warm_up=2, initial=2.0, proportional=1.0, derivative=1.0)
    for _ in range(2):
        multiplier.update(torch.ones(4))
        multiplier.update(torch.full((4,), NAN))
        assert multiplier.value == pytest.approx(2.0) and multiplier.cost == 1
    multiplier.update(torch.ones(4))
    assert multiplier.log_value == pytest.approx(math.log(2) + 0.1 * 0.9 + 0.9)


def test_the_three_parts_of_the_controller_by_hand() -> None:
    """target 0.1; costs 0.2 then 0.4 with decay 0: errors 1/2 and 3/4, the change 1/4; then 0.1: error 0, a fall that the derivative ignores."""
    multiplier = flash(limit=0.4, rate=0.1, decay=0.0, proportional=2.0, derivative=4.0, initial=1.0)
    multiplier.update(torch.tensor([0.2], dtype=torch.float64))
    assert multiplier.log_value == pytest.approx(0.05 + 1.0), "the first error is no change"
    multiplier.update(torch.tensor([0.4], dtype=torch.float64))
    assert multiplier.log_value == pytest.approx(0.05 + 0.075 + 1.5 + 1.0)
    multiplier.update(torch.tensor([0.1], dtype=torch.float64))
    assert multiplier.log_value == pytest.approx(0.125)


def test_the_integral_does_not_wind_up_beyond_the_cap() -> None:
    multiplier = flash(cap=2.0, floor=0.5, proportional=0.1)
    for _ in range(100):
        multiplier.update(torch.ones(4))
    assert multiplier.value == pytest.approx(2.0)
    for _ in range(60):
        multiplier.update(torch.zeros(4))
    assert multiplier.value == pytest.approx(0.5)


def controlled(*, judged: int | None, steps: int, **settings: float) -> tuple[list[float], list[float]]:
    """A policy with inertia: logit x of its violation rate, reward -(x - 2)^2 / 2, ten steps late in its answer to the price. -> (violation rates, log prices).

    judged: clips judged a step, drawn; None for the exact rate.
    """
    g = torch.Generator().manual_seed(0)
    multiplier = Multiplier("p", limit=0.1, **settings)  # type: ignore[arg-type]
    x, speed, rates, prices = 0.0, 0.0, [], []
    for _ in range(steps):
        rate = 1 / (1 + math.exp(-x))
        multiplier.update(torch.tensor([rate], dtype=torch.float64) if judged is None else torch.bernoulli(torch.full((judged,), rate), generator=g))
        price = multiplier.value
        speed = 0.95 * speed + 0.05 * ((2 - x) - 4 * price * rate * (1 - rate)) / (1 + price)
        x += 0.3 * speed
        rates.append(rate)
        prices.append(multiplier.log_value)
    return rates, prices


def test_pid_damps_the_swings_of_plain_integral_control() -> None:
    """At the same rate: the integral alone swings for ever (limit cycle of the log price, sd 0.7); with P and D it comes to rest on the target."""
    plain_rates, plain = controlled(judged=None, steps=900, rate=0.2, decay=0.5)
    damped_rates, damped = controlled(judged=None, steps=900, rate=0.2, decay=0.5, proportional=4.0, derivative=20.0)
    swing, rest = statistics.pstdev(plain[600:]), statistics.pstdev(damped[600:])
    print(f"sd of the log price: integral {swing:.3f}, PID {rest:.4f}; violation rates {min(plain_rates[600:]):.4f} to {max(plain_rates[600:]):.4f}, PID {damped_rates[-1]:.4f}")
    assert swing > 0.5 and rest < swing / 30
    assert max(plain_rates[600:]) > 0.05 and damped_rates[-1] == pytest.approx(0.025, abs=1e-3)


def test_each_part_alone_damps_too() -> None:
    settings = {"judged": None, "steps": 900, "rate": 0.15, "decay": 0.5}
    swing = statistics.pstdev(controlled(**settings)[1][600:])  # type: ignore[arg-type]
    assert statistics.pstdev(controlled(**settings, proportional=4.0)[1][600:]) < swing / 10  # type: ignore[arg-type]
    assert statistics.pstdev(controlled(**settings, derivative=20.0)[1][600:]) < 0.9 * swing  # type: ignore[arg-type]


def test_with_few_judged_clips_the_limit_holds_by_an_upper_confidence_bound() -> None:
    """48 clips judged a step. Of 20000 clips drawn from the policies of the last 200 steps, the share that violates is below the limit of 0.1 with 99 % confidence."""
    rates, _ = controlled(judged=48, steps=600, rate=0.1, proportional=2.0, derivative=2.0, warm_up=5, confidence=0.9)
    g = torch.Generator().manual_seed(1)
    violations = sum(int(torch.bernoulli(torch.full((100,), rate), generator=g).sum()) for rate in rates[-200:])
    high = binomtest(violations, 20_000).proportion_ci(0.98, method="exact").high
    print(f"{violations / 20_000:.4f}, upper bound {high:.4f}")
    assert high < 0.1 and rates[0] == 0.5


def test_several_policies_are_updated_logged_and_resumed_as_one() -> None:
    def both() -> Multipliers:
        return Multipliers([flash(limit=0.4, confidence=0.9, proportional=0.5), Multiplier("gore", limit=0.1, warm_up=1)])

    one, generator = both(), torch.Generator().manual_seed(0)
    costs = [{policy: torch.rand(6, generator=generator) for policy in ("gore", "flash")} for _ in range(6)]
    for cost in costs[:3]:
        one.update(cost)
    two = both()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for cost in costs[3:]:
        one.update(cost)
        two.update(cost)
    assert one.state_dict() == two.state_dict() and one.stats() == two.stats() and len(one.stats()) == 6
    assert set(one.stats()) <= set(metrics(["flash", "gore"]))
    assert [multiplier.policy for multiplier in one] == ["flash", "gore"] and one["gore"].value > 1
    alone = Multiplier("gore", limit=0.1, warm_up=1)
    for cost in costs:
        alone.update(cost["gore"])
    assert one["gore"].state_dict() == alone.state_dict()
    for odd in ({"flash": torch.ones(1)}, {**costs[0], "nudity": torch.ones(1)}):
        with pytest.raises(ValueError, match="every policy needs both"):
            one.update(odd)
        with pytest.raises(ValueError, match="every policy needs both"):
            one.load_state_dict(odd)
    with pytest.raises(ValueError, match="two multipliers for one policy"):
        Multipliers([flash(), flash()])


def test_multipliers_are_what_the_constrained_advantage_takes_also_from_a_generator() -> None:
    advantage, cost = torch.tensor([1.0, -1.0]), {"flash": torch.tensor([1.0, 0.0])}
    want = constrained_advantage(advantage, cost, [flash()], 2)
    assert torch.equal(constrained_advantage(advantage, cost, Multipliers([flash()]), 2).advantage, want.advantage)
    assert torch.equal(constrained_advantage(advantage, cost, (each for each in [flash()]), 2).advantage, want.advantage)


def test_clips_of_a_prompt_may_lie_anywhere_when_they_have_ids() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    advantage, cost = torch.tensor([1.0, -1, 0.5, 2, -2, 0]), torch.tensor([0.9, 0.1, 0.2, 0.8, 0.9, 0.7])
    violated = torch.tensor([True, True, False, True, True, True])
    want = constrained_advantage(advantage, {"flash": cost}, [flash()], 3)
    got = constrained_advantage(advantage[order], {"flash": cost[order]}, [flash()], ids[order])
    assert_close(got.advantage, want.advantage[order])
    assert torch.equal(gate(advantage[order], violated[order], ids[order]), gate(advantage, violated, 3)[order])
    assert all_violating(violated[order], ids[order]) == all_violating(violated, 3) == 0.5


def test_the_constrained_advantage_by_hand() -> None:
    """lambda 1 and 3: (A - 1 (c - mean of the others) - 3 (d - mean of the others)) / 5."""
    advantage = torch.tensor([1.0, -1.0, 0.5])
    c, d = torch.tensor([0.9, 0.0, 0.3]), torch.tensor([0.0, 0.0, 0.6])
    got = constrained_advantage(advantage, {"c": c, "d": d}, [Multiplier("c", limit=1, initial=1), Multiplier("d", limit=1, initial=3)], 3)
    want = torch.tensor([1 - (0.9 - 0.15) - 3 * (0 - 0.3), -1 - (0 - 0.6) - 3 * (0 - 0.3), 0.5 - (0.3 - 0.45) - 3 * (0.6 - 0)]) / 5
    assert_close(got.advantage, want, atol=1e-6, rtol=0)
    assert got.valid.all()
    assert constrained_advantage(advantage, {"c": c.double()}, [Multiplier("c", limit=1)], 3).advantage.dtype == torch.float32


def test_what_all_clips_of_a_prompt_cost_cancels() -> None:
    advantage, cost = torch.tensor([1.0, -1, 0.5, 2, -2, 0]), torch.tensor([0.9, 0.1, 0.2, 0.8, 0.9, 0.7])
    dear = cost + torch.tensor([0.1, 0.1, 0.1, -0.6, -0.6, -0.6])
    got, want = (constrained_advantage(advantage, {"flash": each}, [flash(initial=3.0)], 3).advantage for each in (dear, cost))
    assert_close(got, want, atol=1e-6, rtol=0)


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
    trained = torch.ones(4, requires_grad=True)
    assert not constrained_advantage(trained, {"flash": torch.zeros(4)}, [flash()], 4).advantage.requires_grad
    one_of_four = constrained_advantage(torch.ones(4), {"flash": torch.tensor([NAN, 0.0, 1.0, 0.5])}, [flash()], 4)
    assert one_of_four.stats == {"constraint/unknown_share": 0.25, "constraint/masked_share": 0.25}
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
