"""Reward gradients against closed forms and finite differences; what each method leaves without gradient; what checkpointing saves."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align.kernels import ODE
from align.objectives.reward_gradient import check_differentiable, draw_last, draw_late, last_steps, reward_ascent, reward_of, single_step, some_frames
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.lora import add_lora
from base_model.networks.dit import DiTConfig
from base_model.paths import Path
from base_model.tiny import build_tiny
from base_model.types import Conditioning
from tests.worlds import PATHS, GaussianModel, GaussianWorld, affine, ancestral_rule, conditions

K = 5


def setting(path: Path) -> tuple[GaussianModel, Tensor, Tensor]:
    """-> model, noise [3,1,2,2,2], grid."""
    world = GaussianWorld(path)
    x = torch.randn(3, 1, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianModel(world, 0.1), x, torch.tensor(world.grid(K), dtype=torch.float64)


def by_hand(world: GaussianWorld, num_steps: int) -> float:
    """d mean(x0) / d shift when the shift is trained in the last `num_steps` of the K ODE steps: each adds its pull, carried on by the later steps' slopes."""
    times, rule, carried, total = world.grid(K), ancestral_rule(0.0), 1.0, 0.0
    for t, s in list(reversed(list(itertools.pairwise(times))))[:num_steps]:
        (alpha_t, sigma_t), (d_alpha, d_sigma) = world.coefficients(t), world.slopes(t)
        c_x0, c_eps, _, _ = rule(world, t, s)
        total += carried * (c_x0 * -sigma_t + c_eps * alpha_t) / (alpha_t * d_sigma - sigma_t * d_alpha)
        carried *= affine(world, rule, t, s)[0]
    return total


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("num_steps", [1, 2, K])
def test_the_gradient_is_that_of_the_last_steps_in_closed_form(path: Path, num_steps: int, checkpointed: bool) -> None:
    model, x, times = setting(path)
    x0 = last_steps(model, x, times, conditions(3), num_steps, checkpointed=checkpointed)
    (gradient,) = torch.autograd.grad(x0.mean(), model.network.value)
    assert float(gradient) == pytest.approx(by_hand(model.world, num_steps), rel=1e-9)
    assert_close(x0.detach(), rollout(model, ODE(), x, times, conditions(3), noise=torch.Generator(), stochastic=[]).x0, atol=0, rtol=0)


def test_all_steps_give_the_finite_difference_of_the_whole_sampler() -> None:
    model, x, times = setting(PATHS[0])
    reward = reward_ascent(last_steps(model, x, times, conditions(3), K).square().flatten(1).sum(1)).value
    (gradient,) = torch.autograd.grad(reward, model.network.value)
    ends = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            model.network.value.add_(step)
            ends.append(float(-last_steps(model, x, times, conditions(3), K).square().flatten(1).sum(1).mean()))
            model.network.value.sub_(step)
    assert float(gradient) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-6)


@pytest.mark.parametrize("checkpointed", [True, False])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("step", [0, 3, K - 1])
def test_a_single_step_guesses_the_clip_at_once_and_only_it_has_a_gradient(path: Path, step: int, checkpointed: bool) -> None:
    """x0 = alpha' .. - sigma u on both paths, so d x0 / d shift = -sigma."""
    model, x, times = setting(path)
    x0 = single_step(model, x, times, conditions(3), step, checkpointed=checkpointed)
    (gradient,) = torch.autograd.grad(x0.mean(), model.network.value)
    assert float(gradient) == pytest.approx(-float(path.sigma(times[step])), abs=1e-12)
    states = [x]
    for t, s in itertools.pairwise(times[: step + 1]):
        states.append(ODE()(path, states[-1], model(states[-1], t.expand(3), conditions(3)), t, s).mean)
    want = path.split(states[-1], model(states[-1], times[step].expand(3), conditions(3)), times[step].expand(3))[0]
    assert_close(x0.detach(), want.detach(), atol=1e-12, rtol=0)


def test_steps_outside_the_grid_are_refused() -> None:
    model, x, times = setting(PATHS[0])
    for odd in (0, K + 1, -1):
        with pytest.raises(ValueError, match=f"{odd} steps with gradient of 5: give 1 to 5"):
            last_steps(model, x, times, conditions(3), odd)
    for odd in (-1, K):
        with pytest.raises(ValueError, match=f"step {odd} of 5: give 0 to 4"):
            single_step(model, x, times, conditions(3), odd)
    for wrong in (times[:-1], times.flip(0), torch.cat([times[:2], times[1:]])):
        with pytest.raises(ValueError, match="times must decrease strictly and end at 0"):
            last_steps(model, x, wrong, conditions(3), 1)
        with pytest.raises(ValueError, match="times must decrease strictly and end at 0"):
            single_step(model, x, wrong, conditions(3), 1)


def test_the_number_of_model_calls_is_that_of_the_steps_and_one_more_for_each_that_is_checkpointed() -> None:
    for checkpointed, extra in ((True, 2), (False, 0)):
        model, x, times = setting(PATHS[0])
        last_steps(model, x, times, conditions(3), 2, checkpointed=checkpointed).sum().backward()
        assert model.calls == K + extra


def test_checkpointing_is_the_default() -> None:
    model, x, times = setting(PATHS[0])
    last_steps(model, x, times, conditions(3), 1).sum().backward()
    assert model.calls == K + 1
    single_step(model, x, times, conditions(3), 0).sum().backward()
    assert model.calls == K + 1 + 2
    scored = 0

    def contrast(video: Tensor, prompts: Sequence[str]) -> Tensor:
        nonlocal scored
        scored += 1
        return video.square().flatten(1).mean(1)

    reward_of(contrast, model, x.requires_grad_(), conditions(3), name="contrast", differentiable=True).sum().backward()
    assert scored == 2


def test_alignprop_draws_every_number_of_steps_and_refl_only_late_ones() -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [draw_last(4, g) for _ in range(2000)]
    assert set(drawn) == {1, 2, 3, 4} and min(drawn.count(n) for n in range(1, 5)) > 430
    assert {draw_last(4, g, least=3) for _ in range(50)} == {3, 4}
    assert {draw_late(40, g) for _ in range(300)} == set(range(30, 40)) and {draw_late(3, g) for _ in range(20)} == {2}
    assert {draw_late(10, g, share=0.2) for _ in range(50)} == {8, 9} and {draw_late(4, g, share=1.0) for _ in range(90)} == {0, 1, 2, 3}


def test_a_few_consecutive_frames_of_every_clip_are_decoded() -> None:
    x0 = torch.arange(2 * 5.0).reshape(2, 1, 5, 1, 1)
    g = torch.Generator().manual_seed(0)
    seen = {tuple(some_frames(x0, 2, g)[0].flatten().tolist()) for _ in range(100)}
    assert seen == {(0, 1), (1, 2), (2, 3), (3, 4)}
    assert torch.equal(some_frames(x0, 5, g), x0) and some_frames(x0, 1, g).shape == (2, 1, 1, 1, 1)
    for odd in (0, 6):
        with pytest.raises(ValueError, match=f"{odd} latent frames of 5: give 1 to 5"):
            some_frames(x0, odd, g)


def test_the_frames_that_are_not_decoded_get_no_gradient() -> None:
    x0 = torch.randn(2, 1, 5, 2, 2, requires_grad=True)
    part = some_frames(x0, 2, torch.Generator().manual_seed(1))
    part.sum().backward()
    assert x0.grad is not None and int((x0.grad.flatten(3).sum((0, 1, 3)) > 0).sum()) == 2


def brightness(video: Tensor, prompts: Sequence[str]) -> Tensor:
    return video.flatten(1).mean(1)


def test_a_scorer_that_may_not_be_differentiated_is_refused_in_one_line() -> None:
    model, x, _ = setting(PATHS[0])
    with pytest.raises(UserError, match="the scorer jpeg is not differentiable") as caught:
        reward_of(brightness, model, x, conditions(3), name="jpeg", differentiable=False)
    assert "\n" not in str(caught.value)
    check_differentiable(True, "brightness")
    with pytest.raises(UserError, match="the scorer sloppy says it is differentiable, but its reward carries no gradient") as caught:
        reward_of(lambda video, prompts: brightness(video, prompts).detach(), model, x.requires_grad_(), conditions(3), name="sloppy", differentiable=True)
    assert "\n" not in str(caught.value)
    assert not reward_of(brightness, model, x.detach(), conditions(3), name="brightness", differentiable=True).requires_grad, "nothing to differentiate is no lie"


@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_reward_is_of_the_decoded_clip_and_its_prompts(checkpointed: bool) -> None:
    model, x, _ = setting(PATHS[0])
    seen: list[tuple[torch.Size, Sequence[str]]] = []

    def score(video: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((video.shape, prompts))
        return video.square().flatten(1).mean(1)

    cond = conditions(3)
    cond = Conditioning(("a", "b", "c"), cond.text, cond.mask)
    x.requires_grad_()
    reward = reward_of(score, model, x, cond, name="s", differentiable=True, checkpointed=checkpointed)
    assert_close(reward, x.square().flatten(1).mean(1))
    assert seen == [(torch.Size([3, 2, 3, 2, 2]), ("a", "b", "c"))]
    reward.sum().backward()
    assert_close(x.grad, x.detach() / 4)
    assert len(seen) == 1 + checkpointed


def test_the_ascent_by_hand_with_and_without_a_hinge() -> None:
    reward = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = reward_ascent(reward)
    loss.value.backward()
    assert not any(stat.requires_grad for stat in loss.stats.values())
    assert float(loss.value.detach()) == -2 and reward.grad is not None and reward.grad.tolist() == [-0.5, -0.5]
    assert {name: float(value) for name, value in loss.stats.items()} == {"reward_gradient/loss": -2, "reward_gradient/reward": 2, "reward_gradient/unknown_share": 0}
    again = reward.detach().clone().requires_grad_()
    hinged = reward_ascent(again, hinge=2.0)
    hinged.value.backward()
    assert float(hinged.value.detach()) == 0.5 and again.grad is not None and again.grad.tolist() == [-0.5, 0]
    assert torch.autograd.gradcheck(lambda r: reward_ascent(r, hinge=2.0).value, reward.detach().double().requires_grad_())


def test_how_hard_a_prompt_is_moves_no_gradient_and_the_order_of_clips_changes_nothing() -> None:
    clip, order = torch.tensor([0.3, 0.9, 0.1, 5.0], requires_grad=True), torch.tensor([2, 0, 3, 1])
    plain = reward_ascent(clip.square())
    easier = reward_ascent(clip.square() + torch.tensor([7.0, 7.0, -3.0, -3.0]))  # of two prompts
    gradients = [torch.autograd.grad(loss.value, clip)[0] for loss in (plain, easier)]
    assert torch.equal(gradients[0], gradients[1]) and float((easier.value - plain.value).detach()) == pytest.approx(-2)
    assert_close(reward_ascent(clip[order].square()).value, plain.value)


def test_an_unknown_reward_is_masked_and_counted_also_under_a_hinge() -> None:
    for hinge in (None, 5.0):
        reward = torch.tensor([1.0, math.nan, 3.0, 4.0], requires_grad=True)
        loss = reward_ascent(reward, hinge=hinge, valid=torch.tensor([True, True, True, False]))
        loss.value.backward()
        assert float(loss.value.detach()) == (-2 if hinge is None else 3) and reward.grad is not None and reward.grad.tolist() == [-0.5, 0, -0.5, 0]
        assert float(loss.stats["reward_gradient/reward"]) == 2 and float(loss.stats["reward_gradient/unknown_share"]) == 0.25
    nothing = reward_ascent(torch.full((2,), math.nan, requires_grad=True))
    assert float(nothing.value.detach()) == 0 and nothing.value.requires_grad


class Peak(TorchDispatchMode):
    """The largest number of bytes that tensors made inside it hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class Wide(nn.Module):
    """A network whose inside is 64 times as large as its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv3d(1, 64, 1), nn.SiLU(), nn.Conv3d(64, 64, 1), nn.SiLU(), nn.Conv3d(64, 1, 1))


class WideModel(GaussianModel):
    def __init__(self) -> None:
        super().__init__(GaussianWorld())
        self.network: Any = Wide()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        return self.network.inside(x_t)


def saved(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def test_checkpointing_keeps_the_states_instead_of_the_insides_and_the_gradient_is_the_same() -> None:
    gc.collect()
    model, cond = WideModel(), conditions(2)
    x, times = torch.randn(2, 1, 4, 8, 8), torch.linspace(1, 0, 9)
    state = x.numel() * 4
    kept = {on: saved(lambda on=on: last_steps(model, x, times, cond, 8, checkpointed=on)) for on in (True, False)}  # type: ignore[misc]
    gradients = {}
    for on in (True, False):
        model.network.zero_grad()
        last_steps(model, x, times, cond, 8, checkpointed=on).square().mean().backward()
        gradients[on] = [parameter.grad.clone() for parameter in model.network.parameters()]
    print({on: value / state for on, value in kept.items()}, "states")
    assert kept[True] <= 10 * state and kept[False] > 100 * kept[True]
    assert all(torch.equal(a, b) for a, b in zip(gradients[True], gradients[False], strict=True))


def test_the_peak_of_a_whole_step_forward_and_backward_falls_with_checkpointing() -> None:
    model, cond = WideModel(), conditions(2)
    x, times = torch.randn(2, 1, 4, 8, 8), torch.linspace(1, 0, 9)
    peaks = {}
    for on in (True, False):
        gc.collect()
        with Peak() as peak:
            last_steps(model, x, times, cond, 8, checkpointed=on).square().mean().backward()
        peaks[on] = peak.peak
    print({on: value / 1e6 for on, value in peaks.items()}, "MB")
    assert peaks[True] < peaks[False] / 3


def test_it_trains_an_adapter_through_the_decoder_of_the_built_in_model_to_brighter_clips() -> None:
    model = build_tiny(DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)))
    nn.init.normal_(model.network.tokens_out.weight, std=0.02)
    model.network = add_lora(model.network, rank=4, alpha=4)
    cond = model.encode_text(["a red circle", "a blue bar"])
    optimizer = torch.optim.Adam([parameter for parameter in model.network.parameters() if parameter.requires_grad], lr=5e-2)
    x, times, rewards = torch.randn(2, 8, 1, 4, 4), torch.linspace(1, 0, 4), []
    for _ in range(8):
        reward = reward_of(brightness, model, last_steps(model, x, times, cond, 1), cond, name="brightness", differentiable=True)
        optimizer.zero_grad()
        reward_ascent(reward).value.backward()
        optimizer.step()
        rewards.append(float(reward.detach().mean()))
    print(rewards)
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.005
