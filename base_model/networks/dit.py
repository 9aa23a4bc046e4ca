"""A diffusion transformer for packed video latents (Peebles & Xie 2022, arXiv 2212.09748), in one file.

adaLN-zero blocks, factorised 3-D rotary positions, RMS-normalised queries and keys, cross-attention to text tokens. It knows tokens, not clips: whoever calls it
packs (`packing.pack`) and unpacks. Letters: N tokens of all clips together, S clips (segments), c values of a token, w width, h heads, d head width,
M text tokens of all clips together, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from base_model.networks.attention import packed_attention, rotary_table
from base_model.networks.layers import NetworkConfig, SelfAttention, check_heads, time_features, xavier
from base_model.networks.packing import Segments
from base_model.networks.routing import Route


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """`depth` blocks, all alike."""


class Beside(NamedTuple):
    """What a larger network adds to a DiT's inputs (`upsample.py`)."""

    token: Tensor | float = 0.0  # [N,w], to the embedded tokens
    clip: Tensor | float = 0.0  # [S,w], to the condition vectors


NOTHING = Beside()


class Told(NamedTuple):
    """Noise level and text as condition vectors: one a clip, or one for each noise level that a clip's tokens have."""

    c: Tensor  # [R,w]
    row: Tensor | None = None  # [N] the vector of each token; None where R = S

    def of(self, kept: Tensor) -> Told:
        """What the tokens `kept` [K] are told."""
        return self if self.row is None else Told(self.c, self.row[kept])


class Modulation(nn.Module):
    """Shift, scale and gate of both branches from the condition vector, zero at the start (adaLN-zero)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, told: Told, segments: Segments) -> tuple[Tensor, ...]:
        """-> `parts` tensors [S,w] for equal segments of one noise level each, else [N,w]."""
        parts = self.linear(silu(told.c))  # [R,parts w]
        if told.row is not None:
            parts = parts.index_select(0, told.row)  # [N,parts w]
        elif len(segments.stretches) > 1:
            parts = segments.spread(parts)  # [N,parts w]
        return parts.chunk(self.parts, dim=-1)


def rows(x: Tensor, condition_rows: int) -> Tensor:
    """[N,w] -> [R,n,w] where R equal segments share a condition row, or [N,w] where every token has its own."""
    return x.unflatten(0, (condition_rows, -1)) if len(x) != condition_rows else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then x (1 + scale) + shift; x [N,w], shift and scale [R,w]."""
    grouped = rows(layer_norm(x, x.shape[-1:], eps=1e-6), len(shift))
    if grouped.dim() == 3:
        shift, scale = shift[:, None], scale[:, None]
    return torch.addcmul(grouped + shift, grouped, scale).reshape(x.shape)


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch, all [N,w] but gate [R,w]."""
    branch = rows(branch, len(gate))
    return x + (branch * (gate[:, None] if branch.dim() == 3 else gate)).reshape(x.shape)


class CrossAttention(nn.Module):
    """Every clip's tokens look at the tokens of its own text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.RMSNorm(width // heads)
        self.k_norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, segments: Segments, text_segments: Segments) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1))  # [N,h,d]
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(1)  # [M,h,d] each
        return self.out(packed_attention(self.q_norm(q), self.k_norm(k), v, segments, text_segments).flatten(1))  # [N,w]


class Block(nn.Module):
    """Attention within a clip, attention to its text, MLP; each norm is modulated by time and gated, but for the text's."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        w = config.width
        self.modulation = Modulation(w, 6)
        self.attention = SelfAttention(w, config.heads)
        self.text_norm = nn.LayerNorm(w)
        self.text_attention = CrossAttention(w, config.heads)
        self.mlp_in = nn.Linear(w, config.mlp_ratio * w)
        self.mlp_out = nn.Linear(config.mlp_ratio * w, w)

    def forward(self, x: Tensor, told: Told, text: Tensor, table: tuple[Tensor, Tensor], segments: Segments, text_segments: Segments) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(told, segments)
        x = gated(x, gate_a, self.attention(modulate(x, shift_a, scale_a), table, segments))  # [N,w]
        x = x + self.text_attention(self.text_norm(x), text, segments, text_segments)  # [N,w]
        hidden = nn.functional.gelu(self.mlp_in(modulate(x, shift_m, scale_m)), approximate="tanh")  # [N,4w]
        return gated(x, gate_m, self.mlp_out(hidden))  # [N,w]


class DiT(nn.Module):
    """tokens (N,c), positions (N,3), segments, t (S,) or (N,), text (M,D), text segments -> velocity (N,c)."""

    _repeated_blocks = ("Block",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        check_heads(config)
        self.config = config
        w = config.width
        self.tokens_in = nn.Linear(config.token_width, w)
        self.time_in = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.text_in = nn.Sequential(nn.LayerNorm(config.text_width), nn.Linear(config.text_width, w))
        self.text_pooled = nn.Linear(w, w)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation_out = Modulation(w, 2)
        self.tokens_out = nn.Linear(w, config.token_width)
        self._initialise()

    def _initialise(self) -> None:
        """Every block is the identity and the output is zero at the start."""
        xavier(self)
        zeroed = [m.linear for m in self.modules() if isinstance(m, Modulation)] + [m.out for m in self.modules() if isinstance(m, CrossAttention)]
        for linear in [*zeroed, self.tokens_out]:
            nn.init.zeros_(linear.weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, route: Route | None = None, *, beside: Beside = NOTHING
    ) -> Tensor:
        """`route`: tokens that skip some blocks in training."""
        table = rotary_table(positions, self.config.rotary_axes)  # 2 x [N,1,d/2]
        x, told, text = self.embed(tokens, segments, t, text, text_segments, beside)
        if route is None:
            x = self._through(x, 0, self.config.depth, told, text, table, segments, text_segments)  # [N,w]
        else:
            kept = route.kept.to(x.device)  # [K]
            x = self._through(x, 0, route.first, told, text, table, segments, text_segments)  # [N,w]
            middle = self._through(x[kept], route.first, route.last, told.of(kept), text, (table[0][kept], table[1][kept]), route.segments, text_segments)  # [K,w]
            x = self._through(x.index_copy(0, kept, middle), route.last, self.config.depth, told, text, table, segments, text_segments)  # [N,w]
        return self.head(x, told, segments)

    def embed(self, tokens: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, beside: Beside = NOTHING) -> tuple[Tensor, Told, Tensor]:
        """-> x [N,w], what its tokens are told, text [M,w]."""
        text = self.text_in(text)  # [M,w]
        pooled = self.text_pooled(text_segments.mean(text)) + beside.clip  # [S,w]
        clip, row = torch.arange(len(segments), device=t.device), None  # [S]
        if len(t) != len(segments):
            pairs, row = torch.stack([segments.ids.to(t), t]).unique(dim=1, return_inverse=True)  # [2,R], [N]
            clip, t = pairs[0].long(), pairs[1]  # [R] each
        c = self.time_in(time_features(t, self.config.width).to(text.dtype)) + pooled[clip]  # [R,w]
        return self.tokens_in(tokens) + beside.token, Told(c, row), text

    def hidden(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, *, after: Sequence[int]) -> list[Tensor]:
        """What the tokens have become after each number of blocks in `after`, ascending, [N,w] each; no block behind the last of them is computed."""
        table = rotary_table(positions, self.config.rotary_axes)  # 2 x [N,1,d/2]
        x, told, text = self.embed(tokens, segments, t, text, text_segments)
        found, done = [], 0
        for number in after:
            x = self._through(x, done, number, told, text, table, segments, text_segments)  # [N,w]
            found.append(x)
            done = number
        return found

    def head(self, x: Tensor, told: Told, segments: Segments) -> Tensor:
        """x [N,w] after the blocks -> velocity (N,c)."""
        shift, scale = self.modulation_out(told, segments)
        return self.tokens_out(modulate(x, shift, scale))  # [N,c]

    def _through(self, x: Tensor, first: int, last: int, told: Told, text: Tensor, table: tuple[Tensor, Tensor], segments: Segments, text_segments: Segments) -> Tensor:
        for k in range(first, last):
            x = self.blocks[k](x, told, text, table, segments, text_segments)  # [N,w]
        return x
