"""Wan2.1 text to video behind `VideoModel`: diffusers' transformer and, where clips are decoded, its VAE.

Wan is trained on the rectified path and predicts eps - x0, which is our velocity as it stands; only its clock differs: it is told 1000 t. Texts are `UMT5` states,
zero behind the end of a prompt, and never masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base_model.errors import UserError
from base_model.paths import RectifiedFlow
from base_model.types import Conditioning, LatentSpec

T2V_1_3B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}
"""`WanTransformer3DModel` of Wan2.1-T2V-1.3B; what is not named is the class's own default."""
VAE_2_1: dict[str, Any] = {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}
"""`AutoencoderKLWan` of Wan2.1."""
TEXT_TOKENS = 512
Encoder = Callable[[Sequence[str]], Tensor]  # B prompts -> states [B,512,D]


@dataclass
class WanVideoModel:
    """A `VideoModel`. The network computes in the precision of its weights; velocities come back in float32."""

    network: Any  # WanTransformer3DModel, or peft's wrapper of it
    vae: Any = None  # AutoencoderKLWan
    encoder: Encoder | None = None

    @property
    def path(self) -> RectifiedFlow:
        return RectifiedFlow()

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(channels=16, time_stride=4, space_stride=8)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W], float32."""
        dtype = self.network.dtype
        u: Tensor = self.network(hidden_states=x_t.to(dtype), timestep=1000 * t.expand(len(x_t)), encoder_hidden_states=cond.text.to(dtype), return_dict=False)[0]
        return u.float()

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Raises UserError where the model was built without an encoder."""
        if self.encoder is None:
            raise UserError("this model was built without a text encoder. Give it one")
        text = self.encoder(prompts)  # [B,L,D]
        return Conditioning(tuple(prompts), text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))

    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] float32, one clip after another."""
        vae, (mean, std) = self._vae(), self._statistics(video.device)
        pixels = (2 * video - 1).transpose(1, 2).to(vae.dtype)  # [B,3,T,H,W]
        found = torch.cat([vae.encode(clip).latent_dist.mode() for clip in pixels.split(1)]).float()  # [B,C,F,H,W]
        return (found - mean) / std

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1], float32, one clip after another: activations of the decoder are large."""
        vae, (mean, std) = self._vae(), self._statistics(x0.device)
        latents = (x0.float() * std + mean).to(vae.dtype)
        video = torch.cat([vae.decode(clip, return_dict=False)[0] for clip in latents.split(1)]).float()  # [B,3,T,H,W] in [-1,1]
        return ((video + 1) / 2).clamp(0, 1).transpose(1, 2)

    def _vae(self) -> Any:
        if self.vae is None:
            raise UserError("this model was built without a VAE: it makes latents, no pixels. Give it one")
        return self.vae

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, [C,1,1,1]."""
        config = self._vae().config
        mean, std = (torch.tensor(values, device=device)[:, None, None, None] for values in (config.latents_mean, config.latents_std))
        return mean, std


def random_transformer(config: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen `WanTransformer3DModel` with fresh weights, made on the device in its precision."""
    from diffusers import WanTransformer3DModel

    return _made(WanTransformer3DModel, config, device, dtype)


def random_vae(config: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen `AutoencoderKLWan` with fresh weights, made on the device in its precision."""
    from diffusers import AutoencoderKLWan

    return _made(AutoencoderKLWan, config, device, dtype)


def _made(kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            made: nn.Module = kind(**config)
    finally:
        torch.set_default_dtype(before)
    return made.requires_grad_(False).eval()
