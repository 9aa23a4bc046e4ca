"""The video autoencoder: causal, any size, and the shipped one keeps what the judge reads."""

import pytest
import torch

from base_model.networks.vae import VAEConfig, VideoVAE
from base_model.tiny import WEIGHTS, load_codec
from base_model.types import ClipShape
from recipes.shapes.judge import judge
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import render, sample_scene


def small_vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(VAEConfig(channels=4, width=16, encoder_depth=2, decoder_depth=1)).eval()


@torch.no_grad()
def test_a_later_frame_never_changes_an_earlier_latent() -> None:
    vae, video = small_vae(), torch.rand(1, 13, 3, 16, 16)
    before, _ = vae.encode(video)
    for frame in (1, 5, 9, 12):
        changed = video.clone()
        changed[:, frame:] = 1 - changed[:, frame:]
        after, _ = vae.encode(changed)
        untouched = 1 + (frame - 1) // 4
        assert torch.equal(after[:, :, :untouched], before[:, :, :untouched])
        assert (after[:, :, untouched:] - before[:, :, untouched:]).abs().max() > 1e-3


@torch.no_grad()
def test_the_first_frame_alone_gives_the_first_latent_and_decoding_is_causal_too() -> None:
    vae, video = small_vae(), torch.rand(2, 9, 3, 16, 24)
    latents, _ = vae.encode(video)
    assert torch.allclose(vae.encode(video[:, :1])[0], latents[:, :, :1], atol=1e-6)
    assert torch.allclose(vae.decode(latents[:, :, :2]), vae.decode(latents)[:, :5], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 24, 48), (25, 32, 32)])
def test_sizes_and_lengths_come_back_as_they_went_in(shape: tuple[int, int, int]) -> None:
    vae = small_vae()
    clip = ClipShape(*shape)
    latents, log_variance = vae.encode(torch.rand(1, shape[0], 3, shape[1], shape[2]))
    assert latents.shape[1:] == vae.config.latents.shape(clip) == log_variance.shape[1:]
    assert vae.decode(latents).shape == (1, shape[0], 3, shape[1], shape[2])


def test_a_clip_off_the_grid_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match="12x32x32"):
        VAEConfig().latents.shape(ClipShape(12, 32, 32))


@torch.no_grad()
def test_the_shipped_latents_have_unit_variance_and_the_judge_reads_a_round_trip_as_before() -> None:
    import numpy as np

    codec = load_codec(WEIGHTS / "vae.safetensors")
    prompts = make_prompts(160, seed=5, split="train")
    clip = ClipShape(13, 32, 32)
    video = torch.stack([render(sample_scene(p, np.random.default_rng(i), clip=clip), clip) for i, p in enumerate(prompts)])
    latents = codec.encode(video)
    assert latents.mean().abs() < 0.15
    assert 0.8 < latents.std() < 1.25
    judgements = judge(codec.decode(latents), prompts)
    for attribute in ("shape_right", "colour_right", "motion_right"):
        share = sum(all(getattr(j, attribute)) for j in judgements) / len(judgements)
        assert share >= 0.97, f"{attribute} {share:.3f}"
