"""A U-ViT for packed video latents (Bao et al. 2022, arXiv 2209.12152), in one file: everything is a token, and shallow blocks reach deep ones by long skips.

One time token and the text tokens of a clip join its patch tokens in one sequence; a deep block joins its shallow twin by a linear of both (the paper's best of
five ways, section 3.1). The paper's plain pre-norm blocks know neither modulation nor cross-attention.

Kinds of tokens are told apart by the biases of their three input projections. Patches have rotary positions; time and text stand at the origin, which is not to be turned:
text states carry their order from the encoder. Beyond the paper: rotary instead of learned positions and normalised queries and keys, since clips have any size; an MLP on the time
(an option of the authors' code); an output that is zero in a fresh network. Left out: the 3x3 convolution at the end, which needs a grid.

One noise level per token: the time token says the clip's largest level, that of what is still being made, and each patch token is told how far the embedding of its
own level is from that. Where all levels of a clip agree the difference is zero, so this is the same network.

Letters: N patch tokens of all clips together, S clips, M text tokens of all clips together, J = S + M + N tokens of all sequences, c values of a patch token, w width, h heads,
d head width, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from base_model.networks.attention import rotary_table
from base_model.networks.layers import NetworkConfig, SelfAttention, check_heads, time_features, xavier
from base_model.networks.packing import Segments
from base_model.networks.routing import Route


@dataclass(frozen=True)
class UViTConfig(NetworkConfig):
    """`depth` blocks: (depth - 1) // 2 shallow ones, as many deep ones with a skip each, and one in the middle (two where depth is even)."""

    @property
    def skips(self) -> int:
        return (self.depth - 1) // 2


@lru_cache(maxsize=64)
def joined(*parts: Segments) -> tuple[Segments, Tensor]:
    """Sequences with one segment a clip each, put behind each other clip by clip -> joint segments, and the place [J] of every row of `torch.cat(parts)` among them.

    Example: a time token, two text tokens and three patches of one clip keep their order; a second clip begins at place 6.
    """
    ids = torch.cat([part.ids for part in parts])  # [J] clip of every row
    lengths = (sum(of_clip) for of_clip in zip(*(part.lengths for part in parts), strict=True))
    return Segments(tuple(lengths)), ids.argsort(stable=True).argsort()


class Block(nn.Module):
    """LayerNorm and attention, LayerNorm and MLP, each added to its input; a deep block first mixes in what its shallow twin said."""

    def __init__(self, config: UViTConfig, *, skip: bool) -> None:
        super().__init__()
        w = config.width
        self.skip = nn.Linear(2 * w, w) if skip else None
        self.attention_norm = nn.LayerNorm(w)
        self.attention = SelfAttention(w, config.heads)
        self.mlp_norm = nn.LayerNorm(w)
        self.mlp_in = nn.Linear(w, config.mlp_ratio * w)
        self.mlp_out = nn.Linear(config.mlp_ratio * w, w)

    def forward(self, x: Tensor, shallow: Tensor | None, table: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        if self.skip is not None and shallow is not None:
            x = self.skip(torch.cat([x, shallow], dim=-1))  # [J,2w] -> [J,w]
        x = x + self.attention(self.attention_norm(x), table, segments)  # [J,w]
        return x + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x))))  # [J,4w] -> [J,w]


class UViT(nn.Module):
    """tokens (N,c), positions (N,3), segments, t (S,) or (N,), text (M,D), text segments -> velocity (N,c). Called like `dit.DiT`."""

    _repeated_blocks = ("Block",)

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        check_heads(config)
        self.config = config
        w = config.width
        self.tokens_in = nn.Linear(config.token_width, w)
        self.time_in = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.text_in = nn.Sequential(nn.LayerNorm(config.text_width), nn.Linear(config.text_width, w))
        self.blocks = nn.ModuleList(Block(config, skip=k >= config.depth - config.skips) for k in range(config.depth))
        self.norm_out = nn.LayerNorm(w)
        self.tokens_out = nn.Linear(w, config.token_width)
        xavier(self)
        nn.init.zeros_(self.tokens_out.weight)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, route: Route | None = None) -> Tensor:
        """`route`: patch tokens that skip blocks in training; as many blocks before as after them, since skips join the two ends. Raises ValueError where they differ."""
        x, place, whole, table = self._joint(tokens, positions, segments, t, text, text_segments)
        said: list[Tensor] = []
        if route is None:
            x = self._through(x, 0, self.config.depth, said, table, whole)  # [J,w]
        else:
            kept, way = self._among_all(route, segments, text_segments, place)  # kept [K]
            x = self._through(x, 0, route.first, said, table, whole)  # [J,w]
            middle = self._through(x[kept], route.first, route.last, said, (table[0][kept], table[1][kept]), way)  # [K,w]
            x = self._through(x.index_copy(0, kept, middle), route.last, self.config.depth, said, table, whole)  # [J,w]
        return self.tokens_out(self.norm_out(x[place[-len(tokens) :]]))  # [N,c]

    def hidden(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, *, after: Sequence[int]) -> list[Tensor]:
        """What the patch tokens have become after each number of blocks in `after`, ascending, [N,w] each; no block behind the last of them is computed."""
        x, place, whole, table = self._joint(tokens, positions, segments, t, text, text_segments)
        said: list[Tensor] = []
        found, done = [], 0
        for number in after:
            x = self._through(x, done, number, said, table, whole)  # [J,w]
            found.append(x[place[-len(tokens) :]])  # [N,w]
            done = number
        return found

    def _joint(
        self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments
    ) -> tuple[Tensor, Tensor, Segments, tuple[Tensor, Tensor]]:
        """Time, text and patches in one sequence: x [J,w], the place [J] of every row of (time, text, patches) in it, its segments, its rotary table."""
        x = self.tokens_in(tokens)  # [N,w]
        if len(t) == len(segments):
            time = self._time(t, x.dtype)  # [S,w]
        else:
            largest = segments.largest(t)  # [S]
            time = self._time(largest, x.dtype)  # [S,w]
            x = x + self._time(t, x.dtype) - self._time(segments.spread(largest), x.dtype)  # [N,w]
        whole, place = joined(Segments.equal(len(segments), 1), text_segments, segments)  # place [J]
        place = place.to(x.device)
        x = x.new_empty(len(place), x.shape[1]).index_copy(0, place, torch.cat([time, self.text_in(text), x]))  # [J,w]
        table = rotary_table(positions.new_zeros(len(place), 3).index_copy(0, place[-len(tokens) :], positions), self.config.rotary_axes)  # 2 x [J,1,d/2]
        return x, place, whole, table

    def _time(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.time_in(time_features(t, self.config.width).to(dtype))  # [..,w]

    def _through(self, x: Tensor, first: int, last: int, said: list[Tensor], table: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        """The blocks [first, last): shallow ones add to what was `said`, deep ones take from its end."""
        for k in range(first, last):
            deep = k >= self.config.depth - self.config.skips
            x = self.blocks[k](x, said.pop() if deep else None, table, segments)  # [J,w]
            if k < self.config.skips:
                said.append(x)
        return x

    def _among_all(self, route: Route, segments: Segments, text_segments: Segments, place: Tensor) -> tuple[Tensor, Segments]:
        """The rows [K] that take the whole way, and their segments: time and text never skip."""
        if route.first != self.config.depth - route.last:
            raise ValueError(f"tokens cannot skip blocks {route.first} to {route.last - 1} of {self.config.depth}: as many must lie before as after, since long skips join them")
        conditions = len(place) - segments.total
        kept = torch.cat([place[:conditions], place[conditions:][route.kept.to(place.device)]]).sort().values  # [K]
        return kept, joined(Segments.equal(len(segments), 1), text_segments, route.segments)[0]
