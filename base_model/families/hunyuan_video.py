"""HunyuanVideo text to video behind `VideoModel`: diffusers' transformer, its VAE, a Llama that reads a template around the prompt, and CLIP for one pooled vector.

Trained on the rectified path and predicts eps - x0, which is our velocity as it stands; it is told 1000 t. The published weights are distilled: the guidance scale is an input,
and a step takes one pass. Weights without that input (`guidance_embeds` false) take `Guided(model, scale)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.families.parts import decode_clips, encode_clips, load_part, load_plain
from base_model.paths import RectifiedFlow
from base_model.types import ClipShape, Conditioning, LatentSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MLP_TARGETS = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
"""`proj_out` ends the blocks of one stream, where it is the output of their attention too, and is the last linear of the network."""
TEXT_TOKENS = 256  # behind the template's own
POOLED_TOKENS = 77
LAYERS_SKIPPED = 2  # of the Llama's, from its end


@dataclass
class HunyuanVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32."""

    network: Any  # HunyuanVideoTransformer3DModel, or peft's wrapper of it
    vae: Any  # AutoencoderKLHunyuanVideo
    text_encoder: Any  # LlamaModel
    tokenizer: Any  # of the Llama
    pooled_encoder: Any  # CLIPTextModel
    pooled_tokenizer: Any  # CLIPTokenizer
    scheduler: Any  # FlowMatchEulerDiscreteScheduler: its grid, never its step
    guidance: float = 6.0  # the scale a distilled network is told; others do not hear it, and no recipe sets it

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        vae = self.vae.config
        return LatentSpec(vae.latent_channels, vae.temporal_compression_ratio, vae.spatial_compression_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.network.config.patch_size_t, self.network.config.patch_size, self.network.config.patch_size

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> HunyuanVideoModel:
        """Moves the networks. -> this model"""
        for part in (self.network, self.vae, self.text_encoder, self.pooled_encoder):
            part.to(device)
        return self

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The pipeline's grid, [K+1]: uniform, then shifted by the scheduler's shift, the same for every clip. Raises ValueError where steps is not positive."""
        if steps < 1:
            raise ValueError(f"steps must be positive, got {steps}")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist())
        sigmas: Tensor = scheduler.sigmas  # [K+1] with a 0 at the end
        return sigmas

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32. Raises UserError for sizes of half a patch, and for conditions without `pooled`."""
        dtype, config, (height, width) = self.network.dtype, self.network.config, x_t.shape[-2:]
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"latents of {height}x{width} do not fall into patches of {config.patch_size}: choose another height and width")
        if cond.pooled is None:
            raise UserError("HunyuanVideo is told a pooled vector beside its text: make conditions with its own encode_text")
        guidance = 1000 * torch.full((len(x_t),), self.guidance, dtype=dtype, device=x_t.device)  # [B] rounded before it is multiplied, as in the pipeline
        u: Tensor = self.network(
            hidden_states=x_t.to(dtype),
            timestep=1000 * t.expand(len(x_t)),
            encoder_hidden_states=cond.text.to(dtype),
            encoder_attention_mask=cond.mask,
            pooled_projections=cond.pooled.to(dtype),
            guidance=guidance if config.guidance_embeds else None,
            return_dict=False,
        )[0]
        return u.float()

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The Llama reads the prompt in diffusers' template, which asks for a description of a video; the states of the template in front of the prompt are dropped."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        before, device = int(DEFAULT_PROMPT_TEMPLATE["crop_start"]), self.text_encoder.device
        told = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]
        tokens = self.tokenizer(told, max_length=TEXT_TOKENS + before, padding="max_length", padding_side="right", truncation=True, return_tensors="pt").to(device)  # [B,before+L]
        states = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True).hidden_states[-LAYERS_SKIPPED - 1]
        words = self.pooled_tokenizer(list(prompts), max_length=POOLED_TOKENS, padding="max_length", truncation=True, return_tensors="pt").input_ids  # [B,77]
        pooled = self.pooled_encoder(words.to(self.pooled_encoder.device)).pooler_output  # [B,P]
        return Conditioning(tuple(prompts), states[:, before:], tokens.attention_mask[:, before:].bool(), pooled).to(self.device)

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another."""
        return self.vae.config.scaling_factor * encode_clips(self.vae, video)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large."""
        return decode_clips(self.vae, x0.float() / self.vae.config.scaling_factor)


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> HunyuanVideoModel:
    """The model that diffusers saved in the folder `source`, or under that name on the hub. Raises UserError where it is none, or not one of text to video."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextModel, CLIPTokenizer, LlamaModel, PreTrainedTokenizerFast

    network = load_part(HunyuanVideoTransformer3DModel, source, "transformer", device=device, dtype=dtype)
    vae = load_part(AutoencoderKLHunyuanVideo, source, "vae", device=device, dtype=dtype)
    if network.config.image_condition_type is not None or network.config.in_channels != vae.config.latent_channels:
        raise UserError(f"{source} is conditioned on an image: a model of images to video. Give one of text to video")
    return HunyuanVideoModel(
        network,
        vae,
        text_encoder=load_part(LlamaModel, source, "text_encoder", device=device, dtype=dtype),
        tokenizer=load_plain(PreTrainedTokenizerFast, source, "tokenizer"),  # LlamaTokenizer would split Llama 3's words as Llama 2's
        pooled_encoder=load_part(CLIPTextModel, source, "text_encoder_2", device=device, dtype=dtype),
        pooled_tokenizer=load_plain(CLIPTokenizer, source, "tokenizer_2"),
        scheduler=load_plain(FlowMatchEulerDiscreteScheduler, source, "scheduler"),
    )
