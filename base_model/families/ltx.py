"""LTX-Video, text to video, behind `VideoModel`: diffusers' transformer and VAE, and T5.

LTX is trained on the rectified path and predicts eps - x0 at 1000 t, which is our velocity as it stands. It takes latents as tokens [B,S,C] and is told their grid beside them,
in seconds and pixels: its rotary positions depend on the frame rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.families.parts import decode_clips, encode_clips, load_part, load_plain
from base_model.paths import RectifiedFlow
from base_model.types import ClipShape, Conditioning, LatentSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""The linears of self-attention and of attention to the text."""
MLP_TARGETS = ("ff.net.0.proj", "ff.net.2")
TEXT_TOKENS = 128


@dataclass
class LTXVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32."""

    network: Any  # LTXVideoTransformer3DModel, or peft's wrapper of it
    vae: Any  # AutoencoderKLLTXVideo
    text_encoder: Any  # T5EncoderModel
    tokenizer: Any  # T5TokenizerFast
    scheduler: Any  # FlowMatchEulerDiscreteScheduler; only its configuration is read
    fps: float = 25.0  # frames a second of the clips; recipes set it to those of theirs
    decode_time: float = 0.0  # t in [0, 1] that a decoder which asks for one is told (LTX-Video 0.9.1 and later; their authors take 0.05); no recipe sets it
    decode_noise: float = 0.0  # sigma of the noise such a decoder finds in the latents (0.025); nor this

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.network.config["in_channels"], self.vae.temporal_compression_ratio, self.vae.spatial_compression_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, 1, 1

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> LTXVideoModel:
        for part in (self.network, self.vae, self.text_encoder):
            part.to(device)
        return self

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32."""
        dtype, spec, (frames, height, width) = self.network.dtype, self.latents, x_t.shape[2:]
        u: Tensor = self.network(
            hidden_states=x_t.flatten(2).transpose(1, 2).to(dtype),  # [B,S,C]
            encoder_hidden_states=cond.text.to(dtype),
            encoder_attention_mask=cond.mask,
            timestep=1000 * t.expand(len(x_t)),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(spec.time_stride / self.fps, spec.space_stride, spec.space_stride),
            return_dict=False,
        )[0]
        return u.float().transpose(1, 2).unflatten(2, (frames, height, width))  # [B,C,F,H,W]

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The grid of the pipeline, [K+1] from 1 to 0: uniform, then shifted by e^mu, mu linear in the number of tokens, then stretched to end where the checkpoint says.

        Raises ValueError where the clip does not fall on the latent grid, or where there are too few steps.
        """
        _, frames, height, width = self.latents.shape(clip)
        scheduler, config = deepcopy(self.scheduler), self.scheduler.config
        if steps < (least := 2 if config.shift_terminal else 1):
            raise ValueError(f"this model is sampled in at least {least} steps, got {steps}")
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (frames * height * width - config.base_image_seq_len)
        scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=mu)
        sigmas: Tensor = scheduler.sigmas  # [K+1]
        return sigmas

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """T5 states of 128 tokens a prompt. T5 sees the padding, as in LTX's training; the transformer does not."""
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        text = self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]  # [B,L,D]
        return Conditioning(tuple(prompts), text.to(self.device), tokens.attention_mask.bool().to(self.device))

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another."""
        mean, std = self._statistics()
        return (encode_clips(self.vae, video) - mean) / std

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another. A decoder that draws noise draws the same for every clip."""
        mean, std = self._statistics()
        return decode_clips(self.vae, x0.float() * std + mean, self._decode_clip)

    def _decode_clip(self, latents: Tensor) -> Tensor:
        """[1,C,F,H,W] as the VAE made them -> [1,3,T,H,W] in [-1,1]. The decoder draws from the global generator, which is put back."""
        generator = torch.cuda.default_generators[latents.device.index] if latents.is_cuda else torch.default_generator
        with torch.random.fork_rng([latents.device] if latents.is_cuda else []):
            generator.manual_seed(0)
            time = None
            if self.vae.config.timestep_conditioning:
                latents = (1 - self.decode_noise) * latents + self.decode_noise * torch.randn_like(latents)
                time = latents.new_full((1,), self.decode_time)
            video: Tensor = self.vae.decode(latents, time, return_dict=False)[0]
        return video

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the VAE's latents, [C,1,1,1]."""
        mean, std = (values.float()[:, None, None, None] for values in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> LTXVideoModel:
    """A checkpoint of LTX-Video in diffusers' layout. Raises UserError where a part is missing or of another family."""
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
    from transformers import T5EncoderModel, T5TokenizerFast

    network = load_part(LTXVideoTransformer3DModel, source, "transformer", device=device, dtype=dtype)
    if (network.config.patch_size, network.config.patch_size_t) != (1, 1):
        raise UserError(f"transformer/ of {source} joins latents to patches, which no LTX-Video does and is not known here. Use a checkpoint of patch size 1")
    return LTXVideoModel(
        network,
        vae=load_part(AutoencoderKLLTXVideo, source, "vae", device=device, dtype=dtype),
        text_encoder=load_part(T5EncoderModel, source, "text_encoder", device=device, dtype=dtype),
        tokenizer=load_plain(T5TokenizerFast, source, "tokenizer"),
        scheduler=load_plain(FlowMatchEulerDiscreteScheduler, source, "scheduler"),
    )
