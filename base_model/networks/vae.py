"""A small causal video autoencoder: four frames and 4x4 pixels become one latent position; the first frame stands alone.

Everything after the patch embedding runs on the latent grid, so decoding costs about two passes of the denoiser. Normalisation is over channels and
temporal convolutions look backwards only, so no latent ever sees a later frame (GroupNorm over time would leak the future).

For the same reason a long or large clip may be worked on in parts: in time with the two frames that each temporal convolution looks back on carried along, in space in
tiles with as many cells around them as the 3x3 convolutions reach. Nothing is blended: the parts are the whole, to rounding.
Letters: B clips, T frames, C F H W latent channels/frames/height/width, w width, P values of a patch of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from base_model.networks.packing import Patch, patchify, token_grid, unpatchify
from base_model.types import LatentSpec


@dataclass(frozen=True)
class VAEConfig:
    """The architecture of a video autoencoder: latent channels, width, blocks of either side, pixels and frames a latent."""

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
    def patch(self) -> Patch:
        return self.time_stride, self.space_stride, self.space_stride


class ChannelNorm(nn.Module):
    """RMS over the channels of [B,w,F,H,W] (Zhang & Sennrich 2019, eq. 4): a position never sees another one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * self.scale


Past = tuple[Tensor, ...]
"""What a stack of blocks remembers of the frames before: for each block the last two, as its temporal convolution saw them, [B,w,2,H,W]; () at the start of a clip."""
Step = Callable[[Tensor, Past], tuple[Tensor, Past]]


class CausalBlock(nn.Module):
    """Residual: 3x3 in space, then three latent frames back in time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_space = ChannelNorm(width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1))
        self.norm_time = ChannelNorm(width)
        self.time = nn.Conv3d(width, width, (3, 1, 1))

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and what it becomes [B,w,F,H,W]; the two frames before it and its own last two [B,w,2,H,W] (None: zeros, the start of a clip)."""
        h = silu(self.norm_time(self.space(silu(self.norm_space(x)))))  # [B,w,F,H,W]
        h = pad(h, (0, 0, 0, 0, 2, 0)) if past is None else torch.cat([past, h], dim=2)  # [B,w,F+2,H,W]
        return x + self.time(h), h[:, :, -2:].clone()  # a view would keep all of h in memory


class VideoVAE(nn.Module):
    """encode [B,T,3,H,W] in [0,1] -> (mean, log variance) [B,C,F,H,W]; decode back, differentiable. The `_stream` forms take and give a clip part by part."""

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
        return _mean_and_log_variance(self._encode(to_patches(video, self.config.patch), ())[0])

    def decode(self, latents: Tensor) -> Tensor:
        return from_patches(self._decode(latents, ())[0], self.config.patch)

    def split(self, video: Tensor, frames: int) -> list[Tensor]:
        """[B,T,3,H,W] -> parts of `frames` latent frames each, the first frame alone being one of them; the last part may be shorter."""
        first, each = 1 + (frames - 1) * self.config.time_stride, frames * self.config.time_stride
        return [video[:, :first], *(video[:, first:].split(each, dim=1) if video.shape[1] > first else ())]

    def encode_stream(self, parts: Iterable[Tensor], *, tile: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of a clip [B,t,3,H,W], as `split` cuts them -> (mean, log variance) [B,C,f,H,W] of each: what `encode` gives for the whole.

        tile: side of a tile in latent cells, none meaning the whole frame. No activation is larger than those of one part and one tile with its surroundings; two latent
        frames a block are kept between the parts. Raises ValueError where a part does not fall on the latent grid.
        """
        patches = (to_patches(part, self.config.patch, first=i == 0) for i, part in enumerate(parts))
        for moments in in_parts(self._encode, patches, tile=tile, halo=self.config.encoder_depth):
            yield _mean_and_log_variance(moments)

    def decode_stream(self, parts: Iterable[Tensor], *, tile: int | None = None) -> Iterator[Tensor]:
        """Latents [B,C,f,H,W], part by part -> the frames of each part [B,t,3,H,W]: what `decode` gives for the whole. `tile` and memory as in `encode_stream`."""
        for i, patches in enumerate(in_parts(self._decode, parts, tile=tile, halo=1 + self.config.decoder_depth)):
            yield from_patches(patches, self.config.patch, first=i == 0)

    def _encode(self, patches: Tensor, past: Past) -> tuple[Tensor, Past]:
        """[B,P,F,H,W] -> mean and log variance [B,2C,F,H,W]."""
        x, past = through(self.encoder, patches, past)  # [B,w,F,H,W]
        return self.to_latents(x), past

    def _decode(self, latents: Tensor, past: Past) -> tuple[Tensor, Past]:
        """[B,C,F,H,W] -> [B,P,F,H,W]."""
        x, past = through(self.decoder, latents, past)  # [B,w,F,H,W]
        return self.to_pixels(x), past


def to_patches(video: Tensor, patch: Patch, *, first: bool = True) -> Tensor:
    """[B,T,3,H,W] in [0,1] -> [B,P,F,H,W] in [-1,1]. `first`: a clip begins here, and its first frame, repeated, fills a patch of its own.

    Raises ValueError where the clip does not fall on the grid.
    """
    x = video.transpose(1, 2) * 2 - 1  # [B,3,T,H,W]
    if first:
        x = torch.cat([x[:, :, :1].expand(-1, -1, patch[0] - 1, -1, -1), x], dim=2)  # [B,3,T+lead,H,W]
    grid = token_grid(x.shape, patch)
    return patchify(x, patch).transpose(1, 2).unflatten(2, grid)  # [B,P,F,H,W]


def from_patches(patches: Tensor, patch: Patch, *, first: bool = True) -> Tensor:
    """[B,P,F,H,W] -> [B,T,3,H,W]: the inverse of `to_patches`."""
    x = unpatchify(patches.flatten(2).transpose(1, 2), 3, token_grid(patches.shape, (1, 1, 1)), patch)  # [B,3,T+lead,H,W]
    video = x[:, :, patch[0] - 1 if first else 0 :].transpose(1, 2)  # [B,T,3,H,W]
    return (video + 1) / 2


def _mean_and_log_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[B,2C,F,H,W] -> [B,C,F,H,W] each."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, log_variance.clamp(-12, 4)


def through(stack: nn.Sequential, x: Tensor, past: Past) -> tuple[Tensor, Past]:
    """A convolution, then blocks: [B,c,F,H,W] -> ([B,w,F,H,W], what the blocks remember)."""
    first, *blocks = stack
    x, seen = first(x), []
    for i, block in enumerate(blocks):
        x, last = block(x, past[i] if past else None)
        seen.append(last)
    return x, tuple(seen)


def windows(size: int, tile: int, halo: int) -> list[tuple[slice, slice]]:
    """Cuts an axis into stretches of `tile`: (the stretch with up to `halo` cells on either side, where it lies in there)."""
    begins = [(max(0, begin - halo), begin, min(size, begin + tile)) for begin in range(0, size, tile)]
    return [(slice(first, min(size, end + halo)), slice(begin - first, end - first)) for first, begin, end in begins]


def tiled(step: Step, x: Tensor, pasts: dict[tuple[int, int], Past], *, tile: int | None, halo: int) -> Tensor:
    """Runs `step` on [B,c,F,H,W] tile by tile -> [B,d,F,H,W]. `pasts`: what each tile remembers, brought up to date; `halo`: how many cells `step` looks to either side."""
    rows, columns = (windows(size, tile or size, halo) for size in x.shape[3:])
    lines = []
    for i, (row, inner_row) in enumerate(rows):
        line = []
        for j, (column, inner_column) in enumerate(columns):
            y, pasts[i, j] = step(x[:, :, :, row, column], pasts.get((i, j), ()))
            line.append(y[:, :, :, inner_row, inner_column])  # [B,d,F,tile,tile]
        lines.append(torch.cat(line, dim=4))  # [B,d,F,tile,W]
    return torch.cat(lines, dim=3)


def in_parts(step: Step, parts: Iterable[Tensor], *, tile: int | None, halo: int) -> Iterator[Tensor]:
    """`tiled` on parts in time [B,c,f,H,W], one after the other -> [B,d,f,H,W] of each."""
    pasts: dict[tuple[int, int], Past] = {}
    for x in parts:
        yield tiled(step, x, pasts, tile=tile, halo=halo)
