"""An image DiT that makes videos: temporal layers between its blocks (Video LDM: Blattmann et al. 2023, arXiv 2304.08818, section 3.1).

Space and time apart: the image blocks see each frame as an image of its own, a temporal layer behind each block attends across the frames at each place. Temporal layers
are the identity at the start, so a fresh video model gives what the image model gives, frame by frame. Letters as in `dit.py`, and f frames of all clips together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from base_model.networks.attention import rotary_table
from base_model.networks.dit import NOTHING, Beside, DiT, DiTConfig, Modulation, Told, gated, modulate
from base_model.networks.layers import SelfAttention
from base_model.networks.packing import Segments, regroup


class Places(NamedTuple):
    """The tokens of each place across its clip's frames, one segment a place."""

    order: Tensor  # [N], frame by frame -> place by place
    back: Tensor  # [N], the inverse
    segments: Segments
    table: tuple[Tensor, Tensor]  # 2 x [N,1,d/2] rotary angles of time, in place order


class TemporalBlock(nn.Module):
    """A DiT block without text whose attention runs over time; adaLN-zero, so the identity at the start."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        w = config.width
        self.modulation = Modulation(w, 6)
        self.attention = SelfAttention(w, config.heads)
        self.mlp_in = nn.Linear(w, config.mlp_ratio * w)
        self.mlp_out = nn.Linear(config.mlp_ratio * w, w)
        nn.init.zeros_(self.modulation.linear.weight)
        nn.init.zeros_(self.modulation.linear.bias)

    def forward(self, x: Tensor, told: Told, frames: Segments, places: Places) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(told, frames)
        attended = self.attention(modulate(x, shift_a, scale_a)[places.order], places.table, places.segments)[places.back]  # [N,w]
        x = gated(x, gate_a, attended)
        hidden = gelu(self.mlp_in(modulate(x, shift_m, scale_m)), approximate="tanh")  # [N,4w]
        return gated(x, gate_m, self.mlp_out(hidden))  # [N,w]


class TemporalDiT(nn.Module):
    """The inputs and outputs of `image`, a DiT; tokens lie frame by frame, as `pack` lays them.

    A segment is a clip; its frames are read from the positions. Their numbers are times, so frames of a low rate stand apart: 0, 4, 8 at a quarter of the rate.
    """

    def __init__(self, image: DiT) -> None:
        super().__init__()
        self.config = image.config
        self.image = image
        self.blocks = nn.ModuleList(TemporalBlock(image.config) for _ in image.blocks)

    def forward(self, tokens: Tensor, positions: Tensor, segments: Segments, t: Tensor, text: Tensor, text_segments: Segments, *, beside: Beside = NOTHING) -> Tensor:
        _, frames = regroup(segments, positions[:, :1])
        clip_of_frame = segments.ids[list(frames.offsets[:-1])]  # [f]
        table = rotary_table(positions, self.config.rotary_axes)  # 2 x [N,1,d/2]; within a frame only rows and columns differ
        places = self._places(positions, segments)
        x, told, text = self.image.embed(tokens, segments, t, text, text_segments, beside)
        if told.row is None:
            told = Told(told.c[clip_of_frame])  # [f,w]
        parts = text.split(list(text_segments.lengths))
        text = torch.cat([parts[clip] for clip in clip_of_frame.tolist()])  # each frame reads its clip's text
        text_segments = Segments(tuple(text_segments.lengths[clip] for clip in clip_of_frame.tolist()))
        for block, temporal_block in zip(self.image.blocks, self.blocks, strict=True):
            x = block(x, told, text, table, frames, text_segments)  # [N,w]
            x = temporal_block(x, told, frames, places)  # [N,w]
        return self.image.head(x, told, frames)

    def _places(self, positions: Tensor, segments: Segments) -> Places:
        order, places = regroup(segments, positions[:, 1:])
        cos, sin = rotary_table(positions[order], (self.config.width // self.config.heads, 0, 0))
        return Places(order, order.argsort(), places, (cos, sin))
