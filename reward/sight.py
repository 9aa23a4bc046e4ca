"""What the small reward model sees of a clip, told from its latents: nothing is decoded, and its matcher still asks its own questions of every place.

    x_t, t -> the codec's first convolutions -> cells [B,w,F,H,W] -> pixel features [B,T,c,h,w] -> the matcher, frozen -> agreement in shape, in motion, presence [B,3]
                                                       `--> mean, deviation, change, peak [B,4w] -> intact and signals [B,23]

How well a clip fits a prompt is thus never learned by prompt: it holds for prompts that nobody asked for. The reward model looks at the clip's mirror image, too, and its
inputs are means of both; the learned part makes up for that.

Letters: B clips, C F H W of latents, w width of the codec, T frames, c h w of the matcher's pixel features, L D text tokens and their width.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base_model.networks.layers import time_features
from base_model.networks.packing import unpatchify
from base_model.networks.vae import ChannelNorm
from base_model.tiny import LatentCodec
from base_model.types import Conditioning
from reward.matcher import PARTS, Matcher
from reward.model import INPUTS, bent_match

HIDDEN = 128
MATCHER_STRIDE = 2
"""Pixels from one of the matcher's features to the next."""


class Stem(nn.Module):
    """What of it learns: it begins as the first `depth` blocks of the codec's decoder, for these know where in a latent the detail is."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, codec: LatentCodec, depth: int, channels: int) -> None:
        super().__init__()
        config, decoder = codec.vae.config, codec.vae.decoder
        if not 1 <= depth < len(decoder) or config.space_stride % MATCHER_STRIDE:
            raise ValueError(f"sight is of 1 to {len(decoder) - 1} blocks of a codec of even stride, got {depth} and a stride of {config.space_stride}")
        w, side = config.width, config.space_stride // MATCHER_STRIDE
        self.channels, self.patch = channels, (config.time_stride, side, side)
        self.register_buffer("latent_mean", codec.normaliser.mean.clone())
        self.register_buffer("latent_std", codec.normaliser.std.clone())
        self.first, *blocks = copy.deepcopy(list(decoder)[: 1 + depth])
        self.blocks = nn.ModuleList(blocks)
        self.time_in = nn.Linear(w, w)
        self.to_features = nn.Sequential(ChannelNorm(w), nn.SiLU(), nn.Conv3d(w, channels * config.time_stride * side * side, 1), nn.SiLU())
        self.to_signals = nn.Sequential(nn.LayerNorm(4 * w), nn.Linear(4 * w, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, len(INPUTS) - len(PARTS)))
        self.requires_grad_(True)
        nn.init.zeros_(self.time_in.weight)
        nn.init.zeros_(self.time_in.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t [B,C,F,H,W], t [B] -> pixel features [B,T,c,h,w] and what is read off all cells together [B,23]."""
        x = self.first(x_t * self.latent_std + self.latent_mean)  # [B,w,F,H,W]
        x = x + self.time_in(time_features(t, x.shape[1]))[:, :, None, None, None]
        for block in self.blocks:
            x, _ = block(x)
        tokens = self.to_features(x).flatten(2).transpose(1, 2)  # [B,n,c p]
        features = unpatchify(tokens, self.channels, (x.shape[2], x.shape[3], x.shape[4]), self.patch).transpose(1, 2)  # [B,T + lead,c,h,w]
        cells = F.silu(x)
        change = cells.diff(dim=2).abs() if cells.shape[2] > 1 else torch.zeros_like(cells)
        each = [cells.mean((2, 3, 4)), cells.var((2, 3, 4), correction=0).add(1e-6).sqrt(), change.mean((2, 3, 4)), cells.amax((2, 3, 4))]  # [B,w] each
        return features[:, self.patch[0] - 1 :], self.to_signals(torch.cat(each, dim=1))


class Sight(nn.Module):
    """(x_t [B,C,F,H,W], t [B], conditions of B clips) -> the matcher's pixel features [B,T,c,h,w] and the reward model's inputs as its head sees them [B,26]."""

    match_mean: Tensor
    match_std: Tensor

    def __init__(self, codec: LatentCodec, depth: int, matcher: Matcher) -> None:
        super().__init__()
        self.stem = Stem(codec, depth, matcher.size.pixels)
        self.matcher = copy.deepcopy(matcher).requires_grad_(False)
        self.register_buffer("match_mean", torch.zeros(len(PARTS)))  # of the reward model's training clips
        self.register_buffer("match_std", torch.ones(len(PARTS)))

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        features, signals = self.stem(x_t, t)
        match = (self.matcher.parts_of(features, cond.text, cond.mask) - self.match_mean) / self.match_std  # [B,3]
        return features, torch.cat([bent_match(match), signals], dim=1)
