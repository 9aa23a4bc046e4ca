"""Whole Wan pipelines of real classes at toy size and random weights, float32 and in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch

from base_model.families.wan_random import TOY_TRANSFORMER, TOY_VAE, toy_text_encoder, toy_tokenizer

tokenizer, text_encoder, TRANSFORMER, VAE = toy_tokenizer, toy_text_encoder, TOY_TRANSFORMER, TOY_VAE


def transformer(**changes: Any) -> Any:
    """Its last layer is three times as large as at birth, so that what the network says is seen in what is sampled."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(**{**TRANSFORMER, **changes}).eval()
    with torch.no_grad():
        network.proj_out.weight.mul_(3)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return network


def euler(shift: float = 3.0) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unipc(shift: float = 3.0) -> Any:
    """What Wan's checkpoints come with."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**{**VAE, **changes}).eval()


def text_to_video() -> Any:
    from diffusers import WanPipeline

    torch.manual_seed(0)
    return quiet(WanPipeline(tokenizer(), text_encoder(), vae(), euler(), transformer()))


def a14b() -> Any:
    """Two experts."""
    from diffusers import WanPipeline

    torch.manual_seed(0)
    return quiet(WanPipeline(tokenizer(), text_encoder(), vae(), euler(), transformer(), transformer(), boundary_ratio=0.875))


def image_to_video() -> Any:
    """2.1: with an image encoder."""
    from diffusers import WanImageToVideoPipeline

    torch.manual_seed(0)
    network = transformer(in_channels=36, image_dim=16, added_kv_proj_dim=64)
    return quiet(WanImageToVideoPipeline(tokenizer(), text_encoder(), vae(), euler(), *eye(), network))


def image_a14b() -> Any:
    """2.2: two experts, no image encoder."""
    from diffusers import WanImageToVideoPipeline

    torch.manual_seed(0)
    experts = transformer(in_channels=36), transformer(in_channels=36)
    return quiet(WanImageToVideoPipeline(tokenizer(), text_encoder(), vae(), euler(), None, None, *experts, boundary_ratio=0.9))


def eye() -> tuple[Any, Any]:
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    config = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, projection_dim=8)
    return processor, CLIPVisionModel(config).eval()


def ti2v(*, image: bool) -> Any:
    """2.2 5B: 48 latent channels of 16x16 pixels, one time a token; its pipeline for text alone or with an image."""
    from diffusers import WanImageToVideoPipeline, WanPipeline

    torch.manual_seed(0)
    patches = vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[k / 100 for k in range(48)],
        latents_std=[1 + k / 100 for k in range(48)],
    )
    parts = {"tokenizer": tokenizer(), "text_encoder": text_encoder(), "vae": patches, "scheduler": euler(5.0), "transformer": transformer(in_channels=48, out_channels=48)}
    return quiet((WanImageToVideoPipeline if image else WanPipeline)(**parts, expand_timesteps=True))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
