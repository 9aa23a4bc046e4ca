"""Kernels against torch.distributions, the published formulas, and the closed-form recursion of a Gaussian world."""

from __future__ import annotations

import itertools
import math
from functools import partial
from inspect import isfunction
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from align.kernels import CPS, KL_UNITS, ODE, Ancestral, DanceSDE, FlowSDE, Gaussian, Kernel, StepWeight, build_kernel, kappa, kl_in, step_weight
from align.trajectory import rollout
from base_model.paths import Path, RectifiedFlow, VariancePreserving
from tests.worlds import (
    PATHS,
    GaussianModel,
    GaussianWorld,
    Rule,
    affine,
    ancestral_rule,
    clipped,
    conditions,
    cps_rule,
    flow_noise,
    sampler_moments,
    sde_rule,
)

CASES: list[tuple[Kernel, Rule]] = [
    (Ancestral(1.0), ancestral_rule(1.0)),
    (Ancestral(0.4), ancestral_rule(0.4)),
    (FlowSDE(0.7), sde_rule(flow_noise(0.7))),
    (FlowSDE(1.0, max_std=0.25), sde_rule(clipped(flow_noise(1.0), 0.25))),
    (DanceSDE(0.3), sde_rule(lambda world, t, s: 0.3)),
    (CPS(0.8), cps_rule(0.8)),
    (ODE(), ancestral_rule(0.0)),
]
every_kernel = pytest.mark.parametrize(("kernel", "rule"), CASES, ids=lambda case: "" if isfunction(case) else str(case))
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def random_gaussian(seed: int, n: int = 3) -> Gaussian:
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(n, 2, 3, 4, 5, generator=g, dtype=torch.float64)
    return Gaussian(mean, 0.1 + torch.rand(n, 1, 1, 1, 1, generator=g, dtype=torch.float64))


def step_of(kernel: Kernel, world: GaussianWorld, t: float, s: float) -> tuple[float, float, float]:
    """(A, b, std) of x_s = A x_t + b + std z, read off the kernel with the world's exact velocity."""
    slope, offset = world.velocity(t)
    x = f64(0).new_tensor([[0.0], [1.0]])
    step = kernel(world.path, x, slope * x + offset, f64(t), f64(s))
    return float(step.mean[1] - step.mean[0]), float(step.mean[0]), float(step.std.flatten()[0])


def test_log_prob_and_kl_agree_with_torch_distributions() -> None:
    p, q = random_gaussian(0), random_gaussian(1)
    x = q.mean + 0.3
    assert p.elements == 120
    assert_close(p.log_prob(x), Normal(p.mean, p.std).log_prob(x).mean((1, 2, 3, 4)), atol=1e-12, rtol=1e-12)
    assert_close(p.kl(q), kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).mean((1, 2, 3, 4)), atol=1e-12, rtol=1e-12)
    assert_close(p.kl_total(q), kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).sum((1, 2, 3, 4)), atol=1e-9, rtol=1e-12)


def test_log_prob_and_kl_agree_in_float32_too() -> None:
    p, q = (Gaussian(g.mean.float(), g.std.float()) for g in (random_gaussian(0), random_gaussian(1)))
    x = q.mean + 0.3
    assert_close(p.log_prob(x), Normal(p.mean.double(), p.std.double()).log_prob(x.double()).mean((1, 2, 3, 4)).float(), atol=1e-5, rtol=1e-6)
    wide = kl_divergence(Normal(p.mean.double(), p.std.double()), Normal(q.mean.double(), q.std.double()))
    assert_close(p.kl(q), wide.mean((1, 2, 3, 4)).float(), atol=1e-5, rtol=1e-6)


def test_one_clip_has_as_many_elements_and_scores_keep_the_type_of_the_step() -> None:
    p = Gaussian(torch.zeros(1, 2, 3), torch.ones(1, 1, 1))
    assert p.elements == 6 and p.log_prob(torch.zeros(1, 2, 3, dtype=torch.float64)).dtype == torch.float32
    assert p.sample(torch.zeros(1, 2, 3, dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_where_almost_all_noise_is_fresh_rounding_leaves_no_root_of_a_negative_number(path: Path) -> None:
    """Near t_max DDPM's posterior draws x_s anew: its std is almost sigma_s, which rounding puts above sigma_s in one case of 150."""
    g = torch.Generator().manual_seed(0)
    s, x = 0.98 * path.t_max * torch.rand(2000, generator=g), torch.ones(2000, 2)
    for kernel in (Ancestral(1.0), CPS(1.0)):
        step = kernel(path, x, x, path.t_max * (1 - 1e-3 * torch.rand(2000, generator=g)), s)
        assert step.mean.isfinite().all()
        assert_close(step.std[:, 0], path.sigma(s), atol=0.01, rtol=0)


def test_kl_agrees_with_a_monte_carlo_estimate_of_its_definition() -> None:
    mean = torch.full((1, 200_000), 0.3, dtype=torch.float64)
    p, q = Gaussian(mean, f64(0.5).reshape(1, 1)), Gaussian(torch.zeros_like(mean), f64(0.7).reshape(1, 1))
    x = p.sample(torch.Generator().manual_seed(0))
    estimate = p.log_prob(x) - q.log_prob(x)
    print(float(estimate), float(p.kl(q)))
    assert_close(estimate, p.kl(q), atol=0.005, rtol=0)


def test_kl_to_itself_is_exactly_zero_and_a_deterministic_step_has_no_density() -> None:
    p = random_gaussian(0)
    assert (p.kl(p) == 0).all()
    still = Gaussian(p.mean, torch.zeros_like(p.std))
    assert still.log_prob(p.mean).isnan().all() and torch.equal(still.sample(torch.Generator()), p.mean)


def test_the_gradient_of_log_prob_and_kl_is_the_finite_difference() -> None:
    p, q = random_gaussian(0), random_gaussian(1)
    x = q.mean + 0.3
    mean = p.mean.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, p.std).log_prob(x), mean)
    assert torch.autograd.gradcheck(lambda m: Gaussian(m, p.std).kl(q), mean)


@every_path
@every_kernel
def test_every_step_is_the_published_formula(kernel: Kernel, rule: Rule, path: Path) -> None:
    world = GaussianWorld(path)
    times = world.grid(10)
    for t, s in itertools.pairwise(times):
        assert step_of(kernel, world, t, s) == pytest.approx(affine(world, rule, t, s), abs=1e-12), (t, s)


def moments_of_rollout(kernel: Kernel, world: GaussianWorld, times: list[float]) -> tuple[float, float]:
    """Exact mean and std of the finished element: x0 is affine in the first noise and in each step's, so one clip of zeros and one for every unit of noise tell all."""
    num_noises = len(times) - 1
    x = torch.zeros(1 + num_noises, 1, 1, 1, 1, dtype=torch.float64)
    x[1] = 1.0

    def noise(k: int) -> Tensor:
        z = torch.zeros_like(x)
        z[2 + k] = 1.0
        return z

    end = rollout(GaussianModel(world), kernel, x, torch.tensor(times, dtype=torch.float64), conditions(len(x)), noise=noise, dtype=torch.float64).x0.flatten()
    return float(end[0]), float((end[1:] - end[0]).square().sum().sqrt())


@every_path
@every_kernel
@pytest.mark.parametrize("num_steps", [2, 6, 40])
def test_the_sampler_has_the_moments_of_the_closed_form_recursion_to_a_millionth(kernel: Kernel, rule: Rule, path: Path, num_steps: int) -> None:
    world = GaussianWorld(path)
    times = world.grid(num_steps)
    got, want = moments_of_rollout(kernel, world, times), sampler_moments(world, rule, times)[-1]
    print(got, want)
    assert got == pytest.approx(want, abs=1e-10)


def test_a_sampler_of_200000_elements_has_these_moments() -> None:
    """Standard errors are 0.0011 (mean) and 0.0008 (std) for a std of 0.5."""
    world, g = GaussianWorld(), torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 1, 250, 400, generator=g, dtype=torch.float64)
    times = torch.tensor(world.grid(6), dtype=torch.float64)
    for kernel in (FlowSDE(0.7), CPS(0.8)):
        end = rollout(GaussianModel(world), kernel, x, times, conditions(2), noise=g, dtype=torch.float64).x0
        mean, std = moments_of_rollout(kernel, world, world.grid(6))
        print(f"mean {float(end.mean()):.4f} (exact {mean:.4f}), std {float(end.std()):.4f} (exact {std:.4f})")
        assert abs(float(end.mean()) - mean) < 0.006 and abs(float(end.std()) - std) < 0.004


@every_path
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_ancestral_keeps_the_marginals_for_every_eta_as_the_grid_gets_finer(path: Path, eta: float) -> None:
    world = GaussianWorld(path)
    off = []
    for num_steps in (50, 500):
        times, mean, variance, worst = world.grid(num_steps), 0.0, 1.0, 0.0
        for t, s in itertools.pairwise(times):
            A, b, std = step_of(Ancestral(eta), world, t, s)
            mean, variance = A * mean + b, A**2 * variance + std**2
            want_mean, want_std = world.marginal(s)
            worst = max(worst, abs(mean - want_mean), abs(math.sqrt(variance) - want_std))
        off.append(worst)
    print(eta, off)
    assert off[1] < 0.006 and off[1] < 0.2 * off[0]


def off_target(kernel: Kernel, path: Path, num_steps: int) -> float:
    """Distance of the finished clips' distribution from the data's: of means and of standard deviations, the larger one."""
    world = GaussianWorld(path)
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(world.grid(num_steps)):
        A, b, std = step_of(kernel if s > 0 else ODE(), world, t, s)
        mean, variance = A * mean + b, A**2 * variance + std**2
    return max(abs(mean - world.mean), abs(math.sqrt(variance) - world.std))


@pytest.mark.parametrize(
    ("kernel", "order", "off"),
    [(Ancestral(1.0), 1.0, 0.003), (Ancestral(0.4), 1.0, 0.002), (DanceSDE(0.3), 1.0, 0.001), (ODE(), 1.0, 0.001), (FlowSDE(0.7), 0.4, 0.002)],
    ids=str,
)
@every_path
def test_the_kernels_converge_to_the_data_with_the_order_of_their_noise(path: Path, kernel: Kernel, order: float, off: float) -> None:
    """First order, as Euler and Euler-Maruyama in the moments; only FlowSDE, whose first step's noise never shrinks, is slower."""
    errors = [off_target(kernel, path, num_steps) for num_steps in (800, 1600)]
    measured = math.log2(errors[0] / errors[1])
    print(kernel, errors, measured)
    assert errors[1] < off and abs(measured - order) < 0.12


def test_how_narrow_clips_come_out_on_coarse_grids_is_what_the_readme_says() -> None:
    for kernel, percents in ((Ancestral(1.0), (-23, -13)), (FlowSDE(0.7), (-4, -2)), (DanceSDE(0.3), (-12, -6)), (ODE(), (-14, -7))):
        world = GaussianWorld()
        found = [100 * (moments_of_rollout(kernel, world, world.grid(num_steps))[1] / world.std - 1) for num_steps in (10, 20)]
        print(kernel, found)
        assert found == pytest.approx(percents, abs=0.5)


@every_path
def test_clipping_the_std_mends_the_slow_convergence_of_flow_sde(path: Path) -> None:
    clipped_off, free_off = off_target(FlowSDE(0.7, max_std=0.1), path, 1600), off_target(FlowSDE(0.7), path, 1600)
    print(clipped_off, free_off)
    assert clipped_off < 0.25 * free_off and clipped_off < 3e-4


def test_cps_does_not_converge_to_the_data_however_many_steps() -> None:
    """The known failure its docstring states."""
    for eta, settled in ((0.5, 0.459), (0.9, 0.378)):
        widths = [sampler_moments(GaussianWorld(std=0.5), cps_rule(eta), GaussianWorld().grid(k))[-1][1] for k in (1000, 4000)]
        print(eta, widths)
        assert widths == pytest.approx([settled, settled], abs=0.004)


@every_path
def test_flow_sde_is_ancestral_with_a_over_root_two_to_first_order(path: Path) -> None:
    world, a = GaussianWorld(path), 0.7
    off = []
    for delta in (1e-3, 1e-4):
        t = 0.5 * path.t_max
        flow, ancestral = step_of(FlowSDE(a), world, t, t - delta), step_of(Ancestral(a / math.sqrt(2)), world, t, t - delta)
        off.append((abs(flow[2] / ancestral[2] - 1), abs(flow[0] - ancestral[0]), abs(flow[1] - ancestral[1])))
    print(off)
    assert off[1][0] < 4.1e-4 and max(off[1][1:]) < 1e-7
    assert off[1][0] < 0.12 * off[0][0]  # the stds differ by O(delta), the means by O(delta^2)
    assert max(off[1][1:]) < 0.012 * max(off[0][1:])


def test_flow_sde_is_finite_at_t_max_where_its_noise_takes_the_next_grid_points_alpha() -> None:
    for path in (RectifiedFlow(), VariancePreserving()):
        for dtype in (torch.float32, torch.float64):
            t, s = torch.tensor(path.t_max, dtype=dtype), torch.tensor(0.9 * path.t_max, dtype=dtype)
            step = FlowSDE(0.7)(path, torch.ones(1, 4), torch.ones(1, 4), t, s)
            want = 0.7 * math.sqrt(1 / float(path.alpha(s)) * float(t - s))
            assert float(step.std) == pytest.approx(want, rel=1e-5) and step.mean.isfinite().all()
    for delta in (0.1, 0.001):
        assert float(FlowSDE(0.7)(RectifiedFlow(), torch.ones(1, 4), torch.ones(1, 4), f64(1.0), f64(1 - delta)).std) == pytest.approx(0.7), "it never shrinks"


def test_only_where_alpha_is_below_a_millionth_does_flow_sde_take_the_next_grid_points() -> None:
    for alpha, used in ((0.8e-6, 0.1), (1.2e-6, 1.2e-6)):
        t = f64(1 - alpha)
        step = FlowSDE(0.7)(RectifiedFlow(), torch.ones(1, 4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64), t, f64(0.9))
        assert float(step.std) == pytest.approx(0.7 * math.sqrt(float(t) / used * float(t - 0.9)), rel=1e-6)


@pytest.mark.parametrize("name", ["none", "g", "inv_kappa"])
def test_weights_have_the_shape_of_the_times(name: StepWeight) -> None:
    times = torch.tensor([[0.9, 0.7, 0.5], [0.8, 0.6, 0.4]], dtype=torch.float64)
    whole = step_weight(name, FlowSDE(0.7), RectifiedFlow(), times, times - 0.1)
    assert whole.shape == times.shape and whole.dtype == torch.float64
    alone = step_weight(name, FlowSDE(0.7), RectifiedFlow(), times[1, 2], times[1, 2] - 0.1)
    assert alone.shape == () and float(alone) == pytest.approx(float(whole[1, 2]))
    assert step_weight(name, FlowSDE(0.7), RectifiedFlow(), times.bfloat16(), times.bfloat16() - 0.1).isfinite().all()


def test_longcats_clip_bounds_the_std_and_recomputes_the_drift_with_the_lower_noise() -> None:
    kernel, free, path = FlowSDE(1.0, max_std=0.45), FlowSDE(1.0), RectifiedFlow()
    x, u = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = torch.tensor([1.0, 0.9, 0.3], dtype=torch.float64), torch.tensor([0.9, 0.8, 0.2], dtype=torch.float64)
    clipped_step, free_step = kernel(path, x, u, t, s), free(path, x, u, t, s)
    assert clipped_step.std.flatten().tolist() == pytest.approx([0.45, 0.45, (0.3 / 0.7 * 0.1) ** 0.5])
    assert torch.equal(clipped_step.mean[2], free_step.mean[2]), "where the clip is idle nothing changes"
    g = 0.45 / 0.1**0.5
    want = x[1] * (1 - g**2 * 0.1 / (2 * 0.9)) - u[1] * (1 + g**2 * 0.1 / (2 * 0.9)) * 0.1  # section 2.2's form of the mean, with the clipped g
    assert_close(clipped_step.mean[1], want, atol=1e-12, rtol=0)
    assert float((clipped_step.mean[1] - free_step.mean[1]).abs().max()) > 1e-3


def test_ancestral_is_ddpms_posterior_at_eta_one() -> None:
    """q(x_s | x_t, x0) by Bayes' rule on the joint Gaussian of (x_s, x_t)."""
    world, t, s = GaussianWorld(VariancePreserving()), 1.0, 0.7
    (alpha_t, sigma_t), (alpha_s, sigma_s) = world.coefficients(t), world.coefficients(s)
    r = alpha_t / alpha_s
    x0, x_t = 0.3, -0.8
    gain = r * sigma_s**2 / sigma_t**2
    mean, std = alpha_s * x0 + gain * (x_t - alpha_t * x0), math.sqrt(sigma_s**2 - gain * r * sigma_s**2)
    eps = (x_t - alpha_t * x0) / sigma_t
    u = world.path.velocity(f64(x0).reshape(1, 1), f64(eps).reshape(1, 1), f64(t))
    step = Ancestral(1.0)(world.path, f64(x_t).reshape(1, 1), u, f64(t), f64(s))
    assert (float(step.mean), float(step.std)) == pytest.approx((mean, std), abs=1e-12)


@every_path
@pytest.mark.parametrize("kernel", [Ancestral(1.0), FlowSDE(0.7), FlowSDE(1.0, max_std=0.2), DanceSDE(0.3), CPS(0.8)], ids=str)
def test_kappa_is_the_gradient_of_log_prob_with_respect_to_the_velocity(kernel: Kernel, path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, z = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64) for _ in range(2))
    u = torch.randn(3, 2, 4, generator=g, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) * path.t_max
    s = t - 0.1 * path.t_max
    step = kernel(path, x, u, t, s)
    gradient = torch.autograd.grad(step.log_prob((step.mean + step.std * z).detach()).sum(), u)[0]
    assert_close(gradient.abs(), z.abs() * kappa(kernel, path, t, s)[:, None, None] / step.elements, atol=1e-10, rtol=1e-10)


def test_kappa_of_flow_grpo_is_its_closed_form_and_inv_kappa_levels_the_steps() -> None:
    a, path = 0.7, RectifiedFlow()
    t = torch.linspace(0.9, 0.2, 8, dtype=torch.float64)
    s = t - 0.1
    closed = (1 / a + a / 2) * ((t - s) * (1 - t) / t).sqrt()
    assert_close(kappa(FlowSDE(a), path, t, s), closed, atol=1e-12, rtol=1e-12)
    assert_close(step_weight("inv_kappa", FlowSDE(a), path, t, s) * closed, torch.ones_like(t))
    assert_close(step_weight("g", FlowSDE(a), path, t, s), a * (t / (1 - t)).sqrt())
    assert_close(step_weight("none", FlowSDE(a), path, t, s), torch.ones_like(t))


FLOW_STEPS = torch.linspace(0.98, 0.1, 9, dtype=torch.float64)


def level(weight: Tensor, kernel: Kernel, t: Tensor, s: Tensor) -> float:
    """weight / inv_kappa, the same at every step where the two are one weight. Raises AssertionError where it is not."""
    ratio = weight / step_weight("inv_kappa", kernel, RectifiedFlow(), t, s)
    assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-10, rtol=0)
    return float(ratio[0])


def test_the_weights_of_the_flow_grpo_wan_script_and_of_longcat_are_inv_kappa() -> None:
    """g / sqrt(D), and sqrt(sigma / (1 - sigma)) / sqrt(D) wherever the std is not clipped."""
    a, t, s = 0.7, FLOW_STEPS[:-1], FLOW_STEPS[1:]
    sigma, delta = t, t - s
    g = a * (sigma / (1 - sigma)).sqrt()
    assert level(g / delta.sqrt(), FlowSDE(a), t, s) == pytest.approx(1 + a**2 / 2)
    longcat = (sigma / (1 - sigma)).sqrt() / delta.sqrt()
    assert level(longcat, FlowSDE(1.0), t, s) == pytest.approx(1.5)
    idle = (sigma / (1 - sigma) * delta).sqrt() < 0.45
    assert 0 < int(idle.sum()) < len(t)
    assert level(longcat[idle], FlowSDE(1.0, max_std=0.45), t[idle], s[idle]) == pytest.approx(1.5)
    with pytest.raises(AssertionError):
        level(longcat, FlowSDE(1.0, max_std=0.45), t, s)  # where it clips, the published weight is another one


def test_grpo_guards_gradient_is_inv_kappas() -> None:
    """Its loss -A rho / D, rho = exp((dlog p + <delta^2>/(2 c^2)) c), c = g sqrt(D), differentiated at the policy that sampled."""
    a, t, s, path = 0.7, FLOW_STEPS[:-1], FLOW_STEPS[1:], RectifiedFlow()
    g = torch.Generator().manual_seed(0)
    x, u, z = (torch.randn(len(t), 6, generator=g, dtype=torch.float64) for _ in range(3))
    old = FlowSDE(a)(path, x, u, t, s)
    sampled, delta = old.mean + old.std * z, t - s
    u.requires_grad_()
    new = FlowSDE(a)(path, x, u, t, s)
    c = old.std[:, 0]
    shift = (new.mean - old.mean).square().mean(1)
    rho = ((new.log_prob(sampled) - old.log_prob(sampled) + shift / (2 * c**2)) * c).exp()
    guard = torch.autograd.grad((-rho / delta).sum(), u, retain_graph=True)[0]
    ours = torch.autograd.grad((-new.log_prob(sampled) * step_weight("inv_kappa", FlowSDE(a), path, t, s)).sum(), u)[0]
    assert_close(guard, (1 + a**2 / 2) * ours, atol=1e-12, rtol=1e-10)


class Flash:
    """Flash-GRPO's kernel: g = sigma_1 sigma, sigma_1 the second point of the grid."""

    def __init__(self, second: float) -> None:
        self.second = second

    def __call__(self, path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        g, delta = self.second * t, t - s
        mean = x_t * (1 - g**2 * delta / (2 * t))[:, None] - u * ((1 + g**2 * (1 - t) / (2 * t)) * delta)[:, None]
        return Gaussian(mean, (g * delta.sqrt())[:, None])


def test_flash_grpos_table_is_inv_kappa() -> None:
    """The ten literals of the authors' script, for 20 steps of a scheduler of 1000 training steps with shift 3."""
    table = [7.4770, 7.0414, 6.6112, 6.1867, 5.7682, 5.3559, 4.9502, 4.5513, 4.1596, 3.7754]
    uniform = torch.linspace(0.999, 0, 21, dtype=torch.float64)
    sigma = 3 * uniform / (1 + 2 * uniform)
    weight = step_weight("inv_kappa", Flash(float(sigma[1])), RectifiedFlow(), sigma[:10], sigma[1:11])
    print([f"{float(w):.4f}" for w in weight])
    assert weight.tolist() == pytest.approx(table, abs=6e-5)


@every_path
@pytest.mark.parametrize("kernel", [Ancestral(1.0), FlowSDE(0.7), FlowSDE(1.0, max_std=0.2), DanceSDE(0.3), CPS(0.8)], ids=str)
def test_the_kl_in_v_is_the_squared_distance_of_the_velocities_and_kappa_is_the_exchange_rate(kernel: Kernel, path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, u, u_ref = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64) * path.t_max
    s = t - 0.1 * path.t_max
    policy, reference = kernel(path, x, u, t, s), kernel(path, x, u_ref, t, s)
    in_x, in_v = (kl_in(space, policy, reference, kernel, path, t, s) for space in ("x", "v"))  # type: ignore[arg-type]
    assert torch.equal(in_x, policy.kl(reference))
    assert_close(in_v, (u - u_ref).square().mean((1, 2)), atol=1e-10, rtol=1e-10)
    assert_close(in_x, in_v * kappa(kernel, path, t, s).square() / 2, atol=1e-10, rtol=1e-10)
    assert set(KL_UNITS) == {"x", "v"}
    with pytest.raises(ValueError, match="unknown: use x or v"):
        kl_in("u", policy, reference, kernel, path, t, s)  # type: ignore[arg-type]


def test_a_configuration_names_a_kernel() -> None:
    built = {name: build_kernel(name, 0.5) for name in ("ancestral", "flow", "longcat", "dance", "cps")}  # type: ignore[arg-type]
    assert built == {"ancestral": Ancestral(0.5), "flow": FlowSDE(0.5), "longcat": FlowSDE(0.5, max_std=0.45), "dance": DanceSDE(0.5), "cps": CPS(0.5)}
    with pytest.raises(ValueError, match="unknown: use ancestral, flow, longcat, dance, cps"):
        build_kernel("ode", 0.5)  # type: ignore[arg-type]


def test_the_steps_of_some_clips_are_theirs_in_any_order() -> None:
    p = random_gaussian(0)
    some = p[torch.tensor([2, 0, 2])]
    assert torch.equal(some.mean, p.mean[[2, 0, 2]]) and torch.equal(some.std, p.std[[2, 0, 2]])
    one_std = Gaussian(p.mean, p.std[:1])[torch.tensor([1, 2])]
    assert torch.equal(one_std.std, p.std[:1].expand(2, 1, 1, 1, 1))


def test_kl_along_the_path_is_never_less_than_the_kl_of_the_data_and_near_it_on_a_fine_grid() -> None:
    """Two worlds that differ in their mean by 0.2: 0.08 nats per element. A coarse grid charges more (the price tag of a kl_coef)."""
    near, far = GaussianWorld(mean=0.4), GaussianWorld(mean=0.6)
    charged = {}
    for num_steps in (10, 400):
        times = near.grid(num_steps)[:-1]
        pairs = itertools.pairwise(times)
        charged[num_steps] = sum(
            (step_of(Ancestral(1.0), near, t, s)[1] - step_of(Ancestral(1.0), far, t, s)[1]) ** 2 / (2 * step_of(Ancestral(1.0), near, t, s)[2] ** 2)
            for t, s in pairs
        )
    print(near.kl(far), charged)
    assert near.kl(far) == pytest.approx(0.08)
    assert charged[400] == pytest.approx(0.0815, abs=5e-4) and charged[10] == pytest.approx(0.149, abs=1e-3)


def test_kernels_compute_in_float32_whatever_the_state_is_stored_in() -> None:
    x, u = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16)
    for kernel, _ in CASES:
        step = kernel(RectifiedFlow(), x, u, torch.tensor([0.9, 0.8]), torch.tensor([0.8, 0.7]))
        assert step.mean.dtype == step.std.dtype == torch.float32 and step.std.shape == (2, 1)
        for state, time in product((torch.bfloat16, torch.float64), repeat=2):  # here one time for all clips
            alone = kernel(RectifiedFlow(), x.to(state), u.to(state), torch.tensor(0.9, dtype=time), torch.tensor(0.8, dtype=time))
            widest = torch.float64 if torch.float64 in (state, time) else torch.float32
            assert alone.mean.dtype == alone.std.dtype == widest and alone.std.shape == (1, 1)


def test_a_kernel_may_have_one_std_for_all_clips() -> None:
    def constant(path: Path, x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Gaussian:
        return Gaussian(x_t - (t - s)[:, None] * u, torch.full((1, 1), 0.2, dtype=x_t.dtype))

    t = torch.tensor([0.9, 0.5], dtype=torch.float64)
    assert step_weight("g", constant, RectifiedFlow(), t, t - 0.1).tolist() == pytest.approx([0.2 / 0.1**0.5] * 2)
    assert kappa(constant, RectifiedFlow(), t, t - 0.1).tolist() == pytest.approx([0.5, 0.5])


def test_impossible_noise_is_refused() -> None:
    for kernel, level in ((Ancestral, 0.0), (Ancestral, 1.0), (CPS, 0.0), (CPS, 1.0), (FlowSDE, 0.0), (DanceSDE, 0.0)):
        kernel(level)
    for kernel, level in ((Ancestral, 1.5), (Ancestral, -0.1), (CPS, -0.1), (CPS, 1.5), (FlowSDE, -1.0), (partial(FlowSDE, 1.0), 0.0), (DanceSDE, -1.0)):
        with pytest.raises(ValueError, match="must"):
            kernel(level)
    with pytest.raises(ValueError, match="unknown"):
        step_weight("kappa", ODE(), RectifiedFlow(), torch.ones(1), torch.zeros(1))  # type: ignore[arg-type]


# What a CPU cannot say


@pytest.mark.gpu
@every_path
@every_kernel
def test_a_gpu_in_single_precision_says_what_a_cpu_says_in_double(kernel: Kernel, rule: Rule, path: Path) -> None:
    """Mean, std, log-probability and KL of a step; times are on the device too, as the loop of sampling has them."""
    g = torch.Generator().manual_seed(0)
    x, u, v, z = (torch.randn(4, 2, 3, 4, 5, generator=g) for _ in range(4))
    t, s = torch.tensor([0.9, 0.7, 0.5, 0.2]), torch.tensor([0.8, 0.5, 0.3, 0.1])
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        x_t, one, other, noise, at, to = (tensor.to(device, dtype) for tensor in (x, u, v, z, t, s))
        p, q = (kernel(path, x_t, velocity, at, to) for velocity in (one, other))
        scores = [] if isinstance(kernel, ODE) else [p.log_prob(p.sample(noise)), p.kl(q)]
        found.append([tensor.double().cpu() for tensor in (p.mean, p.std, *scores)])
    assert len(found[0]) == (2 if isinstance(kernel, ODE) else 4) and found[0][0].abs().max() > 0.1
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
