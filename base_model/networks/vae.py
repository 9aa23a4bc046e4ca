"""A small causal video autoencoder: four frames and 4x4 pixels become one latent position; the first frame stands alone.

Everything after the patch embedding runs on the latent grid, so decoding costs about two passes of the denoiser. Normalisation is over channels and
temporal convolutions look backwards only, so no latent ever sees a later frame (GroupNorm over time would leak the future).
Letters: B clips, T frames, C F H W latent channels/frames/height/width, w width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from base_model.networks.packing import patchify, token_grid, unpatchify
from base_model.types import LatentSpec


@dataclass(frozen=True)
class VAEConfig:
    channels: int = 8
    width: int = 128
    encoder_depth: int = 2
    decoder_depth: int = 4
    time_stride: int = 4
    space_stride: int = 4

    @property
    def latents(self) -> LatentSpec:
        return LatentSpec(self.channels, self.time_stride, self.space_stride)

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.time_stride, self.space_stride, self.space_stride


class ChannelNorm(nn.Module):
    """RMS over the channels of [B,w,F,H,W] (Zhang & Sennrich 2019, eq. 4): a position never sees another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.scale


class CausalBlock(nn.Module):
    """Residual: 3x3 in space, then three latent frames back in time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_space = ChannelNorm(width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.norm_time = ChannelNorm(width)
        self.time = nn.Conv3d(width, width, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.space(silu(self.norm_space(x)))  # [B,w,F,H,W]
        h = pad(silu(self.norm_time(h)), (0, 0, 0, 0, 2, 0))  # [B,w,F+2,H,W]
        return x + self.time(h)


class VideoVAE(nn.Module):
    """encode [B,T,3,H,W] in [0,1] -> (mean, log variance) [B,C,F,H,W]; decode back, differentiable."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * math.prod(config.patch)
        self.encoder = nn.Sequential(nn.Conv3d(pixels, config.width, 1), *(CausalBlock(config.width) for _ in range(config.encoder_depth)))
        self.to_latents = nn.Conv3d(config.width, 2 * config.channels, 1)
        self.decoder = nn.Sequential(nn.Conv3d(config.channels, config.width, (1, 3, 3), padding=(0, 1, 1)), *(CausalBlock(config.width) for _ in range(config.decoder_depth)))
        self.to_pixels = nn.Sequential(ChannelNorm(config.width), nn.SiLU(), nn.Conv3d(config.width, pixels, 1))

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError where the clip does not fall on the latent grid."""
        patch, lead = self.config.patch, self.config.time_stride - 1
        x = video.transpose(1, 2) * 2 - 1  # [B,3,T,H,W]
        x = torch.cat([x[:, :, :1].expand(-1, -1, lead, -1, -1), x], dim=2)  # [B,3,T+lead,H,W]
        grid = token_grid(x.shape, patch)
        x = patchify(x, patch).transpose(1, 2).unflatten(2, grid)  # [B,pixels,F,H,W]
        mean, log_variance = self.to_latents(self.encoder(x)).chunk(2, dim=1)  # [B,C,F,H,W] each
        return mean, log_variance.clamp(-12, 4)

    def decode(self, latents: Tensor) -> Tensor:
        x = self.to_pixels(self.decoder(latents))  # [B,pixels,F,H,W]
        x = unpatchify(x.flatten(2).transpose(1, 2), 3, token_grid(x.shape, (1, 1, 1)), self.config.patch)  # [B,3,T+lead,H,W]
        video = x[:, :, self.config.time_stride - 1 :].transpose(1, 2)  # [B,T,3,H,W]
        return (video + 1) / 2
