"""The clipped objective by hand, its gradient by finite differences, and the estimator against an exact policy gradient."""

from __future__ import annotations

import itertools
import math
import pathlib
from inspect import isfunction

import pytest
import torch
from torch.testing import assert_close

from align.advantage import group_advantage
from align.critic import gae
from align.kernels import CPS, Ancestral, FlowSDE, Gaussian, Kernel, kappa
from align.objectives import Loss
from align.objectives.policy_gradient import kl_mask, kl_penalty, ppo_clip, score_function, step_rewards
from align.objectives.regression import clip_error
from align.trajectory import finish, replay, rollout
from base_model.paths import Path
from base_model.times import sampling_times
from tests.worlds import PATHS, GaussianModel, GaussianWorld, Rule, affine, ancestral_rule, conditions, cps_rule, flow_noise, reward_gradient, sde_rule

README = " ".join((pathlib.Path(__file__).parents[2] / "align" / "README.md").read_text().replace(" %", "%").split())


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_loss_by_hand_including_its_sign() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5 with advantages +2, -2, +2, -2 and clip 0.2 give -2.4, 3.0, -1.0, 1.6."""
    ratio, advantage = vector(1.5, 1.5, 0.5, 0.5), vector(2, -2, 2, -2)
    for i, want in enumerate((-2.4, 3.0, -1.0, 1.6)):
        loss = ppo_clip(ratio[i : i + 1].log(), vector(0), advantage[i : i + 1], 0.2)
        assert float(loss.value) == pytest.approx(want, abs=1e-12)
    whole = ppo_clip(ratio.log(), torch.zeros(4).double(), advantage, 0.2)
    assert float(whole.value) == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6) / 4, abs=1e-12)
    assert float(whole.stats["policy/ratio"]) == pytest.approx(1.0)
    assert float(whole.stats["policy/clip_share"]) == 1.0
    assert float(whole.stats["policy/approx_kl"]) == pytest.approx(-(math.log(1.5) + math.log(0.5)) / 2, abs=1e-12)
    assert not any(stat.requires_grad for stat in whole.stats.values()) and {stat.dtype for stat in whole.stats.values()} == {torch.float64}


def test_going_down_the_loss_makes_good_samples_likelier() -> None:
    log_prob = vector(-1, -1).requires_grad_()
    ppo_clip(log_prob, vector(-1, -1), vector(1, -1), 1e-4).value.backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([-0.5, 0.5])


def test_the_gradient_is_the_finite_difference_and_dies_only_where_the_clip_binds() -> None:
    log_prob = vector(0.3, 0.3, -0.3, -0.3, 0.05).requires_grad_()
    old, advantage, weight = torch.zeros(5).double(), vector(1, -1, 1, -1, 1), vector(1, 2, 3, 4, 5)
    assert torch.autograd.gradcheck(lambda x: ppo_clip(x, old, advantage, 0.2, weight=weight).value, log_prob)
    ppo_clip(log_prob, old, advantage, 0.2, weight=weight).value.backward()
    assert log_prob.grad is not None
    assert [g == 0 for g in log_prob.grad.tolist()] == [True, False, False, True, False]


def test_masked_clips_do_not_count_even_when_they_are_nan() -> None:
    log_prob = vector(0.1, float("nan"), -0.2).requires_grad_()
    valid = torch.tensor([True, False, True])
    loss = ppo_clip(log_prob, vector(0, 0, 0), vector(1, float("nan"), -1), 1.0, valid=valid)
    alone = ppo_clip(vector(0.1, -0.2), vector(0, 0), vector(1, -1), 1.0)
    assert_close(loss.value.detach(), alone.value, atol=1e-15, rtol=0)
    loss.value.backward()
    assert log_prob.grad is not None and float(log_prob.grad[1]) == 0 and log_prob.grad.isfinite().all()
    nothing = ppo_clip(log_prob, vector(0, 0, 0), vector(1, 1, 1), 1.0, valid=torch.zeros(3, dtype=torch.bool))
    assert float(nothing.value.detach()) == 0 and nothing.value.requires_grad


def test_approx_kl_estimates_the_exact_kl_per_element() -> None:
    """200 clips of 1000 elements, the mean moved by 0.1 std: 0.005 nats per element."""
    old = Gaussian(torch.zeros(200, 1000, dtype=torch.float64), torch.ones(200, 1, dtype=torch.float64))
    new = Gaussian(old.mean + 0.1, old.std)
    x = old.sample(torch.Generator().manual_seed(0))
    stats = ppo_clip(new.log_prob(x), old.log_prob(x), torch.zeros(200), 1.0).stats
    print(float(stats["policy/approx_kl"]), float(old.kl(new)[0]))
    assert float(stats["policy/approx_kl"]) == pytest.approx(float(old.kl(new)[0]), abs=1e-3) and float(old.kl(new)[0]) == pytest.approx(0.005)


def test_a_clip_range_that_is_not_positive_is_refused() -> None:
    for odd in (0.0, -1.0):
        with pytest.raises(ValueError, match="clip_range"):
            ppo_clip(vector(0), vector(0), vector(1), odd)
        with pytest.raises(ValueError, match="threshold"):
            kl_mask(vector(0), vector(0), vector(0), vector(1), odd)


def test_only_the_policy_gets_a_gradient() -> None:
    def leaves(n: int) -> list[torch.Tensor]:
        return [vector(0.1, -0.2).requires_grad_() for _ in range(n)]

    score, clip, mask = leaves(3), leaves(4), leaves(5)
    losses = [
        score_function(score[0], score[1], weight=score[2]),
        ppo_clip(clip[0], clip[1], clip[2], 0.5, weight=clip[3]),
        kl_mask(mask[0], mask[1], mask[2], mask[3], 1.0, weight=mask[4]),
    ]
    for loss in losses:
        assert not any(stat.requires_grad for stat in loss.stats.values())
        loss.value.backward()
    for inputs in (score, clip, mask):
        assert inputs[0].grad is not None and all(each.grad is None for each in inputs[1:])
    kl, weight = leaves(2)
    kl_penalty(kl, 2.0, weight=weight).backward()
    assert kl.grad is not None and weight.grad is None


def test_the_share_that_is_clipped_is_counted_by_the_distance_from_one() -> None:
    ratio = vector(1.1, 0.9, 1.04, 0.96, 1.3)
    stats = ppo_clip(ratio.log(), torch.zeros(5).double(), torch.ones(5).double(), 0.05).stats
    assert float(stats["policy/clip_share"]) == pytest.approx(0.6)
    assert float(ppo_clip(vector(1.0).log(), vector(0), vector(1), 1e-9).stats["policy/clip_share"]) == 0
    assert float(ppo_clip(vector(2.0).log(), vector(0), vector(1), 1.0).stats["policy/clip_share"]) == 0, "at the edge nothing is clipped yet"


def test_the_score_function_by_hand_and_its_gradient_is_that_of_the_ratio_before_any_update() -> None:
    log_prob, advantage, weight = vector(-0.5, 2.0).requires_grad_(), vector(3, -1), vector(1, 10)
    loss = score_function(log_prob, advantage, weight=weight)
    assert float(loss.value.detach()) == pytest.approx((3 * 0.5 + 10 * 2.0) / 2) and float(loss.stats["policy/loss"]) == float(loss.value.detach())
    assert torch.autograd.gradcheck(lambda x: score_function(x, advantage, weight=weight).value, log_prob)
    loss.value.backward()
    again = log_prob.detach().clone().requires_grad_()
    ppo_clip(again, again.detach(), advantage, 1e-4, weight=weight).value.backward()
    assert_close(log_prob.grad, again.grad, atol=1e-15, rtol=0)
    assert float(score_function(vector(-0.5, 2.0), advantage).value) == pytest.approx(1.75)


def test_the_score_function_masks_what_is_not_valid_also_where_it_is_nan() -> None:
    log_prob = vector(0.1, float("nan"), -0.2).requires_grad_()
    loss = score_function(log_prob, vector(1, float("nan"), -1), valid=torch.tensor([True, False, True]))
    loss.value.backward()
    assert float(loss.value.detach()) == pytest.approx(-0.15) and log_prob.grad is not None and log_prob.grad.tolist() == [-0.5, 0, 0.5]


def test_an_endless_clip_range_is_plain_importance_sampling() -> None:
    ratio, advantage = vector(0.01, 40.0), vector(-1, 2)
    loss = ppo_clip(ratio.log(), vector(0, 0), advantage, math.inf)
    assert float(loss.value) == pytest.approx((0.01 - 80) / 2) and float(loss.stats["policy/clip_share"]) == 0


KL_CASES = [  # ratio, advantage, kl, whether the mask stops it
    (1.5, 1.0, 0.2, True),
    (1.5, -1.0, 0.2, False),
    (0.5, -1.0, 0.2, True),
    (0.5, 1.0, 0.2, False),
    (1.5, 1.0, 0.05, False),
    (0.5, -1.0, 0.1, False),
    (0.5, -1.0, 0.11, True),
    (1.0, 1.0, 0.2, False),
    (1.5, 0.0, 0.2, False),
    (1.5, 1.0, math.nan, True),
]


def test_the_kl_mask_stops_only_what_is_outside_and_leads_further() -> None:
    ratio, advantage, kl, stopped = (torch.tensor(column, dtype=torch.float64) for column in zip(*KL_CASES, strict=True))
    log_prob = ratio.log().requires_grad_()
    loss = kl_mask(log_prob, torch.zeros(10).double(), kl, advantage, 0.1, weight=torch.arange(1.0, 11.0).double())
    loss.value.backward()
    assert log_prob.grad is not None
    want = -advantage * ratio * (stopped == 0) * torch.arange(1, 11) / 10
    assert_close(log_prob.grad, want, atol=1e-15, rtol=0)
    assert float(loss.value.detach()) == pytest.approx(float(want.sum()))
    assert float(loss.stats["policy/masked_share"]) == pytest.approx(4 / 10) and float(loss.stats["policy/ratio"]) == pytest.approx(float(ratio.mean()))
    assert not any(stat.requires_grad for stat in loss.stats.values())


def test_the_kl_mask_by_hand_on_two_numbers_and_against_finite_differences() -> None:
    log_prob, old, kl, advantage = vector(0.5, -0.3).requires_grad_(), vector(0.3, -0.2), vector(0.05, 0.3), vector(1, 2)
    loss = kl_mask(log_prob, old, kl, advantage, 0.1)
    assert float(loss.value.detach()) == pytest.approx(-(math.exp(0.2) + 2 * math.exp(-0.1)) / 2)
    assert float(loss.stats["policy/kl"]) == pytest.approx(0.175) and float(loss.stats["policy/loss"]) == float(loss.value.detach())
    assert torch.autograd.gradcheck(lambda x: kl_mask(x, old, kl, advantage, 0.1).value, log_prob)
    valid = torch.tensor([True, False])
    half = vector(0.5, float("nan")).requires_grad_()
    masked = kl_mask(half, old, vector(0.05, float("nan")), vector(1, float("nan")), 0.1, valid=valid)
    masked.value.backward()
    assert float(masked.value.detach()) == pytest.approx(-math.exp(0.2)) and half.grad is not None and half.grad.tolist() == pytest.approx([-math.exp(0.2), 0])
    assert {name: float(stat) for name, stat in masked.stats.items()} == pytest.approx(
        {"policy/loss": -math.exp(0.2), "policy/ratio": math.exp(0.2), "policy/masked_share": 0, "policy/kl": 0.05}
    )
    assert {stat.dtype for stat in masked.stats.values()} == {torch.float64}


def test_a_policy_inside_the_region_has_the_same_gradient_under_clip_and_mask() -> None:
    advantage, old = vector(1, -1, 2), vector(0, 0, 0)
    one, two = vector(0.01, -0.02, 0.0).requires_grad_(), vector(0.01, -0.02, 0.0).requires_grad_()
    ppo_clip(one, old, advantage, 0.5).value.backward()
    kl_mask(two, old, vector(0, 0, 0), advantage, 1e-5).value.backward()
    assert_close(one.grad, two.grad)


def test_how_hard_a_prompt_is_cancels_and_the_order_of_its_clips_changes_nothing() -> None:
    """Two prompts of three clips, from rewards to the loss of each objective."""
    reward, log_prob, old = vector(0.3, 0.9, 0.1, 5.0, 2.0, 4.0), vector(0.01, -0.02, 0.03, 0, 0.02, -0.01), vector(0, 0.01, 0, 0.02, 0, 0)
    kl, order = vector(0, 1, 0, 1, 1, 0), torch.tensor([2, 0, 1, 4, 3, 5])

    def losses(reward: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        advantage, valid, _ = group_advantage(reward[order], 3, divide_by="max_group_std")
        given = log_prob[order], old[order]
        found = score_function(given[0], advantage, valid=valid), ppo_clip(*given, advantage, 0.02, valid=valid), kl_mask(*given, kl[order], advantage, 0.5, valid=valid)
        return torch.stack([loss.value for loss in found])

    base = losses(reward, torch.arange(6))
    assert_close(losses(reward + vector(7, 7, 7, -3, -3, -3), torch.arange(6)), base, atol=1e-12, rtol=0)
    assert_close(losses(reward, order), base, atol=1e-12, rtol=0)
    assert float(base.abs().min()) > 1e-3 and not torch.allclose(losses(reward + vector(7, 0, 0, 0, 0, 0), torch.arange(6)), base)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("kernel", [Ancestral(0.7), FlowSDE(0.7), CPS(0.5)], ids=lambda kernel: type(kernel).__name__)
def test_the_kl_in_velocity_space_is_two_over_kappa_squared_of_that_of_the_step(path: Path, kernel: Ancestral) -> None:
    g = torch.Generator().manual_seed(0)
    x, u, other = (torch.randn(3, 2, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t, s = path.t_max * vector(0.9, 0.5, 0.3), path.t_max * vector(0.7, 0.4, 0.1)
    in_x = kernel(path, x, u, t, s).kl(kernel(path, x, other, t, s))
    assert_close(clip_error(u, other).double(), 2 * in_x / kappa(kernel, path, t, s).square(), atol=0, rtol=1e-5)


def test_the_kl_in_the_reward_is_paid_at_each_step_and_the_reward_comes_at_the_last() -> None:
    kl = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], requires_grad=True)
    got = step_rewards(torch.tensor([1.0, float("nan")]), kl, 2.0)
    assert_close(got, torch.tensor([[-0.2, -0.4], [-0.6, -0.8], [0.0, float("nan")]]), equal_nan=True)
    assert not got.requires_grad
    assert step_rewards(torch.tensor([1.0]), torch.tensor([[0.25]]), 2.0).tolist() == [[0.5]]
    assert float(step_rewards(torch.tensor([1.0]), torch.tensor([[0.1], [0.2]]), 0.5).sum()) == pytest.approx(1 - 0.15)


def test_a_loss_adds_named_terms_and_refuses_a_name_twice() -> None:
    kl = vector(0.5, 1.5).requires_grad_()
    loss = Loss(vector(1.0)[0], {}).plus("kl", kl_penalty(kl, 0.1, weight=vector(1, 3), valid=torch.tensor([True, True])))
    assert float(loss.value.detach()) == pytest.approx(1 + 0.1 * (0.5 + 4.5) / 2)
    assert float(loss.stats["kl"]) == pytest.approx(0.25) and not loss.stats["kl"].requires_grad
    loss.value.backward()
    assert kl.grad is not None and kl.grad.tolist() == pytest.approx([0.05, 0.15])
    with pytest.raises(ValueError, match="already"):
        loss.plus("kl", kl.sum())


KERNELS: list[tuple[Kernel, Rule]] = [(Ancestral(1.0), ancestral_rule(1.0)), (FlowSDE(0.9), sde_rule(flow_noise(0.9))), (CPS(0.5), cps_rule(0.5))]


def estimates(world: GaussianWorld, kernel: Kernel, times: list[float], noisy: list[int], *, batches: int = 25, clips: int = 2_000) -> torch.Tensor:
    """The policy gradient of E[-(x0 - 1)^2] with respect to a constant added to the velocity, by the recipes' own functions: [batches, (noisy steps, pathwise)]."""
    model, found = _Vectorised(GaussianModel(world)), []
    for batch in range(batches):
        g = torch.Generator().manual_seed(batch)
        x = torch.randn(clips, 1, 1, 1, 2, generator=g, dtype=torch.float64)
        trajectory = rollout(model, kernel, x, torch.tensor(times, dtype=torch.float64), conditions(clips), noise=g, stochastic=noisy, dtype=torch.float64)
        reward = -(trajectory.x0 - 1).square().flatten(1).mean(1)
        score = 0.0
        for step in trajectory.steps():
            gaussian = replay(model, kernel, step, trajectory.cond)
            loss = ppo_clip(gaussian.log_prob(step.x_next), step.log_prob, reward - reward.mean(), 1e-4).value * gaussian.elements
            score -= float(torch.autograd.grad(loss, model.network.value)[0])
        again = -(finish(model, trajectory) - 1).square().mean()
        found.append([score * clips / (clips - 1), float(torch.autograd.grad(again, model.network.value)[0])])  # the batch's own mean as baseline takes one clip's share
    return torch.tensor(found)


@pytest.mark.parametrize(("kernel", "rule"), KERNELS, ids=lambda case: "" if isfunction(case) else str(case))
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_policy_gradient_of_a_whole_trajectory_and_the_pathwise_term_are_the_exact_gradient(path: Path, kernel: Kernel, rule: Rule) -> None:
    """The sampler is affine and the reward quadratic, so the gradient of the expected reward is a closed form, step by step."""
    world, noisy = GaussianWorld(path), [0, 1, 2]
    times = world.grid(4)
    by_step = reward_gradient(world, rule, times, noisy)
    found = estimates(world, kernel, times, noisy)
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    whole, error_of_whole = float(found.sum(1).mean()), float(found.sum(1).std() / len(found) ** 0.5)
    print(f"noisy steps {float(mean[0]):.4f} +- {float(error[0]):.4f} (exact {sum(by_step[:-1]):.4f}), last step {float(mean[1]):.4f} (exact {by_step[-1]:.4f})")
    assert abs(float(mean[0]) - sum(by_step[:-1])) < 4 * float(error[0]) and float(error[0]) < 0.02 * abs(sum(by_step))
    assert abs(float(mean[1]) - by_step[-1]) < 4 * float(error[1]) + 1e-6 and float(error[1]) < 0.01 * abs(sum(by_step))
    assert abs(whole - sum(by_step)) < 4 * error_of_whole
    assert abs(by_step[-1]) > 0.05 * abs(sum(by_step)), "the pathwise term is not negligible here"


def one_step_default(times: list[float], first: int) -> tuple[float, float]:
    """What one noisy step of the first `first` finds of the exact gradient: its share, times `first`; cosine with it where every step has a parameter of its own."""
    gradients = [reward_gradient(GaussianWorld(), sde_rule(flow_noise(0.9)), times, [k]) for k in range(first)]
    exact = torch.tensor(gradients, dtype=torch.float64).mean(0)
    found = torch.zeros_like(exact)
    found[:first] = torch.tensor([gradients[k][k] / first for k in range(first)], dtype=torch.float64)
    return float(first * found.sum() / exact.sum()), float(torch.cosine_similarity(found, exact, dim=0))


def test_the_bias_of_the_one_step_default_is_what_the_readme_says() -> None:
    """It leaves out how the parameters move the deterministic steps. On the recipes' grid (6 steps, shift 3) most of the gradient is in the last one."""
    (steep, askew), (even, straight) = (one_step_default(sampling_times(GaussianWorld().path, 6, shift=shift).double().tolist(), 5) for shift in (3.0, 1.0))
    print(steep, askew, even, straight)
    assert (steep, askew, even, straight) == pytest.approx((0.62, 0.43, 1.08, 0.87), abs=0.006)
    assert f"5 times its mean is {steep:.0%} of the exact gradient at shift 3 and {even:.0%} at shift 1, and" in README
    assert f"the cosine between the two is {askew:.2f} and {straight:.2f}." in README
    times = sampling_times(GaussianWorld().path, 6, shift=3.0).double().tolist()
    by_step = reward_gradient(GaussianWorld(), ancestral_rule(1.0), times, list(range(5)))
    found = sum(by_step[:-1]) / sum(by_step)
    assert found == pytest.approx(0.43, abs=0.005) and f"the score finds {found:.0%} of it" in README, "with noise in all steps but the last"


def test_one_noisy_step_estimates_its_own_part_and_the_pathwise_term_the_steps_behind_it() -> None:
    world = GaussianWorld()
    times = world.grid(4)
    by_step = reward_gradient(world, sde_rule(flow_noise(0.9)), times, [1])
    found = estimates(world, FlowSDE(0.9), times, [1])
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    print(mean.tolist(), error.tolist(), by_step)
    assert abs(float(mean[0]) - by_step[1]) < 4 * float(error[0]) and float(error[0]) < 0.1 * abs(by_step[1])
    assert abs(float(mean[1]) - sum(by_step[2:])) < 4 * float(error[1])
    assert abs(by_step[0]) > 0.01, "what moves the step before the noise is in neither"


def test_a_perfect_critic_leaves_the_gradient_unbiased_and_makes_it_far_less_noisy() -> None:
    """The affine world again, where V_k(x) = E[reward | x_k] is a closed form. GAE with lambda 0 finds the noisy steps' share of the exact gradient, from a quarter
    of the variance that the reward itself, less its mean, leaves; lambda 1 is that reward less V, unbiased too."""
    world, kernel, num_steps, n = GaussianWorld(), Ancestral(1.0), 6, 8_000
    times, rule = world.grid(num_steps), ancestral_rule(1.0)
    later, carried, exact = (1.0, 0.0), 1.0, 0.0  # reward = slope * mean(x_k) + offset from step k on
    value = []
    for k, (t, s) in reversed(list(enumerate(itertools.pairwise(times)))):
        step_slope, step_offset, _ = affine(world, rule if k < num_steps - 1 else ancestral_rule(0.0), t, s)
        (alpha_t, sigma_t), (d_alpha, d_sigma) = world.coefficients(t), world.slopes(t)
        c_x0, c_eps, _, _ = rule(world, t, s)
        if k < num_steps - 1:
            exact += carried * (c_x0 * -sigma_t + c_eps * alpha_t) / (alpha_t * d_sigma - sigma_t * d_alpha)
        later = later[0] * step_slope, later[0] * step_offset + later[1]
        carried *= step_slope
        value.insert(0, later)

    model, g = _Vectorised(GaussianModel(world)), torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, 1, 1, generator=g, dtype=torch.float64)
    trajectory = rollout(model, kernel, x, torch.tensor(times, dtype=torch.float64), conditions(n), noise=g, dtype=torch.float64)
    reward, steps = trajectory.x0.flatten(1).mean(1), trajectory.steps()
    values = torch.stack([a * step.x.flatten(1).mean(1) + b for step, (a, b) in zip(steps, value, strict=False)])  # [K,B]
    rewards = step_rewards(reward, torch.zeros(len(steps), n), 0.0)

    def per_clip(advantages: torch.Tensor) -> torch.Tensor:
        """Gradient of each clip's sum over steps of A log p with respect to the shift, [B]."""
        total = torch.zeros(n, dtype=torch.float64)
        for advantage, step in zip(advantages, steps, strict=True):
            shift = torch.zeros(n, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
            u = model(step.x, step.t, trajectory.cond) + shift
            log_prob = kernel(world.path, step.x, u, step.t, step.s).log_prob(step.x_next)
            total += advantage * torch.autograd.grad(log_prob.sum(), shift)[0].flatten()
        return total

    plain = per_clip((reward - reward.mean()).expand(len(steps), -1))
    for lam, share in ((0.0, 0.3), (1.0, 0.8)):
        got = per_clip(gae(rewards, values, lam=lam).advantage)
        print(f"lambda {lam}: {float(got.mean()):.4f}, exact {exact:.4f}; variance {float(got.var()):.3f} of {float(plain.var()):.3f}")
        assert float(got.mean()) == pytest.approx(exact, abs=4 * float(got.std()) / n**0.5) and float(got.var()) < share * float(plain.var())


class _Vectorised(GaussianModel):
    """One time for all clips: the slope is looked up once."""

    def __init__(self, model: GaussianModel) -> None:
        self.world, self.path, self.network, self.calls = model.world, model.path, model.network, 0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        a, b = self.world.velocity(float(t[0]))
        return a * x_t + b + self.network.value
