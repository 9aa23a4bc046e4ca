"""The adapter of Wan beside diffusers' own classes, at toy size and random weights."""

from __future__ import annotations

import pytest
import torch

from base_model.errors import UserError
from base_model.families.wan import T2V_1_3B, WanVideoModel, random_transformer, random_vae
from base_model.paths import RectifiedFlow
from base_model.types import ClipShape, Conditioning

TOY = {**T2V_1_3B, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
TOY_VAE = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
CPU = torch.device("cpu")


def told(number: int) -> Conditioning:
    return Conditioning(("a",) * number, torch.randn(number, 8, 16), torch.ones(number, 8, dtype=torch.bool))


def test_the_velocity_is_the_transformers_output_at_a_thousand_t() -> None:
    network = random_transformer(TOY, device=CPU, dtype=torch.float32)
    model, cond = WanVideoModel(network), told(2)
    x, t = torch.randn(2, *model.latents.shape(ClipShape(5, 32, 48))), torch.tensor([0.25, 0.9])
    theirs = network(hidden_states=x, timestep=torch.tensor([250.0, 900.0]), encoder_hidden_states=cond.text).sample
    assert torch.equal(model(x, t, cond), theirs) and model(x, t, cond).shape == x.shape
    assert isinstance(model.path, RectifiedFlow)


def test_its_direction_is_that_of_the_schedulers_wan_is_sampled_with() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler, path = FlowMatchEulerDiscreteScheduler(shift=3.0), WanVideoModel(None).path
    scheduler.set_timesteps(4)
    x0, eps = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    t = scheduler.timesteps[1:2] / 1000
    x_t, u = (1 - t) * x0 + t * eps, path.velocity(x0, eps, t)
    s = scheduler.timesteps[2] / 1000
    assert torch.allclose(scheduler.step(u, scheduler.timesteps[1], x_t).prev_sample, (1 - s) * x0 + s * eps, atol=1e-5)


def test_weights_are_made_in_their_precision_and_velocities_are_float32() -> None:
    network = random_transformer(TOY, device=CPU, dtype=torch.bfloat16)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16} and torch.get_default_dtype() is torch.float32
    assert WanVideoModel(network)(torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), told(1)).dtype is torch.float32


def test_clips_go_through_the_vae_and_come_back_in_range() -> None:
    model = WanVideoModel(None, random_vae(TOY_VAE, device=CPU, dtype=torch.float32))
    with torch.no_grad():
        x0 = model.encode(torch.rand(2, 5, 3, 16, 16))
        video = model.decode(x0)
    assert x0.shape == (2, *model.latents.shape(ClipShape(5, 16, 16))) and video.shape == (2, 5, 3, 16, 16)
    assert float(video.min()) >= 0 and float(video.max()) <= 1


def test_what_a_model_was_built_without_is_said() -> None:
    with pytest.raises(UserError, match="text encoder"):
        WanVideoModel(None).encode_text(["a"])
    with pytest.raises(UserError, match="VAE"):
        WanVideoModel(None).decode(torch.zeros(1, 16, 1, 4, 4))
