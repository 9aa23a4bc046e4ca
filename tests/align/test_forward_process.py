"""Signed flow matching: the paper's two-sided loss, flow matching where everything is good, and an update towards what is better."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from align.advantage import group_advantage
from align.objectives import masked_mean
from align.objectives.forward_process import dgpo_weight, implicit_split, matching_log_prob, nft_split, old_policy_decay, rwr_weight, signed_flow_matching
from align.objectives.policy_gradient import ppo_clip
from align.objectives.regression import clip_error, flow_matching
from base_model.paths import Path, RectifiedFlow, add_noise
from tests.worlds import PATHS

SHAPE = (6, 2, 3, 4, 4)


def draws(n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(n)]


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_it_is_the_papers_loss_over_its_beta_up_to_a_constant(beta: float) -> None:
    u, u_old, v = draws(3)
    a = torch.tensor([-1.0, -0.4, 0.0, 0.3, 0.9, 1.0], dtype=torch.float64)
    q = (1 + a) / 2
    positive, negative = (1 - beta) * u_old + beta * u, (1 + beta) * u_old - beta * u  # DiffusionNFT, implicit policies
    paper = q * (positive - v).square().flatten(1).mean(1) + (1 - q) * (negative - v).square().flatten(1).mean(1)  # [B]
    constant = (u_old - v).square().flatten(1).mean(1)
    ours = signed_flow_matching(u, u_old, v, a, beta).value
    assert_close(ours.double(), ((paper - constant) / beta).mean(), atol=1e-5, rtol=1e-5)


def test_with_only_good_clips_it_is_flow_matching_in_value_and_gradient() -> None:
    u, u_old, v = draws(3)
    mine, plain = u.clone().requires_grad_(), u.clone().requires_grad_()
    signed = signed_flow_matching(mine, u_old, v, torch.ones(6, dtype=torch.float64), 1.0).value
    matching = flow_matching(clip_error(plain, v)).value
    assert_close(signed.float(), matching - clip_error(u_old, v).mean(), atol=1e-5, rtol=1e-5)
    signed.backward()
    matching.backward()
    assert_close(mine.grad, plain.grad, atol=1e-7, rtol=1e-5)


def test_a_bad_clip_has_its_minimum_as_far_on_the_other_side() -> None:
    u_old, v = draws(2)
    mirrored = 2 * u_old - v
    here = mirrored.clone().requires_grad_()
    signed_flow_matching(here, u_old, v, -torch.ones(6, dtype=torch.float64), 1.0).value.backward()
    assert here.grad is not None and here.grad.abs().max() < 1e-7


def test_a_clip_of_unknown_worth_moves_nothing() -> None:
    u, u_old, v = draws(3)
    a = torch.tensor([0.5, float("nan"), -0.5, 1.0, 0.2, -1.0], dtype=torch.float64)
    valid = a.isfinite()
    u.requires_grad_()
    loss = signed_flow_matching(u, u_old, v, a, 1.0, valid=valid)
    loss.value.backward()
    assert loss.value.isfinite() and u.grad is not None and u.grad.isfinite().all()
    assert u.grad[1].abs().max() == 0 and u.grad[0].abs().max() > 0
    rest = signed_flow_matching(u[valid], u_old[valid], v[valid], a[valid], 1.0)
    assert_close(loss.value, rest.value)


def test_the_signed_objective_by_hand_on_two_numbers() -> None:
    """u 1, u_old 3, v 2: d = -2, e = 1; a = 0.5, beta = 0.25: 2 * 0.5 * -2 + 0.25 * 4 = -1. u 5: d = 2, -a: 2 * -0.5 * 2 + 1 = -1; weights 2 and 4."""
    u, u_old, v = torch.tensor([[1.0], [5.0]]), torch.tensor([[3.0], [3.0]]), torch.tensor([[2.0], [2.0]])
    loss = signed_flow_matching(u, u_old, v, torch.tensor([0.5, -0.5]), 0.25, weight=torch.tensor([2.0, 4.0]))
    assert float(loss.value) == pytest.approx((-2 - 4) / 2) and float(loss.stats["forward/loss"]) == float(loss.value)
    assert float(loss.stats["forward/toward_good"]) == pytest.approx(2.0) and float(loss.stats["forward/drift"]) == pytest.approx(4.0)
    assert not any(stat.requires_grad for stat in loss.stats.values())


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """d loss / d u at a velocity."""
    u = at.clone().requires_grad_()
    return torch.autograd.grad(loss(u), u)[0]


def test_only_the_policy_gets_a_gradient() -> None:
    inputs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in range(3)]
    a, weight = torch.tensor([0.5, -0.5], requires_grad=True), torch.ones(2, requires_grad=True)
    loss = signed_flow_matching(*inputs, a, 1.0, weight=weight, valid=torch.tensor([True, True]))  # type: ignore[arg-type]
    loss.value.backward()
    assert not any(stat.requires_grad for stat in loss.stats.values())
    assert inputs[0].grad is not None and inputs[1].grad is None and a.grad is None and weight.grad is None


def test_velocities_in_half_precision_are_compared_in_full() -> None:
    """bf16 has 8 bits: the difference of two close velocities would lose all of them if it were squared and summed there."""
    u, u_old, v = (each.bfloat16() for each in draws(3))
    a = torch.linspace(-1, 1, 6)
    half, full = signed_flow_matching(u, u_old, v, a, 0.5), signed_flow_matching(u.float(), u_old.float(), v.float(), a, 0.5)
    assert torch.equal(half.value, full.value) and half.value.dtype == torch.float32
    sigma = torch.full((6,), 0.3)
    split = nft_split(u, u_old, v, a, 0.5, sigma)
    assert all(torch.equal(x, y) for x, y in zip(split, nft_split(u.float(), u_old.float(), v.float(), a, 0.5, sigma), strict=True))
    for k in range(3):  # and one that is wider than the others does not widen the rest
        mixed = [each.double() if i == k else each.float() for i, each in enumerate((u, u_old, v))]
        assert signed_flow_matching(*mixed, a, 0.5).value.dtype == torch.float32  # type: ignore[arg-type]
        assert {each.dtype for each in nft_split(*mixed, a, 0.5, sigma)} == {torch.float32}  # type: ignore[arg-type]


A = torch.tensor([-1.0, -0.4, 0.0, 0.3, 0.9, 1.0], dtype=torch.float64)


def test_the_gradient_is_the_finite_difference() -> None:
    u, u_old, v = (each[:, :1, :1, :1, :2].float().double() for each in draws(3))
    found = gradient(lambda x: signed_flow_matching(x, u_old, v, A, 0.7, weight=A.abs() + 1).value, u)
    for place in ((0, 0, 0, 0, 1), (4, 0, 0, 0, 0)):
        step = torch.zeros_like(u)
        step[place] = 0.5  # the objective is quadratic: a central difference is exact at any width
        ends = [float(signed_flow_matching(u + sign * step, u_old, v, A, 0.7, weight=A.abs() + 1).value) for sign in (1, -1)]
        assert float(found[place]) == pytest.approx(ends[0] - ends[1], abs=1e-5)


def papers_nft(path: Path, u: torch.Tensor, u_old: torch.Tensor, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor, a: torch.Tensor, beta: float) -> torch.Tensor:
    """DiffusionNFT's loss as its code writes it, on x0 predictions, with adaptive weights; A_max = 1."""
    q, total = (1 + a) / 2, torch.zeros(len(a), dtype=u.dtype)
    for share, velocity in ((q, beta * u + (1 - beta) * u_old), (1 - q, (1 + beta) * u_old - beta * u)):
        guess = path.split(x_t, velocity, t)[0]
        weight = (guess - x0).detach().abs().flatten(1).mean(1).clamp_min(1e-5)
        total = total + share / beta * (guess - x0).square().flatten(1).mean(1) / weight
    return total.mean()


def test_how_hard_a_prompt_is_cancels_and_the_order_of_its_clips_changes_nothing() -> None:
    """Two prompts of three clips, from rewards to the loss of each objective."""
    u, u_old, v = draws(3)
    reward, order = torch.tensor([0.3, 0.9, 0.1, 5.0, 2.0, 4.0], dtype=torch.float64), torch.tensor([2, 0, 1, 4, 3, 5])

    def losses(reward: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        given, sigma = [each[order] for each in (u, u_old, v)], torch.linspace(0.2, 0.7, 6)[order]
        error, old_error = clip_error(given[0], given[2]), clip_error(given[1], given[2])
        a = implicit_split(group_advantage(reward[order], 3).advantage, 2.0)
        split = nft_split(*given, a, 0.5, sigma)  # type: ignore[arg-type]
        return torch.stack(
            [
                signed_flow_matching(*given, a, 0.5).value,  # type: ignore[arg-type]
                signed_flow_matching(*given, split.advantage, 0.5, weight=split.weight).value,  # type: ignore[arg-type]
                ppo_clip(matching_log_prob(error), matching_log_prob(old_error), a, 0.5).value,
                flow_matching(error, weight=dgpo_weight(error, old_error, a, 3, 2.0) * a).value,
            ]
        )

    base = losses(reward, torch.arange(6))
    assert_close(losses(reward + torch.tensor([7, 7, 7, -3, -3, -3]), torch.arange(6)), base, atol=1e-6, rtol=1e-5)
    assert_close(losses(reward, order), base, atol=1e-6, rtol=1e-5)
    assert not torch.isclose(losses(reward + torch.tensor([7, 0, 0, 0, 0, 0]), torch.arange(6)), base, rtol=1e-3).any()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_adaptive_nft_is_the_signed_objective_with_another_split_at_every_theta(path: Path, beta: float) -> None:
    u, u_old, x0, eps = draws(4)
    t = path.t_max * torch.linspace(0.1, 0.95, 6, dtype=torch.float64)
    x_t, v = add_noise(path, x0, eps, t), path.velocity(x0, eps, t)
    for at in (u, u_old):
        split = nft_split(at, u_old, v, A, beta, path.sigma(t))
        want = gradient(lambda x: papers_nft(path, x, u_old, x_t, x0, t, A, beta), at)
        got = gradient(lambda x: signed_flow_matching(x, u_old, v, split.advantage, beta, weight=split.weight).value, at)  # noqa: B023
        assert_close(got, want, atol=1e-6, rtol=1e-4)
    guess = path.split(x_t, u_old, t)[0]
    assert_close(split.advantage, A, atol=1e-6, rtol=0, check_dtype=False)
    one_factor = path.sigma(t).square() / (guess - x0).abs().flatten(1).mean(1)
    assert_close(split.weight, one_factor, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_a_clip_that_fits_already_weighs_at_most_by_the_floor() -> None:
    _, u_old = draws(2)
    split = nft_split(u_old, u_old, u_old, A, 1.0, torch.full((6,), 0.5), floor=0.1)
    assert_close(split.weight, torch.full((6,), 2.5), check_dtype=False)
    assert_close(split.advantage, A)
    assert float(nft_split(u_old, u_old, u_old, A, 1.0, torch.ones(6)).weight[0]) == pytest.approx(1e5)
    u, old = (u_old.clone().requires_grad_() for _ in range(2))
    assert not any(each.requires_grad for each in nft_split(u, old, u_old, A, 1.0, torch.ones(6)))


def test_rwr_is_the_signed_objective_with_good_clips_only_in_value() -> None:
    u, u_old, v = draws(3)
    weight = rwr_weight(A, 0.5)
    matching = flow_matching(clip_error(u, v), weight=weight).value
    signed = signed_flow_matching(u, u_old, v, torch.ones(6), 1.0, weight=weight).value
    constant = masked_mean(weight * clip_error(u_old, v), None)
    assert_close(signed.double(), (matching - constant).double(), atol=1e-5, rtol=1e-5)
    want = gradient(lambda x: flow_matching(clip_error(x, v), weight=weight).value, u)
    assert_close(gradient(lambda x: signed_flow_matching(x, u_old, v, torch.ones(6), 1.0, weight=weight).value, u), want)


def test_reward_weights_are_exponential_of_mean_one_and_nothing_is_imitated_without_a_reward() -> None:
    weight = rwr_weight(torch.tensor([0.0, 2.0, float("nan"), 1.0]), 0.5)
    raw = torch.tensor([1.0, math.exp(4), 0, math.exp(2)])
    assert_close(weight, raw * 3 / raw.sum(), atol=1e-6, rtol=1e-6)
    assert_close(rwr_weight(torch.tensor([1000.0, 1001.0]) + 1e3, 1.0), rwr_weight(torch.tensor([0.0, 1.0]), 1.0))
    assert rwr_weight(torch.full((3,), float("nan")), 1.0).tolist() == [0, 0, 0]
    for odd in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be positive"):
            rwr_weight(torch.zeros(2), odd)


def papers_awm(u: torch.Tensor, u_old: torch.Tensor, v: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, clip: float) -> torch.Tensor:
    """Advantage weighted matching as its code writes it: PPO on minus the weighted matching loss."""
    log_prob, old = (-weight * (each - v).square().flatten(1).mean(1) for each in (u, u_old))
    ratio = (log_prob - old).exp()
    return -torch.minimum(a * ratio, a * ratio.clamp(1 - clip, 1 + clip)).mean()


@pytest.mark.parametrize("at_old", [True, False])
def test_awm_is_ppo_on_the_matching_log_prob_and_the_signed_gradient_at_theta_old(at_old: bool) -> None:
    u, u_old, v = draws(3)
    u = u_old.clone() if at_old else u_old + 0.01 * u
    weight = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).square()  # t^2

    def ours(x: torch.Tensor) -> torch.Tensor:
        return ppo_clip(matching_log_prob(clip_error(x, v), weight), matching_log_prob(clip_error(u_old, v), weight), A, 1e-2).value

    assert_close(ours(u).double(), papers_awm(u, u_old, v, A, weight, 1e-2), atol=1e-6, rtol=1e-6)
    assert_close(gradient(ours, u), gradient(lambda x: papers_awm(x, u_old, v, A, weight, 1e-2), u), atol=1e-7, rtol=1e-4)
    signed = gradient(lambda x: signed_flow_matching(x, u_old, v, A, 1.0, weight=weight).value, u)
    assert bool((gradient(ours, u) - signed).abs().max() < 1e-7) == at_old


def test_the_matching_log_prob_by_hand_with_and_without_a_power() -> None:
    error = torch.tensor([4.0, 0.0625])
    assert matching_log_prob(error).tolist() == [-4, -0.0625] and matching_log_prob(error, 0.5).tolist() == [-2, -0.03125]
    assert matching_log_prob(error, torch.tensor([1.0, 2.0]), power=0.5).tolist() == [-4, -1]
    assert_close(matching_log_prob(error, power=0.25), torch.tensor([-4 * 2**0.5, -2.0]))


def papers_dgpo(error: torch.Tensor, reference: torch.Tensor, a: torch.Tensor, size: int, beta: float) -> torch.Tensor:
    """-log sigmoid of the group's preference, mean over groups: its gradient is beta / K times sigmoid times A times the gradient of the error."""
    return -torch.nn.functional.logsigmoid(-beta / size * (a * (error - reference)).reshape(-1, size).sum(1)).sum()


@pytest.mark.parametrize("at_old", [True, False])
def test_dgpo_is_flow_matching_with_a_group_weight_and_half_the_signed_gradient_at_theta_old(at_old: bool) -> None:
    u, u_old, v = draws(3)
    u = (u_old.clone() if at_old else u).requires_grad_()
    beta = 3.0

    def ours(x: torch.Tensor) -> torch.Tensor:
        return flow_matching(clip_error(x, v), weight=dgpo_weight(clip_error(x, v), clip_error(u_old, v), A, 3, beta) * A).value

    want = gradient(lambda x: papers_dgpo(clip_error(x, v), clip_error(u_old, v), A, 3, beta), u)
    assert_close(gradient(ours, u) * 6 * beta / 3, want, atol=1e-6, rtol=1e-5)
    weight = dgpo_weight(clip_error(u, v), clip_error(u_old, v), A, 3, beta)
    assert bool((weight == 0.5).all()) == at_old and not weight.requires_grad
    half = gradient(lambda x: signed_flow_matching(x, u_old, v, A, 1.0, weight=weight).value, u)
    assert bool((gradient(ours, u) - half).abs().max() < 1e-7) == at_old


def test_the_group_weight_by_hand_follows_ids_and_leaves_out_what_is_not_valid() -> None:
    error, reference, a = torch.tensor([2.0, 1.0, 5.0, 1.0]), torch.tensor([1.0, 1.5, 1.0, 0.5]), torch.tensor([1.0, -1.0, 0.5, float("nan")])
    valid = torch.tensor([True, True, True, False])
    first, second = 1 / (1 + math.exp(-2 * 1.5 / 2)), 1 / (1 + math.exp(-2 * 2.0))
    got = dgpo_weight(error, reference, a, 2, 2.0, valid=valid)
    assert_close(got, torch.tensor([first, first, second, second]))
    assert_close(dgpo_weight(error, reference, a, torch.tensor([0, 1, 1, 0]), 2.0), torch.tensor([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-2.5))])[[0, 1, 1, 0]])
    assert dgpo_weight(error, reference, a, 2, 2.0, valid=torch.zeros(4, dtype=torch.bool)).tolist() == [0.5] * 4
    assert dgpo_weight(error - 10 * a.nan_to_num(0), reference, a, 2, 2.0, valid=valid)[0] < 0.01, "a group whose order is learned"


def test_the_old_policy_follows_at_once_at_first_and_later_more_and_more_slowly() -> None:
    assert [old_policy_decay(i) for i in (0, 100, 500, 501, 9999)] == pytest.approx([0, 0.1, 0.5, 0.5, 0.5])
    assert [old_policy_decay(i, flat=75, rate=0.0075, largest=0.999) for i in (0, 75, 76, 175, 999)] == pytest.approx([0, 0, 0.0075, 0.75, 0.999])


def test_advantages_are_cut_and_scaled() -> None:
    assert implicit_split(torch.tensor([-9.0, -1.0, 0.0, 1.0, 2.0, 5.0]), 2.0).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.0]
    assert implicit_split(torch.tensor([-0.1, 0.3]), 0.5).tolist() == pytest.approx([-0.2, 0.6])
    with pytest.raises(ValueError, match="largest advantage must be positive"):
        implicit_split(torch.zeros(1), 0.0)
    for odd in (0.0, -1.0):
        with pytest.raises(ValueError, match="largest advantage must be positive"):
            implicit_split(torch.zeros(1), odd)
        with pytest.raises(ValueError, match="proximal must be positive"):
            signed_flow_matching(*draws(3), torch.zeros(6), odd)


def test_a_gaussian_generator_moves_its_mean_to_where_the_reward_is() -> None:
    """World: clips ~ N(m, 0.5^2), reward = -(x - 2)^2, the model is the exact velocity of N(m, 0.5^2) with m learned; clips are its own."""
    path, std = RectifiedFlow(), 0.5
    g = torch.Generator().manual_seed(0)
    m = torch.zeros((), requires_grad=True)

    def velocity(x_t: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        alpha, sigma = 1 - t, t
        gain = (sigma - alpha * std**2) / (alpha**2 * std**2 + sigma**2)
        return gain * (x_t - alpha * mean) - mean

    optimizer = torch.optim.SGD([m], lr=0.1)
    for _ in range(150):
        x0 = m.detach() + std * torch.randn(64, 1, 1, 1, 1, generator=g)
        reward = -(x0 - 2).square().flatten()
        a = implicit_split((reward - reward.mean()) / reward.std(), 2.0)
        t, eps = 0.05 + 0.9 * torch.rand(64, generator=g), torch.randn(x0.shape, generator=g)
        wide = t.view(-1, 1, 1, 1, 1)
        x_t = add_noise(path, x0, eps, t)
        loss = signed_flow_matching(velocity(x_t, wide, m), velocity(x_t, wide, m.detach()), path.velocity(x0, eps, t), a, 1.0)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    assert float(m.detach()) == pytest.approx(2.0, abs=0.2)
