"""Packing beside padding and buckets on a synthetic mix of clips: how full, FLOPs for nothing, clips lost, balance of the ranks, and seconds a useful token.

All but the seconds is arithmetic on one epoch, with the tokens of Wan's latents and the FLOPs of Wan2.1-1.3B (`forward_flops`). The seconds are measured: forward and backward
of a small DiT, in one process, on clips of the same mix with 32 times fewer tokens, which gives attention the share of the FLOPs that it has in Wan at full size.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from align.config import Count, Seed, Several
from align.data import PackSampler
from align.objectives.regression import packed_clip_error
from align.progress import Progress
from base_model.errors import UserError
from base_model.networks.attention import rotate
from base_model.networks.dit import DiT, DiTConfig
from base_model.networks.layers import SelfAttention
from base_model.networks.packing import Segments, balanced_packs, first_fit_decreasing, forward_flops, grid_positions
from base_model.types import ClipShape
from recipes.bench._packing_wan import Grid, measure_wan
from recipes.bench._results import Bench, Row, check_can_end, here, paired_ratio, spread, timed, write

WAN_FLOPS = partial(forward_flops, width=1536, depth=30, mlp_width=8960, token_width=64, text_tokens=512, text_width=4096)
CAPACITIES = (32_768, 131_072)
SHRINK: Grid = (2, 4, 4)
NETWORK = DiTConfig(channels=16, width=64, depth=2, heads=2)
TEXT_TOKENS = 8
REFERENCE = "packs of equal FLOPs, 131k"


class Config(Bench):
    clips: Count = 4_000
    """Clips of the mix."""
    seed: Seed = 0
    """Seed of the mix and of its order."""
    ranks: Several = 8
    """Ranks that take a step together."""
    window: Count = 2_000
    """Clips that are packed together."""
    timed_clips: Count = 64
    """Clips of the mix that are timed."""
    repeats: Count = 5
    """Measured repeats. `quick` takes at most 2."""
    wan: bool = False
    """Times diffusers' own Wan at toy size instead, on one core: packed, padded, one by one. Only `seed`, `timed_clips` and `repeats` matter then."""


# The mix, and the buckets for it

AREAS = (256 * 256, 480 * 480, 480 * 832)
RATIOS = (9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9)
FRAMES = (1, 17, 33, 49, 65, 81)


def mixed_clips(number: int, seed: int) -> list[ClipShape]:
    """A synthetic mix: 15 % images; other clips have 17 to 81 frames, log-uniform, rounded down to 1 + a multiple of 4.

    Width over height is log-uniform from 9:16 to 16:9; 30 % have the area of 256x256 pixels, 30 % of 480x480, 40 % of 480x832; sides are rounded down to multiples of 16, Wan's
    latent pixels times its patch. About 8,800 tokens a clip, at most 32,760.
    """
    rng = np.random.default_rng(seed)
    images, frames = rng.random(number) < 0.15, np.exp(rng.uniform(math.log(17), math.log(85), number))
    area, ratio = rng.choice(AREAS, number, p=(0.3, 0.3, 0.4)), np.exp(rng.uniform(math.log(9 / 16), math.log(16 / 9), number))
    return [shape_of(1 if image else int(t), a, r) for image, t, a, r in zip(images, frames, area.tolist(), ratio.tolist(), strict=True)]


def shape_of(frames: int, area: float, ratio: float) -> ClipShape:
    """The largest clip on Wan's grid with at most this many frames, this height and this width."""
    height, width = (16 * math.floor(side / 16 + 1e-6) for side in (math.sqrt(area / ratio), math.sqrt(area * ratio)))
    return ClipShape(1 + (frames - 1) // 4 * 4, height, width)


def bucket_of(clip: ClipShape) -> ClipShape:
    """What a clip is cut to: nearest of 7 ratios and of 3 areas, longest of 6 lengths that it fills."""
    ratio, area = clip.width / clip.height, clip.width * clip.height
    nearest = (min(some, key=lambda one: abs(math.log(one / wanted))) for some, wanted in ((AREAS, area), (RATIOS, ratio)))
    return shape_of(max(frames for frames in FRAMES if frames <= clip.frames), *nearest)


def grid_of(clip: ClipShape) -> Grid:
    return 1 + (clip.frames - 1) // 4, clip.height // 16, clip.width // 16


def shrunk(grid: Grid) -> Grid:
    f, h, w = (math.ceil(side / by) for side, by in zip(grid, SHRINK, strict=True))
    return f, h, w


# What each scheme does with an epoch


class Batch(NamedTuple):
    """What one rank computes in one step: a packed sequence, or rows padded to the longest clip."""

    clips: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens of each clip that it trains on
    room: int  # tokens it could hold at the same memory
    padded: bool

    @property
    def computed(self) -> tuple[int, ...]:
        return (max(self.lengths),) * len(self.lengths) if self.padded else self.lengths


Step = list[Batch]  # one batch a rank
Plan = Callable[[Sequence[ClipShape], Config], list[Step]]


def num_tokens(clips: Sequence[ClipShape]) -> list[int]:
    return [math.prod(grid_of(clip)) for clip in clips]


def pad_random(clips: Sequence[ClipShape], cfg: Config, *, batch: int) -> list[Step]:
    """Batches of any `batch` clips; the last ones may be smaller or, in the last step, fewer than ranks."""
    tokens, order = num_tokens(clips), np.random.default_rng(cfg.seed).permutation(len(clips)).tolist()
    rows = [tuple(order[k : k + batch]) for k in range(0, len(order), batch)]
    batches = [_dense(row, [tokens[c] for c in row]) for row in rows]
    return [batches[k : k + cfg.ranks] for k in range(0, len(batches), cfg.ranks)]


def _dense(clips: tuple[int, ...], lengths: Sequence[int]) -> Batch:
    return Batch(clips, tuple(lengths), max(lengths) * len(lengths), padded=True)


def bucketed(clips: Sequence[ClipShape], cfg: Config, *, batch: int) -> list[Step]:
    """Every step takes `batch` clips a rank from one bucket; what does not fill a step is dropped."""
    buckets: dict[ClipShape, list[int]] = defaultdict(list)
    for index in np.random.default_rng(cfg.seed).permutation(len(clips)).tolist():
        buckets[bucket_of(clips[index])].append(index)
    steps = []
    for bucket, rows in buckets.items():
        for k in range(0, len(rows) - batch * cfg.ranks + 1, batch * cfg.ranks):
            step = [tuple(rows[j : j + batch]) for j in range(k, k + batch * cfg.ranks, batch)]
            steps.append([_dense(row, num_tokens([bucket]) * batch) for row in step])
    return steps


def equal_tokens(clips: Sequence[ClipShape], cfg: Config, *, capacity: int) -> list[Step]:
    """Packs as they come, one a rank."""
    packs = PackSampler(num_tokens(clips), capacity, seed=cfg.seed, window=cfg.window)
    return _one_epoch(clips, capacity, ([packs[i + rank] for rank in range(cfg.ranks)] for i in range(0, 2**62, cfg.ranks)))


def equal_flops(clips: Sequence[ClipShape], cfg: Config, *, capacity: int) -> list[Step]:
    tokens = num_tokens(clips)
    packs = PackSampler(tokens, capacity, seed=cfg.seed, window=cfg.window, ranks=cfg.ranks, costs=[WAN_FLOPS([n]) for n in tokens])
    return _one_epoch(clips, capacity, (packs.step(i) for i in range(2**62)))


def _one_epoch(clips: Sequence[ClipShape], capacity: int, steps: Iterator[Sequence[Sequence[int]]]) -> list[Step]:
    """Steps until every clip has been seen; the last one may reach into the next epoch."""
    tokens, missing, plan = num_tokens(clips), set(range(len(clips))), []
    while missing:
        plan.append([Batch(tuple(pack), tuple(tokens[c] for c in pack), capacity, padded=False) for pack in next(steps)])
        missing -= {c for batch in plan[-1] for c in batch.clips}
    return plan


def account(plan: Sequence[Step], clips: Sequence[ClipShape], cfg: Config) -> Row:
    """What an epoch of a scheme amounts to."""
    batches = [batch for step in plan for batch in step]
    useful = {clip: length for batch in batches for clip, length in zip(batch.clips, batch.lengths, strict=True)}
    spent = [[WAN_FLOPS(batch.computed) for batch in step] for step in plan]
    full = [np.mean(flops) / np.max(flops) for flops in spent if len(flops) == cfg.ranks]
    return {
        "fill": sum(sum(batch.lengths) for batch in batches) / sum(batch.room for batch in batches) if batches else None,
        "flops_wasted": 1 - sum(WAN_FLOPS(batch.lengths) for batch in batches) / sum(map(sum, spent)) if batches else None,
        "clips": len(clips),
        "clips_dropped": len(clips) - len(useful),
        "tokens_lost": 1 - sum(useful.values()) / sum(num_tokens(clips)),
        "rank_balance_flops": float(np.mean(full)) if full else None,
    }


# What is timed


class Work(NamedTuple):
    """One forward and backward pass: clips of a grid each, packed, or padded to the longest."""

    grids: tuple[Grid, ...]
    padded: bool = False


Pick = Callable[[Sequence[ClipShape]], list[Work]]


def pad_work(clips: Sequence[ClipShape], *, batch: int) -> list[Work]:
    grids = [shrunk(grid_of(clip)) for clip in clips]
    return [Work(tuple(grids[k : k + batch]), padded=True) for k in range(0, len(grids), batch)]


def bucket_work(clips: Sequence[ClipShape], *, batch: int) -> list[Work]:
    """Batches of equal clips: the middle one of each `batch` clips in order of their buckets' tokens stands for all of them."""
    grids = sorted((shrunk(grid_of(bucket_of(clip))) for clip in clips), key=math.prod)
    return [Work((grids[(k + min(k + batch, len(grids))) // 2],) * batch) for k in range(0, len(grids), batch)]


def pack_work(clips: Sequence[ClipShape], *, capacity: int, balanced: bool) -> list[Work]:
    grids = [shrunk(grid_of(clip)) for clip in clips]
    lengths, room = [math.prod(grid) for grid in grids], capacity // math.prod(SHRINK)
    packs = balanced_packs(lengths, [WAN_FLOPS([n]) for n in num_tokens(clips)], room) if balanced else first_fit_decreasing(lengths, room)
    return [Work(tuple(grids[k] for k in pack)) for pack in packs]


class PaddedSelfAttention(SelfAttention):
    """Rows of equal length of which the padding is no key: attention in a network that cannot pack."""

    keys: Tensor  # bool [B,1,1,n]

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [B n,h,d] each
        q, k = rotate(self.q_norm(q), table).to(v.dtype), rotate(self.k_norm(k), table).to(v.dtype)
        q, k, v = (part.unflatten(0, (len(segments), -1)).transpose(1, 2) for part in (q, k, v))  # [B,h,n,d] each
        attended = scaled_dot_product_attention(q, k, v, attn_mask=self.keys)  # [B,h,n,d]
        return self.out(attended.transpose(1, 2).flatten(0, 1).flatten(1))  # [B n,w]


def padded_copy(network: DiT) -> DiT:
    """The same weights with attention over padded rows."""
    twin = copy.deepcopy(network)
    for name, module in network.named_modules():
        if isinstance(module, SelfAttention):
            attention = PaddedSelfAttention(network.config.width, network.config.heads)
            attention.load_state_dict(module.state_dict())
            twin.set_submodule(name, attention)
    return twin


@dataclass(frozen=True)
class Inputs:
    """What a network is given for one piece of work; `keep` is False at padding, and None where there is none."""

    tokens: Tensor  # [N,c]
    positions: Tensor  # [N,3]
    segments: Segments
    keep: Tensor | None  # bool [N]
    t: Tensor  # [S]
    text: Tensor  # [M,D]
    text_segments: Segments


def draw_inputs(work: Work, config: DiTConfig, generator: torch.Generator, *, text_tokens: int = TEXT_TOKENS) -> Inputs:
    positions = [grid_positions(grid) for grid in work.grids]  # [n,3] each
    lengths = [len(part) for part in positions]
    tokens = [torch.randn(n, config.token_width, generator=generator) for n in lengths]
    longest, ragged = max(lengths), work.padded and len(set(lengths)) > 1
    if ragged:
        tokens, positions = ([pad(part, (0, 0, 0, longest - len(part))) for part in parts] for parts in (tokens, positions))
    keep = (torch.arange(longest) < torch.tensor(lengths)[:, None]).flatten() if ragged else None  # [N]
    segments, texts = Segments(tuple(len(part) for part in tokens)), Segments.equal(len(lengths), text_tokens)
    t, text = torch.rand(len(lengths), generator=generator), torch.randn(texts.total, config.text_width, generator=generator)
    return Inputs(torch.cat(tokens), torch.cat(positions), segments, keep, t, text, texts)


class Networks:
    """The DiT, and its copy for padded rows."""

    def __init__(self, config: DiTConfig) -> None:
        torch.manual_seed(0)
        self.packed = DiT(config)
        self.padded = padded_copy(self.packed)

    def __call__(self, x: Inputs) -> Tensor:
        """The velocity [N,c]; what it says at padding means nothing."""
        if x.keep is not None:
            for module in self.padded.modules():
                if isinstance(module, PaddedSelfAttention):
                    module.keys = x.keep.view(len(x.segments), 1, 1, -1)
        network = self.packed if x.keep is None else self.padded
        return network(x.tokens, x.positions, x.segments, x.t, x.text, x.text_segments)

    def train_on(self, inputs: Sequence[Inputs]) -> None:
        """Forward and backward, one piece of work after another."""
        for x in inputs:
            packed_clip_error(self(x), x.tokens, x.segments.ids, len(x.segments), keep=x.keep).mean().backward()


@dataclass
class Scheme:
    """A way to batch clips: what it makes of an epoch and of the timed clips."""

    name: str
    plan: Plan
    work: Pick
    seconds: list[float] = field(default_factory=list)  # a useful token, one a repeat


def schemes(ranks: int) -> list[Scheme]:
    alone = Scheme("one clip a batch", partial(pad_random, batch=1), partial(pad_work, batch=1))
    padded = [Scheme(f"padding, batches of {b}", partial(pad_random, batch=b), partial(pad_work, batch=b)) for b in (2, 4, 8)]
    buckets = [Scheme(f"buckets, global batches of {b * ranks}", partial(bucketed, batch=b), partial(bucket_work, batch=b)) for b in (1, 4, 8)]
    packs = [
        Scheme(f"packs of equal {what}, {round(capacity / 1000)}k", partial(plan, capacity=capacity), partial(pack_work, capacity=capacity, balanced=what == "FLOPs"))
        for what, plan in (("tokens", equal_tokens), ("FLOPs", equal_flops))
        for capacity in CAPACITIES
    ]
    return [alone, *padded, *buckets, *packs]


def time_schemes(entrants: Sequence[Scheme], clips: Sequence[ClipShape], *, repeats: int) -> None:
    """Times all schemes on `clips` in turn, repeat after repeat; a first repeat warms up."""
    networks, inputs = Networks(NETWORK), []
    for entrant in entrants:
        generator = torch.Generator().manual_seed(0)
        inputs.append([draw_inputs(work, NETWORK, generator) for work in entrant.work(clips)])
    with Progress("packing", total=(1 + repeats) * len(entrants)) as progress:
        for repeat in range(1 + repeats):
            for k in range(len(entrants)):
                number = (k + repeat) % len(entrants)  # nobody is always first
                _, seconds = timed(partial(networks.train_on, inputs[number]))
                useful = sum(int(x.keep.sum()) if x.keep is not None else x.segments.total for x in inputs[number])
                if repeat:
                    entrants[number].seconds.append(seconds / useful)
                progress.advance(entrants[number].name)


def measure(cfg: Config) -> list[Row]:
    """One row a scheme."""
    clips, entrants = mixed_clips(cfg.clips, cfg.seed), schemes(cfg.ranks)
    if cfg.clips < 10 * cfg.ranks:
        raise UserError(f"clips: {cfg.clips} are too few to measure {cfg.ranks} ranks with. Give --clips {Config().clips}")
    accounts = [account(entrant.plan(clips, cfg), clips, cfg) for entrant in entrants]
    time_schemes(entrants, mixed_clips(cfg.timed_clips, cfg.seed + 1), repeats=cfg.repeats)
    (reference,) = [entrant.seconds for entrant in entrants if entrant.name == REFERENCE]
    return [_row(entrant, found, reference) for entrant, found in zip(entrants, accounts, strict=True)]


def _row(entrant: Scheme, found: Row, reference: Sequence[float]) -> Row:
    seconds, ratio = spread(entrant.seconds), None if entrant.seconds is reference else paired_ratio(entrant.seconds, reference)
    return {
        "scheme": entrant.name,
        **found,
        "seconds_per_useful_token": seconds.median,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "times_slower_than_packs": ratio and ratio.median,
        "times_slower_low": ratio and ratio.low,
        "times_slower_high": ratio and ratio.high,
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    less = {"repeats": min(cfg.repeats, 2)} if cfg.quick else {}
    measured = cfg.model_copy(update=less)
    rows = wan_rows(measured) if cfg.wan else measure(measured)
    if cfg.write and cfg.wan:
        write(cfg, "packing-wan", here("packing", cfg), "Packs through Wan's own network", {f"{measured.timed_clips} clips on one core": rows})
    elif cfg.write:
        write(cfg, "packing", here("packing", cfg), "Packing, padding and buckets", {f"An epoch of {cfg.clips:,} clips on {cfg.ranks} ranks": rows})
    return {"rows": rows}


def wan_rows(cfg: Config) -> list[Row]:
    """One row a way through diffusers' own network."""
    return measure_wan([shrunk(grid_of(clip)) for clip in mixed_clips(cfg.timed_clips, cfg.seed + 1)], repeats=cfg.repeats)
