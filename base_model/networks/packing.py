"""Several clips in one sequence: tokens (N, c), positions (N, 3), and where each clip (segment) begins.

Letters: S segments, N tokens of all segments together, c values of a token, C F H W latents of one clip.
A dense batch is the special case of S equal segments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Stretch(NamedTuple):
    """Consecutive segments [first, last) of one length: attention runs over them as one dense batch."""

    first: int
    last: int
    length: int


@dataclass(frozen=True)
class Segments:
    """The lengths of the S segments of a packed sequence, in order.

    Example: `Segments((64, 64, 16))`: two clips of 64 tokens, one image of 16; N = 144, offsets (0, 64, 128, 144).
    """

    lengths: tuple[int, ...]

    @classmethod
    def equal(cls, number: int, length: int) -> Segments:
        return cls((length,) * number)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def total(self) -> int:
        return self.offsets[-1]

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        groups = [len(list(group)) for _, group in groupby(self.lengths)]
        firsts = list(accumulate(groups, initial=0))
        return tuple(Stretch(a, b, self.lengths[a]) for a, b in pairwise(firsts))

    @cached_property
    def ids(self) -> Tensor:
        """Segment number of every token, [N]."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.lengths))

    def spread(self, per_segment: Tensor) -> Tensor:
        """[S, ...] -> [N, ...]: every token gets its segment's row."""
        if len(self.stretches) == 1:
            return per_segment.unsqueeze(1).expand(-1, self.lengths[0], *per_segment.shape[1:]).flatten(0, 1)
        return per_segment.index_select(0, self.ids.to(per_segment.device))

    def mean(self, per_token: Tensor) -> Tensor:
        """[N, ...] -> [S, ...]: mean over the tokens of each segment."""
        if len(self.stretches) == 1:
            return per_token.unflatten(0, (len(self), -1)).mean(1)
        sums = torch.zeros(len(self), *per_token.shape[1:], dtype=per_token.dtype, device=per_token.device)
        sums = sums.index_add(0, self.ids.to(per_token.device), per_token)
        lengths = torch.tensor(self.lengths, dtype=per_token.dtype, device=per_token.device)
        return sums / lengths.reshape(-1, *(1,) * (per_token.dim() - 1))

    def largest(self, per_token: Tensor) -> Tensor:
        """[N] -> [S]: the largest value of each segment."""
        return per_token.new_zeros(len(self)).scatter_reduce(0, self.ids.to(per_token.device), per_token, "amax", include_self=False)


def regroup(segments: Segments, keys: Tensor) -> tuple[Tensor, Segments]:
    """Tokens of one segment with equal keys become a segment of their own: `positions[:, :1]` makes every frame one, `positions[:, 1:]` every place.

    keys [N,k] -> (order [N], smaller segments): `x[order]` lies group behind group, by clip, then by key, and keeps its order inside a group.
    """
    _, group, lengths = torch.cat([segments.ids.to(keys)[:, None], keys], dim=1).unique(dim=0, return_inverse=True, return_counts=True)
    return group.argsort(stable=True), Segments(tuple(lengths.tolist()))


Patch = tuple[int, int, int]


def token_grid(latent_shape: Sequence[int], patch: Patch) -> tuple[int, int, int]:
    """(F', H', W') of latents [..., F, H, W] cut into patches. Raises ValueError where a side does not divide."""
    f, h, w = latent_shape[-3:]
    if f % patch[0] or h % patch[1] or w % patch[2]:
        raise ValueError(f"latents of {f}x{h}x{w} cannot be cut into patches of {patch[0]}x{patch[1]}x{patch[2]}")
    return f // patch[0], h // patch[1], w // patch[2]


def patchify(x: Tensor, patch: Patch) -> Tensor:
    """[B,C,F,H,W] -> [B,n,c] with n = F'H'W' and c = C pf ph pw."""
    f, h, w = token_grid(x.shape, patch)
    x = x.unflatten(4, (w, patch[2])).unflatten(3, (h, patch[1])).unflatten(2, (f, patch[0]))  # [B,C,F',pf,H',ph,W',pw]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B,n,c]


def unpatchify(tokens: Tensor, channels: int, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """[B,n,c] -> [B,C,F,H,W]: the inverse of `patchify`."""
    x = tokens.unflatten(2, (channels, *patch)).unflatten(1, grid)  # [B,F',H',W',C,pf,ph,pw]
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B,C,F',pf,H',ph,W',pw]
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def grid_positions(grid: tuple[int, int, int]) -> Tensor:
    """Integer (frame, row, column) of every token, [n, 3]."""
    axes = [torch.arange(n, dtype=torch.float32) for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


class Packed(NamedTuple):
    """Tokens of several clips, one after another, with their places and where each clip begins."""

    tokens: Tensor  # [N, c]
    positions: Tensor  # [N, 3]
    segments: Segments


def pack(clips: Sequence[Tensor], patch: Patch) -> Packed:
    """Latents [C,F,H,W] of any sizes -> one sequence. Raises ValueError for an empty list."""
    if not clips:
        raise ValueError("nothing to pack: the list of clips is empty")
    tokens = [patchify(clip[None], patch)[0] for clip in clips]
    positions = [grid_positions(token_grid(clip.shape, patch)) for clip in clips]
    return Packed(torch.cat(tokens), torch.cat(positions), Segments(tuple(len(t) for t in tokens)))


def unpack(tokens: Tensor, clips: Sequence[Tensor], patch: Patch) -> list[Tensor]:
    """[N, c] -> one [C,F,H,W] per clip, shaped like `clips`."""
    parts = tokens.split([math.prod(token_grid(clip.shape, patch)) for clip in clips])
    return [unpatchify(part[None], clip.shape[0], token_grid(clip.shape, patch), patch)[0] for part, clip in zip(parts, clips, strict=True)]


# Token dropping


def kept_tokens(segments: Segments, rates: Tensor, generator: torch.Generator) -> Tensor:
    """Which tokens to train on: of a segment's n a random round((1 - rate) n), at least one; ascending indices [K] long into the N tokens.

    rates [S] in [0, 1], one a clip: drawn per clip, some clips stay whole, as they are in sampling (NaViT: Dehghani et al. 2023, arXiv 2307.06304, section 3.3).
    """
    parts = torch.rand(segments.total, generator=generator).split(list(segments.lengths))  # [n] each
    counts = [max(1, round((1 - rate) * n)) for rate, n in zip(rates.tolist(), segments.lengths, strict=True)]
    chosen = [offset + part.argsort()[:count].sort().values for offset, part, count in zip(segments.offsets, parts, counts, strict=False)]
    return torch.cat(chosen)  # [K]


def take_tokens(packed: Packed, kept: Tensor) -> Packed:
    """The tokens `kept` [K], ascending, with their positions, in as many segments as before. Raises ValueError where a segment keeps none."""
    lengths = torch.bincount(packed.segments.ids[kept], minlength=len(packed.segments)).tolist()
    if 0 in lengths:
        raise ValueError(f"segment {lengths.index(0)} keeps no token")
    return Packed(packed.tokens[kept], packed.positions[kept], Segments(tuple(lengths)))  # [K,c], [K,3]


# Which clips share a pack


def forward_flops(
    lengths: Sequence[int], *, width: int, depth: int, mlp_width: int, token_width: int = 0, text_tokens: int = 0, text_width: int = 0
) -> int:
    """FLOPs of the DiT's matrix products (2 for a multiplication and an addition) in one forward pass over clips of `lengths` tokens: linear in tokens, quadratic in each clip.

    text_tokens: of each clip's caption. A training step costs three times as much. Wan's layers have the same matrix products, but for the modulation (6 width^2 a clip
    and layer): Wan2.1-1.3B is width=1536, depth=30, mlp_width=8960.
    """
    n, clips, texts = sum(lengths), len(lengths), len(lengths) * text_tokens
    linear = n * (6 * width**2 + 2 * width * mlp_width) + clips * 6 * width**2 + texts * 2 * width**2  # qkv, out, q, out, mlp; modulation; k, v of the text
    attention = 2 * width * sum(length * (length + text_tokens) for length in lengths)  # scores and values, over the clip and over its text
    ends = width * (2 * n * token_width + texts * text_width + clips * 5 * width)  # tokens in and out; text in; time, pooled text and last modulation
    return 2 * (depth * (linear + attention) + ends)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of segments gathered into windows of at most `capacity` tokens; none is dropped, equal lengths stay neighbours.

    A segment longer than the capacity gets a window of its own. Johnson 1973 ("Near-optimal bin packing algorithms"): at most 11/9 of the best number of windows.
    """
    windows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for w, free in enumerate(room):
            if lengths[index] <= free:
                windows[w].append(index)
                room[w] -= lengths[index]
                break
        else:
            windows.append([index])
            room.append(capacity - lengths[index])
    return windows


def balanced_packs(lengths: Sequence[int], costs: Sequence[float], capacity: int) -> list[list[int]]:
    """Indices of segments in packs of at most `capacity` tokens and nearly equal cost: longest first, each into the cheapest pack with room for it; none is dropped.

    costs: one a segment. As many packs as `first_fit_decreasing` fills, or the few more that balance needs; a segment longer than the capacity gets a pack of its own.
    Graham 1969 ("Bounds on multiprocessing timing anomalies"): the longest processing time first.
    """
    number = len(first_fit_decreasing(lengths, capacity))
    while (packs := _deal(lengths, costs, capacity, number)) is None:
        number += 1
    return packs


def _deal(lengths: Sequence[int], costs: Sequence[float], capacity: int, number: int) -> list[list[int]] | None:
    packs: list[list[int]] = [[] for _ in range(number)]
    tokens, cost = np.zeros(number, dtype=np.int64), np.zeros(number)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = (tokens + lengths[index] <= capacity) | (tokens == 0)
        if not room.any():
            return None
        cheapest = int(np.where(room, cost, np.inf).argmin())
        packs[cheapest].append(index)
        tokens[cheapest] += lengths[index]
        cost[cheapest] += costs[index]
    return packs
