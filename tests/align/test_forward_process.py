"""Signed flow matching: the paper's two-sided loss, flow matching where everything is good, and an update towards what is better."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from align.objectives.forward_process import implicit_split, signed_flow_matching
from align.objectives.regression import clip_error, flow_matching
from base_model.paths import RectifiedFlow, add_noise

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


def test_advantages_are_cut_and_scaled() -> None:
    assert implicit_split(torch.tensor([-9.0, -1.0, 0.0, 1.0, 2.0, 5.0]), 2.0).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="largest advantage must be positive"):
        implicit_split(torch.zeros(1), 0.0)
    with pytest.raises(ValueError, match="proximal must be positive"):
        signed_flow_matching(*draws(3), torch.zeros(6), 0.0)


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
