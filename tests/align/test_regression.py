"""Flow matching: dense and packed give the same mean per clip, and the exact velocity of a Gaussian world minimises it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from align.objectives.regression import clip_error, flow_matching, packed_clip_error
from base_model.paths import add_noise
from tests.worlds import PATHS, GaussianModel, GaussianWorld, conditions


def draws(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)


def test_packed_and_dense_give_the_same_error_for_each_clip_whatever_the_order_of_tokens() -> None:
    sizes = (3, 1, 5)
    u, target = draws(sum(sizes), 4)
    segment = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    want = torch.stack([clip_error(a[None], b[None])[0] for a, b in zip(u.split(sizes), target.split(sizes), strict=True)])
    assert_close(packed_clip_error(u, target, segment, 3), want)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert_close(packed_clip_error(u[order], target[order], segment[order], 3), want)


def test_the_error_is_numpys_mean_over_everything_but_clips() -> None:
    u, target = draws(3, 2, 2, 3, 3)
    want = ((u.double().numpy() - target.double().numpy()) ** 2).mean((1, 2, 3, 4))
    assert_close(clip_error(u, target).double(), torch.tensor(want), atol=1e-6, rtol=0)
    for dtype in (torch.bfloat16, torch.float64):
        kinds = [clip_error(u.to(dtype), target).dtype, clip_error(u, target.to(dtype)).dtype]
        packed = [packed_clip_error(a.flatten(1), b.flatten(1), torch.arange(3), 3).dtype for a, b in ((u.to(dtype), target), (u, target.to(dtype)))]
        assert {*kinds, *packed} == {torch.float32}


def test_given_elements_take_no_part_in_the_mean_or_the_gradient() -> None:
    u, target = draws(2, 2, 3, 2, 2)
    keep = torch.ones(2, 1, 3, 1, 1, dtype=torch.bool)
    keep[0, 0, 0] = False
    assert_close(clip_error(u, target, keep=keep)[0], clip_error(u[:1, :, 1:], target[:1, :, 1:])[0])
    assert_close(clip_error(u, target, keep=keep)[1], clip_error(u, target)[1])
    tokens, wanted = (x.clone().requires_grad_(i == 0) for i, x in enumerate(draws(6, 4)))
    kept = torch.tensor([True, False, True, True, True, True])
    error = packed_clip_error(tokens, wanted, torch.tensor([0, 0, 0, 1, 1, 1]), 2, keep=kept)
    assert_close(error[0].detach(), (tokens - wanted)[[0, 2]].square().mean().detach())
    error.sum().backward()
    assert tokens.grad is not None and tokens.grad[1].abs().max() == 0
    assert packed_clip_error(tokens, wanted, torch.zeros(6, dtype=torch.long), 2).isnan().tolist() == [False, True]


def test_every_clip_counts_the_same_however_many_tokens_it_has() -> None:
    error = packed_clip_error(torch.ones(10, 1), torch.zeros(10, 1), torch.tensor([0] * 9 + [1]), 2)
    loss = flow_matching(error * torch.tensor([1.0, 3.0]))
    assert float(loss.value) == 2.0


def test_weights_and_masks_by_hand() -> None:
    error, weight = torch.tensor([1.0, 2.0, float("nan")], requires_grad=True), torch.tensor([3.0, 1.0, 1.0], requires_grad=True)
    loss = flow_matching(error, weight=weight, valid=torch.tensor([True, True, False]))
    assert float(loss.value.detach()) == pytest.approx(2.5) and float(loss.stats["flow_matching/error"]) == pytest.approx(1.5)
    assert float(loss.stats["flow_matching/loss"]) == float(loss.value.detach()) and not any(stat.requires_grad for stat in loss.stats.values())
    loss.value.backward()
    assert error.grad is not None and error.grad.tolist() == [1.5, 0.5, 0.0] and weight.grad is None


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_exact_velocity_has_zero_gradient_and_the_residual_of_the_closed_form(path: object) -> None:
    """E|u - E[u | x_t]|^2 = Var(u) - slope^2 Var(x_t), known in closed form."""
    world = GaussianWorld(path)  # type: ignore[arg-type]
    model, g, t = GaussianModel(world), torch.Generator().manual_seed(0), 0.6 * world.path.t_max
    x0 = world.mean + world.std * torch.randn(2, 1, 1, 300, 400, generator=g, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    times = torch.full((2,), t, dtype=torch.float64)
    loss = flow_matching(clip_error(model(add_noise(world.path, x0, eps, times), times, conditions(2)), world.path.velocity(x0, eps, times)))
    loss.value.backward()
    d_alpha, d_sigma = world.slopes(t)
    want = (d_alpha * world.std) ** 2 + d_sigma**2 - (world.velocity(t)[0] * world.marginal(t)[1]) ** 2
    gradient = float(model.network.value.grad)  # type: ignore[arg-type]
    print(float(loss.value.detach()), want, gradient)
    assert float(loss.value.detach()) == pytest.approx(want, rel=0.01) and abs(gradient) < 0.01


def test_the_gradient_is_the_finite_difference_of_dense_and_of_packed_clips() -> None:
    """The loss is quadratic, so that a central difference is exact at any width, 1 here."""
    u, target = draws(2, 3)
    segment, weight = torch.tensor([0, 1]), torch.tensor([1.0, 3.0])
    for error in (clip_error, lambda u, target: packed_clip_error(u, target, segment, 2)):
        at = u.clone().requires_grad_()
        flow_matching(error(at, target), weight=weight).value.backward()  # type: ignore[operator]
        for place in ((0, 0), (1, 2)):
            step = torch.zeros_like(u)
            step[place] = 1.0
            ends = [float(flow_matching(error(u + sign * step, target), weight=weight).value) for sign in (1, -1)]  # type: ignore[operator]
            assert at.grad is not None and float(at.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2, abs=1e-6)


def test_the_order_of_clips_does_not_matter() -> None:
    u, target = draws(3, 2, 2, 3, 3)
    order, weight = torch.tensor([2, 0, 1]), torch.tensor([1.0, 3.0, 2.0])
    assert_close(flow_matching(clip_error(u[order], target[order]), weight=weight[order]).value, flow_matching(clip_error(u, target), weight=weight).value)
