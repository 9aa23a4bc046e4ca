"""GAE against sums written out, the value loss by hand, and a critic that finds a value function known in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align.critic import Critic, explained_variance, gae, value_loss
from align.kernels import Ancestral
from align.objectives.policy_gradient import step_rewards
from align.trajectory import rollout
from base_model.types import Conditioning
from tests.worlds import GaussianModel, GaussianWorld, affine, ancestral_rule, conditions

NAN = float("nan")


def terminal(reward: Tensor, num_steps: int) -> Tensor:
    return step_rewards(reward, torch.zeros(num_steps, len(reward)).to(reward), 0.0)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_steps_by_hand() -> None:
    """r = (0, 10), V = (4, 6), gamma 0.5, lambda 0.5: delta = (0 + 3 - 4, 10 - 6) = (-1, 4); A = (-1 + 0.25 * 4, 4) = (0, 4)."""
    got = gae(terminal(torch.tensor([10.0]), 2), torch.tensor([[4.0], [6.0]]), gamma=0.5, lam=0.5)
    assert got.advantage.tolist() == [[0.0], [4.0]] and got.returns.tolist() == [[4.0], [10.0]] and got.valid.tolist() == [True]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.5, 0.0), (1.0, 1.0)])
def test_it_is_the_papers_sum_written_out(gamma: float, lam: float) -> None:
    rewards, values = draws(5, 3), draws(5, 3, seed=1)
    after = torch.cat([values[1:], torch.zeros(1, 3).double()])
    delta = rewards + gamma * after - values
    want = torch.stack([sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, 5)) for k in range(5)])  # type: ignore[misc]
    got = gae(rewards, values, gamma=gamma, lam=lam)
    assert_close(got.advantage, want, atol=1e-12, rtol=0)
    assert_close(got.returns, want + values, atol=1e-12, rtol=0)


def test_the_two_ends_of_lambda_and_the_defaults() -> None:
    reward, values = draws(4), draws(6, 4, seed=1)
    assert_close(gae(terminal(reward, 6), values, lam=1.0).advantage, reward - values, atol=1e-12, rtol=0)
    assert_close(gae(terminal(reward, 6), values, lam=0.0).advantage, torch.cat([values[1:], reward[None]]) - values, atol=1e-12, rtol=0)
    assert_close(gae(terminal(reward, 6), values).advantage, gae(terminal(reward, 6), values, gamma=1.0, lam=0.95).advantage)
    assert not gae(terminal(reward, 6), values.requires_grad_()).advantage.requires_grad


def test_the_difficulty_of_a_prompt_cancels_and_clips_do_not_see_each_other() -> None:
    reward, values, order = draws(4), draws(6, 4, seed=1), torch.tensor([2, 0, 3, 1])
    base = gae(terminal(reward, 6), values).advantage
    assert_close(gae(terminal(reward + 5, 6), values + 5).advantage, base, atol=1e-12, rtol=0)
    assert_close(gae(terminal(reward[order], 6), values[:, order]).advantage, base[:, order], atol=0, rtol=0)


def test_a_single_step_is_the_reward_less_the_value() -> None:
    got = gae(torch.tensor([[2.0, 5.0]]), torch.tensor([[0.5, 6.0]]))
    assert got.advantage.tolist() == [[1.5, -1.0]] and got.returns.tolist() == [[2.0, 5.0]]


def test_an_unknown_reward_or_value_masks_its_clip_alone() -> None:
    reward, values = torch.tensor([1.0, NAN, 3.0]), torch.zeros(2, 3)
    values[0, 2] = NAN
    got = gae(terminal(reward, 2), values)
    assert got.valid.tolist() == [True, False, False]
    assert got.advantage[:, 1:].tolist() == [[0, 0], [0, 0]] == got.returns[:, 1:].tolist() and got.advantage[1, 0] == 1


@pytest.mark.parametrize(("rewards", "values"), [(torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(3), torch.zeros(3)), (torch.zeros(0, 3), torch.zeros(0, 3))])
def test_shapes_that_do_not_fit_are_refused(rewards: Tensor, values: Tensor) -> None:
    with pytest.raises(ValueError, match="of the same shape"):
        gae(rewards, values)


def test_the_value_loss_by_hand() -> None:
    """Returns 0; V_old 1; c 0.5. V 0.8: error 0.64, inside the range. V 0.2: the clipped 0.5 is worse, 0.25, without gradient. V 2: plain 4 is worse than 1.5^2."""
    value = torch.tensor([0.8, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    old, returns = torch.ones(3).double(), torch.zeros(3).double()
    loss = value_loss(value, old, returns, 0.5)
    assert float(loss.value.detach()) == pytest.approx((0.64 + 0.25 + 4) / 6)
    loss.value.backward()
    assert value.grad is not None and value.grad.tolist() == pytest.approx([0.8 / 3, 0, 2 / 3])
    assert float(loss.stats["value/clip_share"]) == pytest.approx(2 / 3) and float(loss.stats["value/loss"]) == float(loss.value.detach())
    assert not any(stat.requires_grad for stat in loss.stats.values()) and {stat.dtype for stat in loss.stats.values()} == {torch.float64}
    plain = value_loss(value, old, returns, math.inf)
    assert float(plain.value.detach()) == pytest.approx((0.64 + 0.04 + 4) / 6) and float(plain.stats["value/clip_share"]) == 0
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, 0.5).value, value)
    assert float(value_loss(torch.tensor([1.5]), torch.ones(1), torch.zeros(1), 0.5).stats["value/clip_share"]) == 0
    for odd in (0.0, -1.0):
        with pytest.raises(ValueError, match="clip_range"):
            value_loss(value, old, returns, odd)


def test_how_hard_a_prompt_is_cancels_in_the_value_loss_and_the_order_of_clips_changes_nothing() -> None:
    value, old, returns = (draws(4, seed=k) for k in range(3))
    base, hard, order = value_loss(value, old, returns, 0.5), torch.tensor([7.0, 7.0, -3.0, -3.0]), torch.tensor([2, 0, 3, 1])
    assert_close(value_loss(value + hard, old + hard, returns + hard, 0.5).value, base.value, atol=1e-12, rtol=0)
    assert_close(value_loss(value[order], old[order], returns[order], 0.5).value, base.value, atol=1e-12, rtol=0)


def test_only_the_critic_gets_a_gradient() -> None:
    value, old, returns = (torch.tensor([0.5, 2.0], requires_grad=True) for _ in range(3))
    loss = value_loss(value, old, returns, 0.5)
    loss.value.backward()
    assert not any(stat.requires_grad for stat in loss.stats.values())
    assert value.grad is not None and old.grad is None and returns.grad is None
    rewards, values = torch.ones(2, 1, requires_grad=True), torch.ones(2, 1, requires_grad=True)
    assert not gae(rewards, values).advantage.requires_grad and not gae(rewards, values).returns.requires_grad
    assert not explained_variance(value, returns).requires_grad


def test_masked_values_do_not_count_even_when_they_are_nan() -> None:
    value = torch.tensor([[0.5, NAN], [1.0, 2.0]], requires_grad=True)
    valid = torch.tensor([[True, False], [True, True]])
    returns = torch.tensor([[0.0, NAN], [1.0, 5.0]])
    loss = value_loss(value, torch.full((2, 2), NAN).where(~valid, value.detach()), returns, 10.0, valid=valid)
    loss.value.backward()
    assert float(loss.value.detach()) == pytest.approx((0.25 + 0 + 9) / 6)
    assert value.grad is not None and value.grad.isfinite().all() and float(value.grad[0, 1]) == 0
    assert float(loss.stats["value/explained_variance"]) == pytest.approx(float(explained_variance(value.detach()[valid], returns[valid])))


def test_explained_variance_of_a_perfect_an_ignorant_and_a_misleading_critic() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(explained_variance(returns + 7, returns)) == 1
    assert float(explained_variance(torch.zeros(4), returns)) == 0
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3)
    assert float(explained_variance(returns / 2, returns)) == pytest.approx(0.75)
    assert math.isnan(float(explained_variance(returns, torch.ones(4))))
    assert math.isnan(float(explained_variance(returns, returns, valid=torch.zeros(4, dtype=torch.bool)))), "and without a warning"
    assert float(explained_variance(torch.tensor([1.0, 9.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]), valid=torch.tensor([True, False, True]))) == 1


def told(texts: int, tokens: int = 3, width: int = 6) -> Conditioning:
    text = torch.randn(texts, tokens, width, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(texts, tokens, dtype=torch.bool)
    mask[0, 1:] = False
    return Conditioning(("",) * texts, text, mask)


def awake(channels: int = 2) -> Critic:
    critic = Critic(channels, 6, width=16)
    torch.nn.init.normal_(critic.value.weight, generator=torch.Generator().manual_seed(5))
    return critic


def test_a_fresh_critic_says_nothing_and_takes_nothing_from_the_global_random_numbers() -> None:
    state = torch.get_rng_state()
    critic = Critic(2, 6)
    assert torch.equal(torch.get_rng_state(), state)
    assert critic(torch.randn(3, 2, 1, 4, 4), torch.tensor([0.1, 0.5, 0.9]), told(3)).tolist() == [0, 0, 0]
    first = Critic(2, 6, seed=1)
    torch.randn(1)
    assert torch.equal(first.latents_in.weight, Critic(2, 6, seed=1).latents_in.weight) and not torch.equal(first.latents_in.weight, critic.latents_in.weight)
    torch.manual_seed(0)
    assert torch.equal(Critic(2, 6, seed=0).latents_in.weight, critic.latents_in.weight)


def test_the_value_is_what_its_docstring_says_on_latents_that_fill_the_grid() -> None:
    """On 2 x 4 x 4 latents pooling changes nothing, so the network can be written out."""
    critic, cond = awake(), told(2)
    cond = Conditioning(cond.prompts, cond.text / 100, cond.mask)  # so small that the layer norm, which makes up for a factor, does not hide one
    x, t = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.7])
    seen = torch.cat([x.flatten(1), x.flatten(2).std(2, correction=0)], 1)
    words = torch.stack([cond.text[0, 0], cond.text[1].mean(0)])
    angle = 1000 * t[:, None] * torch.exp(-math.log(10_000) * torch.arange(32) / 32)
    hidden = critic.latents_in(seen) + critic.text_in[1](critic.text_in[0](words)) + critic.time_in(torch.cat([angle.cos(), angle.sin()], 1))
    first, second = critic.hidden[0], critic.hidden[2]
    want = critic.value(torch.nn.functional.silu(second(torch.nn.functional.silu(first(torch.nn.functional.silu(hidden))))))[:, 0]
    assert_close(critic(x, t, cond), want, atol=1e-5, rtol=1e-5)


def test_states_and_words_in_half_precision_are_valued_in_full() -> None:
    critic, cond = awake(), told(2)
    x, t = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.tensor([0.2, 0.7])
    half = Conditioning(cond.prompts, cond.text.bfloat16(), cond.mask)
    assert torch.equal(critic(x, t, half), critic(x.float(), t, Conditioning(cond.prompts, half.text.float(), cond.mask)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 4), (2, 4, 4), (5, 3, 9), (4, 8, 12)])
def test_latents_of_any_size_have_a_value_and_each_clip_its_own(shape: tuple[int, int, int]) -> None:
    critic, cond = awake(), told(3)
    x, t = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.5, 0.9])
    together = critic(x, t, cond)
    assert together.shape == (3,) and together.isfinite().all()
    for i in range(3):
        assert_close(critic(x[i : i + 1], t[i : i + 1], cond[[i]]), together[i : i + 1], atol=1e-6, rtol=0)


def test_the_value_hears_latents_their_spread_the_time_and_the_words_but_not_the_padding() -> None:
    critic, cond = awake(), told(2)
    x, t = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.5, 0.5])
    base = critic(x, t, cond)
    assert ((critic(x + 0.1, t, cond) - base).abs() > 1e-4).all()
    assert ((critic(x, t + 0.1, cond) - base).abs() > 1e-4).all()
    assert ((critic(x.repeat_interleave(2, 3) + torch.tensor([0.5, -0.5]).repeat(4)[:, None], t, cond) - base).abs() > 1e-4).all(), "same means, other spread"
    text = cond.text.clone()
    text[0, 1:] = 9.0
    assert torch.equal(critic(x, t, Conditioning(cond.prompts, text, cond.mask)), base)
    text[0, 0] += torch.arange(6)
    moved = (critic(x, t, Conditioning(cond.prompts, text, cond.mask)) - base).detach().abs()
    assert moved[0] > 1e-4 and moved[1] == 0
    assert critic(x, t, Conditioning(cond.prompts, text, torch.zeros(2, 3, dtype=torch.bool))).isfinite().all(), "no words at all"
    assert_close(critic(x, torch.tensor(0.5), cond), base)
    x.requires_grad_()
    critic(x, t, cond).sum().backward()
    assert x.grad is None, "the critic never pulls on the policy"
    assert all(parameter.grad is not None for parameter in critic.parameters())


def test_words_are_averaged_over_the_tokens_there_are() -> None:
    critic = awake()
    one = Conditioning(("",), torch.full((1, 1, 6), 1.0) * torch.arange(6), torch.ones(1, 1, dtype=torch.bool))
    three = Conditioning(("",), one.text.repeat(1, 3, 1), torch.ones(1, 3, dtype=torch.bool))
    x = torch.zeros(1, 2, 1, 4, 4)
    assert_close(critic(x, torch.tensor(0.3), three), critic(x, torch.tensor(0.3), one))


def test_a_critic_learns_the_value_function_of_an_analytic_world() -> None:
    """Reward: mean of the finished clip. V(x_t, t) is linear in the mean of x_t, flat at the first step (full noise forgets it) and steeper at each
    later one; the critic is told nothing of this."""
    world, num_steps, n = GaussianWorld(), 4, 256
    times, rule = world.grid(num_steps), ancestral_rule(1.0)
    later = (1.0, 0.0)
    value = []
    for k, (t, s) in reversed(list(enumerate(itertools.pairwise(times)))):
        slope, offset, _ = affine(world, rule if k < num_steps - 1 else ancestral_rule(0.0), t, s)
        later = later[0] * slope, later[0] * offset + later[1]
        value.insert(0, later)

    class Model(GaussianModel):
        def __call__(self, x_t: Tensor, t: Tensor, cond: object) -> Tensor:
            a, b = world.velocity(float(t[0]))
            return a * x_t + b

    critic = Critic(1, 1, width=32)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)

    def clips() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> states, times, exact values [K-1,B] and rewards [B]."""
        x = torch.randn(n, 1, 1, 2, 2, generator=g)
        trajectory = rollout(Model(world), Ancestral(1.0), x, torch.tensor(times), conditions(n), noise=g)
        steps = trajectory.steps()
        exact = torch.stack([a * step.x.flatten(1).mean(1) + b for step, (a, b) in zip(steps, value, strict=False)])
        return torch.stack([step.x for step in steps]), torch.stack([step.t for step in steps]), exact, trajectory.x0.flatten(1).mean(1)

    for _ in range(120):
        x, t, _, reward = clips()
        for k in range(len(x)):
            loss = value_loss(critic(x[k], t[k], conditions(n)), torch.zeros(n), reward, math.inf)
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
    x, t, exact, reward = clips()
    with torch.no_grad():
        found = torch.stack([critic(x[k], t[k], conditions(n)) for k in range(len(x))])
    off = [float((found[k] - exact[k]).square().mean().sqrt() / reward.std()) for k in range(len(x))]
    of_reward = [float(explained_variance(found[k], reward)) for k in range(len(x))]
    print(f"distance from the exact value, in sd of the reward: {off}; explained variance of the reward: {of_reward}")
    assert max(off) < 0.15 and of_reward == sorted(of_reward) and of_reward[-1] > 0.4
    assert float(explained_variance(found[1:], exact[1:])) > 0.95
