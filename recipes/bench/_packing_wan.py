"""Packing through diffusers' own Wan beside padding and one clip at a time: the same steps of the same clips in turn, on one core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from align.progress import Progress
from base_model.families.wan import WanVideoModel
from base_model.families.wan_packed import PackedWan, packed_velocity
from base_model.families.wan_random import random_transformer
from base_model.networks.packing import Patch, token_grid
from base_model.types import Conditioning
from recipes.bench._results import Row, paired_ratio, spread, timed

CHANNELS, TEXT_TOKENS = 16, 16
PATCH: Patch = (1, 2, 2)
Grid = tuple[int, int, int]  # tokens of a clip: frames, rows, columns
WAN: dict[str, Any] = {
    "patch_size": PATCH,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 2,
}
"""Wan2.1-1.3B's shape, 24 times as narrow and 15 times as shallow."""
STEP = 8  # clips
REFERENCE = "packed"


class Clips(NamedTuple):
    """What a step trains on; every clip has its size, its time and its text."""

    x_t: list[Tensor]  # [C,F,H,W] each
    t: Tensor  # [S]
    cond: Conditioning  # S

    @property
    def tokens(self) -> int:
        return sum(math.prod(token_grid(x.shape, PATCH)) for x in self.x_t)


def draw_clips(grids: Sequence[Grid], generator: torch.Generator) -> Clips:
    x_t = [torch.randn(CHANNELS, f, PATCH[1] * h, PATCH[2] * w, generator=generator) for f, h, w in grids]
    number = len(grids)
    text, mask = torch.randn(number, TEXT_TOKENS, WAN["text_dim"], generator=generator), torch.ones(number, TEXT_TOKENS, dtype=torch.bool)
    return Clips(x_t, torch.rand(number, generator=generator), Conditioning(("",) * number, text, mask))


Passes = Callable[[Clips], Iterator[list[Tensor]]]
"""The velocities of a step's clips [C,F,H,W], a list for every pass through the network, in order."""


def one_by_one(model: WanVideoModel, clips: Clips) -> Iterator[list[Tensor]]:
    for k, x in enumerate(clips.x_t):
        yield [model(x[None], clips.t[k : k + 1], clips.cond[k : k + 1])[0]]


def padded(model: WanVideoModel, clips: Clips) -> Iterator[list[Tensor]]:
    """One batch with the frames, height and width of the largest; Wan has no mask, so every clip looks at its padding."""
    sides = largest([x.shape[1:] for x in clips.x_t])
    rows = torch.stack([pad(x, [k for axis in (2, 1, 0) for k in (0, sides[axis] - x.shape[axis + 1])]) for x in clips.x_t])  # [S,C,F,H,W]
    u = model(rows, clips.t, clips.cond)  # [S,C,F,H,W]
    yield [part[:, : x.shape[1], : x.shape[2], : x.shape[3]] for part, x in zip(u, clips.x_t, strict=True)]


def packed(network: PackedWan, model: WanVideoModel, clips: Clips) -> Iterator[list[Tensor]]:
    yield packed_velocity(network, model, clips.x_t, clips.t, [clips.cond[k : k + 1] for k in range(len(clips.x_t))])


def largest(sizes: Sequence[Sequence[int]]) -> list[int]:
    """Of every axis."""
    return [max(axis) for axis in zip(*sizes, strict=True)]


def train(passes: Passes, steps: Sequence[Clips]) -> None:
    """Forward and backward of every step, one pass after another: the sum of each clip's mean square."""
    for clips in steps:
        for found in passes(clips):
            torch.stack([u.square().mean() for u in found]).sum().backward()


@dataclass
class Arm:
    name: str
    passes: Passes
    computed: Callable[[Clips], int]  # tokens
    seconds: list[float] = field(default_factory=list)  # a step, one a repeat


def arms(model: WanVideoModel) -> list[Arm]:
    def useful(clips: Clips) -> int:
        return clips.tokens

    def with_padding(clips: Clips) -> int:
        return len(clips.x_t) * math.prod(largest([token_grid(x.shape, PATCH) for x in clips.x_t]))

    return [
        Arm("one by one", partial(one_by_one, model), useful),
        Arm("padded to the largest", partial(padded, model), with_padding),
        Arm(REFERENCE, partial(packed, PackedWan(model.network), model), useful),
    ]


@contextmanager
def one_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wan_model() -> WanVideoModel:
    torch.manual_seed(0)
    return WanVideoModel(random_transformer(WAN, device=torch.device("cpu"), dtype=torch.float32).requires_grad_(True))


def measure_wan(grids: Sequence[Grid], *, repeats: int) -> list[Row]:
    """One row an arm; `STEP` clips a step, in their order. A first repeat warms up."""
    generator = torch.Generator().manual_seed(0)
    steps = [draw_clips(grids[k : k + STEP], generator) for k in range(0, len(grids), STEP)]
    entrants = arms(wan_model())
    with one_core(), Progress("packing Wan", total=(1 + repeats) * len(entrants)) as progress:
        for repeat in range(1 + repeats):
            for k in range(len(entrants)):
                arm = entrants[(k + repeat) % len(entrants)]  # nobody is always first
                _, seconds = timed(partial(train, arm.passes, steps))
                if repeat:
                    arm.seconds.append(seconds / len(steps))
                progress.advance(arm.name)
    (reference,) = [arm.seconds for arm in entrants if arm.name == REFERENCE]
    return [_row(arm, steps, reference) for arm in entrants]


def _row(arm: Arm, steps: Sequence[Clips], reference: Sequence[float]) -> Row:
    seconds, ratio = spread(arm.seconds), None if arm.seconds is reference else paired_ratio(arm.seconds, reference)
    useful = sum(clips.tokens for clips in steps)
    return {
        "scheme": arm.name,
        "steps": len(steps),
        "clips": sum(len(clips.x_t) for clips in steps),
        "useful_share": useful / sum(map(arm.computed, steps)),
        "useful_tokens_per_second": useful / len(steps) / seconds.median,
        "seconds_per_step": seconds.median,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "times_slower_than_packs": ratio and ratio.median,
        "times_slower_low": ratio and ratio.low,
        "times_slower_high": ratio and ratio.high,
    }
