"""The clipped objective by hand, its gradient by finite differences, and the estimator against an exact policy gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from align.kernels import Ancestral, Gaussian
from align.objectives import Loss
from align.objectives.policy_gradient import kl_penalty, ppo_clip
from align.trajectory import rollout, transition
from base_model.paths import Path
from tests.worlds import PATHS, GaussianModel, GaussianWorld, affine, ancestral_rule, conditions


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
    assert not any(stat.requires_grad for stat in whole.stats.values())


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
    with pytest.raises(ValueError, match="clip_range"):
        ppo_clip(vector(0), vector(0), vector(1), 0.0)


def test_a_loss_adds_named_terms_and_refuses_a_name_twice() -> None:
    kl = vector(0.5, 1.5).requires_grad_()
    loss = Loss(vector(1.0)[0], {}).plus("kl", kl_penalty(kl, 0.1, weight=vector(1, 3), valid=torch.tensor([True, True])))
    assert float(loss.value.detach()) == pytest.approx(1 + 0.1 * (0.5 + 4.5) / 2)
    assert float(loss.stats["kl"]) == pytest.approx(0.25) and not loss.stats["kl"].requires_grad
    loss.value.backward()
    assert kl.grad is not None and kl.grad.tolist() == pytest.approx([0.05, 0.15])
    with pytest.raises(ValueError, match="already"):
        loss.plus("kl", kl.sum())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_policy_gradient_is_unbiased_up_to_the_deterministic_last_step(path: Path) -> None:
    """Reward = mean of the finished clip; the policy is a constant added to the exact velocity.

    The sampler is affine, so dE[reward]/d shift is a closed form: each step adds d mean / d shift, carried on by the later steps' slopes. The estimator
    must find the noisy steps' part of it; the last, deterministic step's part is what every flow RL code leaves out.
    """
    world, kernel, num_steps, n = GaussianWorld(path), Ancestral(1.0), 4, 40_000
    times = world.grid(num_steps)
    rule = ancestral_rule(1.0)
    carried, exact = 1.0, []
    for t, s in reversed(list(itertools.pairwise(times))):
        (alpha_t, sigma_t), (d_alpha, d_sigma) = world.coefficients(t), world.slopes(t)
        # x = alpha x0 + sigma eps and u = alpha' x0 + sigma' eps, solved for d(x0, eps) / d u by Cramer's rule
        determinant = alpha_t * d_sigma - sigma_t * d_alpha
        c_x0, c_eps, _, _ = rule(world, t, s)
        exact.append(carried * (c_x0 * -sigma_t + c_eps * alpha_t) / determinant)
        carried *= affine(world, rule, t, s)[0]
    last, noisy = exact[0], sum(exact[1:])

    model, g = GaussianModel(world), torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 1, 1, 2, generator=g, dtype=torch.float64)
    model_batch = _Vectorised(model)
    trajectory = rollout(model_batch, kernel, x, torch.tensor(times, dtype=torch.float64), conditions(n), noise=g, dtype=torch.float64)
    reward = trajectory.x0.flatten(1).mean(1)
    per_clip = torch.zeros(n, dtype=torch.float64)
    for step in trajectory.steps():
        gaussian = transition(model_batch, kernel, step.x, step.t, step.s, trajectory.cond)
        total = ppo_clip(gaussian.log_prob(step.x_next), step.log_prob, reward - reward.mean(), 1e-4).value * gaussian.elements
        per_clip[0] -= torch.autograd.grad(total, model.network.value)[0]
    estimate = float(per_clip[0])
    print(f"estimate {estimate:.4f}; exact: noisy steps {noisy:.4f}, deterministic last step {last:.4f}")
    assert estimate == pytest.approx(noisy, abs=0.02 * abs(noisy) + 0.01)
    assert abs(last) > 0.05


class _Vectorised(GaussianModel):
    """One time for all clips: the slope is looked up once."""

    def __init__(self, model: GaussianModel) -> None:
        self.world, self.path, self.network, self.calls = model.world, model.path, model.network, 0

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        a, b = self.world.velocity(float(t[0]))
        return a * x_t + b + self.network.value
