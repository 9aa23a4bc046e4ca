"""What the DiT and the U-ViT truly have in common: their sizes, the features of a time, and self-attention within each clip.

Letters: N tokens of all clips together, w width, h heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from base_model.networks.attention import packed_attention, rotate
from base_model.networks.packing import Patch, Segments


@dataclass(frozen=True)
class NetworkConfig:
    """The sizes of a denoiser on packed tokens."""

    channels: int = 8
    patch: Patch = (1, 2, 2)
    width: int = 128
    depth: int = 4
    heads: int = 4
    text_width: int = 384
    rotary_axes: tuple[int, int, int] = (8, 12, 12)
    mlp_ratio: int = 4

    @property
    def token_width(self) -> int:
        return self.channels * math.prod(self.patch)


def check_heads(config: NetworkConfig) -> None:
    """Raises ValueError where the rotary axes do not add up to the width of a head."""
    if sum(config.rotary_axes) != config.width // config.heads:
        raise ValueError(f"rotary_axes {config.rotary_axes} must add up to the head width {config.width // config.heads}")


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 t: [..] -> [.., width] (Vaswani et al. 2017, section 3.5)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angle = 1000 * t.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def xavier(network: nn.Module) -> None:
    """Every linear: uniform weights of Glorot & Bengio 2010, no bias."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class SelfAttention(nn.Module):
    """Attention of the tokens of a clip to each other; queries and keys are normalised, so that clips of many lengths stay steady in half precision."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [N,h,d] each
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        return self.out(packed_attention(q, k, v, segments, segments).flatten(1))  # [N,w]
