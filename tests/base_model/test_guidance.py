"""Guidance against its equation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from base_model.guidance import Guided
from base_model.networks.dit import DiTConfig
from base_model.paths import Path
from base_model.tiny import LatentVideoModel, build_tiny
from base_model.types import Conditioning, Known
from tests.worlds import PATHS, GaussianModel, GaussianWorld, conditions


def small_model() -> LatentVideoModel:
    torch.manual_seed(0)
    model = build_tiny(DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)))
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: LatentVideoModel) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    cond = model.encode_text(["a red circle moves left", "a bar"])
    return torch.randn(2, model.latents.channels, 1, 2, 2), torch.tensor([0.3, 0.9]), cond


class TwoWorlds(GaussianModel):
    """Clips of a prompt are N(1.1, 0.5^2), clips of the empty prompt N(0.4, 0.5^2)."""

    def __init__(self, path: Path) -> None:
        super().__init__(GaussianWorld(path, mean=0.4))
        self.prompted = GaussianModel(GaussianWorld(path, mean=1.1))

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        asked = torch.tensor([bool(prompt) for prompt in cond.prompts]).reshape(-1, *[1] * (x_t.dim() - 1))
        return torch.where(asked, self.prompted(x_t, t, cond), super().__call__(x_t, t, cond))


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.5])
def test_guidance_in_two_gaussian_worlds_is_the_exact_velocity_of_a_third_one(path: Path, scale: float) -> None:
    """The density p(x|c)^w p(x)^(1-w) of two Gaussians of one width is a Gaussian of that width around (1-w) m + w m_c."""
    model, third = TwoWorlds(path), GaussianModel(GaussianWorld(path, mean=0.4 + scale * 0.7))
    x = torch.randn(3, 1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.5, 0.9):
        t, cond = torch.full((3,), share * path.t_max, dtype=torch.float64), replace(conditions(3), prompts=("a red circle",) * 3)
        torch.testing.assert_close(Guided(model, scale)(x, t, cond), third(x, t, cond), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), (3.0, 2)])
def test_a_scale_of_one_is_the_model_itself_and_costs_no_second_pass(scale: float, passes: int) -> None:
    model, calls = small_model(), []
    x, t, cond = inputs(model)
    before = model(x, t, cond)
    model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    after = Guided(model, scale)(x, t, cond)
    assert len(calls) == passes
    assert torch.equal(after, before) == (scale == 1.0)


def test_the_pass_without_prompt_is_trained_or_not_and_its_prompt_encoded_once() -> None:
    model = small_model()
    x, t, cond = inputs(model)
    asked: list[list[str]] = []
    encode, model.encode_text = model.encode_text, lambda prompts: (asked.append(list(prompts)), encode(prompts))[1]  # type: ignore[method-assign]
    both, one = Guided(model, 3.0), Guided(model, 3.0, train_empty=False)
    values, gradients = [], []
    for guided in (both, one):
        u = guided(x, t, cond)
        guided(x, t, cond)
        values.append(u.detach())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(u.square().mean(), list(model.network.parameters()), allow_unused=True) if g is not None]))
    assert torch.equal(values[0], values[1]) and asked == [[""], [""]]
    prompted = model(x, t, cond)
    empty = model(x, t, model.encode_text([""]).repeat(2)).detach()
    want = torch.autograd.grad((empty + 3.0 * (prompted - empty)).square().mean(), list(model.network.parameters()), allow_unused=True)
    torch.testing.assert_close(gradients[1], torch.cat([g.flatten() for g in want if g is not None]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.1)


@pytest.mark.parametrize(("train_empty", "passes"), [(True, 1), (False, 2)])
def test_joined_passes_are_one_of_the_same_velocity_and_gradient(train_empty: bool, passes: int) -> None:
    model, calls = small_model(), []
    x, t, cond = inputs(model)
    parameters, found = list(model.network.parameters()), []
    for joined in (False, True):
        guided = Guided(model, 3.0, train_empty=train_empty, joined=joined)
        handle = model.network.register_forward_pre_hook(lambda *_: calls.append(1))
        u = guided(x, t, cond)
        handle.remove()
        found.append((u.detach(), torch.autograd.grad(u.square().mean(), parameters, allow_unused=True)))
    assert len(calls) == 2 + passes
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, atol=1e-5 * (1 + float(two.abs().max())), rtol=1e-4)


def test_conditions_behind_each_other_keep_their_own_tokens() -> None:
    model = small_model()
    one, other = model.encode_text(["a bar"]), model.encode_text(["a red circle moves left", ""])
    both = one.followed_by(other)
    assert both.prompts == ("a bar", "a red circle moves left", "") and len(both) == 3
    for part, rows in ((one, slice(0, 1)), (other, slice(1, 3))):
        assert torch.equal(both.text[rows][both.mask[rows]], part.text[part.mask]) and torch.equal(both.mask[rows].sum(1), part.mask.sum(1))
    known = Known(torch.randn(1, 8, 1, 2, 2), torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="hold different things"):
        replace(one, known=known).followed_by(other)
    again = replace(one, known=known, pooled=torch.ones(1, 3)).followed_by(replace(one, known=known, pooled=torch.zeros(1, 3)))
    assert again.known is not None and again.pooled is not None
    assert torch.equal(again.known.values, known.values.repeat(2, 1, 1, 1, 1)) and again.known.mask.shape == (2, 1, 2, 2) and again.pooled[:, 0].tolist() == [1, 0]


def test_a_guided_model_is_a_video_model_with_the_same_parts() -> None:
    model = small_model()
    guided, video = Guided(model, 2.0), torch.rand(1, 5, 3, 8, 8)
    assert guided.path == model.path and guided.latents == model.latents and guided.network is model.network
    assert torch.equal(guided.encode(video), model.encode(video))
    assert torch.equal(guided.decode(guided.encode(video)), model.decode(model.encode(video)))
