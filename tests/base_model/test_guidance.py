"""Guidance against its equation."""

from __future__ import annotations

import pytest
import torch

from base_model.guidance import Guided
from base_model.networks.dit import DiTConfig
from base_model.tiny import LatentVideoModel, build_tiny
from base_model.types import Conditioning


def small_model() -> LatentVideoModel:
    torch.manual_seed(0)
    model = build_tiny(DiTConfig(width=48, depth=1, heads=2, rotary_axes=(8, 8, 8)))
    for parameter in model.network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: LatentVideoModel) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    cond = model.encode_text(["a red circle moves left", "a bar"])
    return torch.randn(2, model.latents.channels, 1, 2, 2), torch.tensor([0.3, 0.9]), cond


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guidance_is_the_line_through_the_empty_and_the_prompted_velocity(scale: float) -> None:
    model = small_model()
    x, t, cond = inputs(model)
    prompted, empty = model(x, t, cond), model(x, t, model.encode_text(["", ""]))
    assert (prompted - empty).abs().max() > 0.1
    torch.testing.assert_close(Guided(model, scale)(x, t, cond), empty + scale * (prompted - empty), atol=1e-5, rtol=1e-5)


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


def test_a_guided_model_is_a_video_model_with_the_same_parts() -> None:
    model = small_model()
    guided, video = Guided(model, 2.0), torch.rand(1, 5, 3, 8, 8)
    assert guided.path == model.path and guided.latents == model.latents and guided.network is model.network
    assert torch.equal(guided.encode(video), model.encode(video))
    assert torch.equal(guided.decode(guided.encode(video)), model.decode(model.encode(video)))
