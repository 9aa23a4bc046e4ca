"""CogVideoX text to video (2B, 5B and 1.5) behind `VideoModel`: diffusers' transformer, its VAE and its T5.

Trained on a variance-preserving path of 1000 steps. It predicts v, which is our velocity once time is the angle t = atan(sigma / alpha); it is told the training step
whose angle is nearest to t. Frames stand before channels, and texts are 226 T5 states without a mask: it attends to the padding, as it did in training. 1.5 has patches
of two latent frames: they are one position of twice the channels here, and in the first position the earlier one is a copy that is dropped when clips are decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.families.parts import decode_clips, encode_clips, load_part, load_plain
from base_model.paths import VariancePreserving
from base_model.types import ClipShape, Conditioning, LatentSpec

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
MLP_TARGETS = ("ff.net.0.proj", "ff.net.2")


@dataclass
class CogVideoXVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32."""

    network: Any  # CogVideoXTransformer3DModel, or peft's wrapper of it
    vae: Any  # AutoencoderKLCogVideoX
    text_encoder: Any  # T5EncoderModel
    tokenizer: Any  # T5Tokenizer
    scheduler: Any  # CogVideoXDDIMScheduler: its noise levels and its spacing, never its step

    @property
    def path(self) -> VariancePreserving:
        return VariancePreserving()

    @property
    def latents(self) -> LatentSpec:
        vae = self.vae.config
        return LatentSpec(vae.latent_channels * self.joined, int(vae.temporal_compression_ratio) * self.joined, 2 ** (len(vae.block_out_channels) - 1))

    @property
    def joined(self) -> int:
        """Latent frames in one position: 2 for CogVideoX 1.5, else 1."""
        return self.network.config.patch_size_t or 1

    @property
    def angles(self) -> Tensor:
        """The time t of every training step, [1000] float32; increasing, and pi/2 at the last where the terminal signal-to-noise ratio is zero."""
        kept = self.scheduler.alphas_cumprod.double()  # [1000] alpha^2
        return torch.atan2((1 - kept).sqrt(), kept.sqrt()).float()

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, self.network.config.patch_size, self.network.config.patch_size

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return LORA_TARGETS

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        return MLP_TARGETS

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device) -> CogVideoXVideoModel:
        """Moves the networks. -> this model"""
        for part in (self.network, self.vae, self.text_encoder):
            part.to(device)
        return self

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The grid of diffusers' DDIM sampler in our time, [K+1], the same for every clip. Raises ValueError where there are not as many training steps.

        Where `steps` does not divide the training steps, diffusers' own sampler takes noise away up to one training step beside its grid; this one stays on it.
        """
        if not 1 <= steps <= len(self.angles):
            raise ValueError(f"steps must be between 1 and {len(self.angles)}, got {steps}")
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps)
        return torch.cat([self.angles[scheduler.timesteps], torch.zeros(1)])  # [K+1]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32. Raises UserError for a size the network has no positions for."""
        dtype = self.network.dtype
        frames = _split(x_t.to(dtype), self.joined)  # [B,F,C,H,W]
        step = (self.angles.to(t.device) - t.expand(len(x_t))[:, None]).abs().argmin(1)  # [B]
        v: Tensor = self.network(
            hidden_states=frames,
            encoder_hidden_states=cond.text.to(dtype),
            timestep=step,
            image_rotary_emb=self._rotary(frames),
            return_dict=False,
        )[0]
        return _join(v.float(), self.joined)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Every one of the 226 states counts, those of the padding too: the mask is True throughout."""
        length = self.network.config.max_text_seq_length
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids  # [B,L]
        text = self.text_encoder(tokens.to(self.text_encoder.device))[0].to(self.device)  # [B,L,D]
        return Conditioning(tuple(prompts), text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another. 1.5: the first latent frame is repeated in front, as in its training."""
        found = encode_clips(self.vae, video).transpose(1, 2)  # [B,F,C,H,W]
        frames = torch.cat([found[:, :1].repeat(1, self.joined - 1, 1, 1, 1), found], dim=1)
        return self.vae.config.scaling_factor * _join(frames, self.joined)

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large."""
        frames = _split(x0.float(), self.joined)[:, self.joined - 1 :]  # [B,F,C,H,W]
        return decode_clips(self.vae, frames.transpose(1, 2) / self.vae.config.scaling_factor)

    def _rotary(self, frames: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of every patch's position in clips [B,F,C,H,W], [N,D] each; None for 2B, which has sine positions of its own."""
        config, (height, width) = self.network.config, frames.shape[-2:]
        if height % config.patch_size or width % config.patch_size:
            raise UserError(f"latents of {height}x{width} do not fall into patches of {config.patch_size}: choose another height and width")
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        grid = height // config.patch_size, width // config.patch_size
        base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        num_frames, head = frames.shape[1] // self.joined, config.attention_head_dim
        if config.patch_size_t is None:  # positions are stretched to the size of training
            region = get_resize_crop_region_for_grid(grid, base[1], base[0])
            return get_3d_rotary_pos_embed(head, region, grid, num_frames, device=frames.device)
        if grid[0] > base[0] or grid[1] > base[1]:
            raise UserError(f"latents of {height}x{width} are larger than the {config.sample_height}x{config.sample_width} this model has positions for: choose a smaller size")
        return get_3d_rotary_pos_embed(head, None, grid, num_frames, grid_type="slice", max_size=base, device=frames.device)


def _split(x: Tensor, joined: int) -> Tensor:
    """Positions [B,C,F,H,W] -> latent frames as the network takes them, [B,F*joined,C/joined,H,W]."""
    return x.unflatten(1, (joined, -1)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)


def _join(frames: Tensor, joined: int) -> Tensor:
    """The inverse of `_split`."""
    return frames.unflatten(1, (-1, joined)).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def load(source: str, *, device: torch.device, dtype: torch.dtype) -> CogVideoXVideoModel:
    """The model that diffusers saved in the folder `source`, or under that name on the hub. Raises UserError where it is none, or not one of text to video."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5EncoderModel, T5Tokenizer

    network = load_part(CogVideoXTransformer3DModel, source, "transformer", device=device, dtype=dtype)
    vae = load_part(AutoencoderKLCogVideoX, source, "vae", device=device, dtype=dtype)
    if network.config.in_channels != vae.config.latent_channels:
        raise UserError(f"{source} takes {network.config.in_channels} channels a latent of {vae.config.latent_channels}: a model of images to video. Give one of text to video")
    scheduler = load_plain(CogVideoXDDIMScheduler, source, "scheduler")
    if scheduler.config.prediction_type != "v_prediction":
        raise UserError(f"{source} predicts {scheduler.config.prediction_type}: CogVideoX is read with v_prediction only. Mend scheduler/scheduler_config.json")
    text_encoder = load_part(T5EncoderModel, source, "text_encoder", device=device, dtype=dtype)
    return CogVideoXVideoModel(network, vae, text_encoder, load_plain(T5Tokenizer, source, "tokenizer"), scheduler)
