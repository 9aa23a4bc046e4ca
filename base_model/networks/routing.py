"""Tokens that skip the middle of a network in training (TREAD, Krause et al. 2025, arXiv 2501.04765): they leave before block `first` and are back, unchanged,
at their places before block `last`. All tokens reach the last blocks, so the loss stays on all of them, and sampling uses the whole network.

It knows no network. Letters: S segments, N tokens of all segments together, K tokens that take the whole way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.networks.packing import Segments, kept_tokens


@dataclass(frozen=True)
class Route:
    """Only the tokens `kept` go through the blocks [first, last).

    Example: two clips of 4 and 2 tokens, half of them routed: `kept` [0, 3, 5] and `segments.lengths` (2, 1).
    """

    kept: Tensor  # [K] rows of the pack, ascending
    segments: Segments  # the S clips, without the tokens that skip
    first: int
    last: int


def choose_route(segments: Segments, rates: Sequence[float], *, between: tuple[int, int], generator: torch.Generator) -> Route:
    """A random share of each clip's tokens skips the blocks [first, last) = `between`; at least one token a clip stays.

    rates: S shares in [0, 1), one a clip; n tokens keep round((1 - rate) n) of them. Raises ValueError for another number of rates or a rate out of range.
    """
    if len(rates) != len(segments) or not all(0 <= rate < 1 for rate in rates):
        raise ValueError(f"expected {len(segments)} rates in [0, 1), one a clip, got {list(rates)}")
    kept = kept_tokens(segments, torch.tensor(rates, dtype=torch.float64), generator)  # [K]
    numbers = torch.bincount(segments.ids[kept], minlength=len(segments)).tolist()
    return Route(kept, Segments(tuple(numbers)), *between)


def middle(depth: int) -> tuple[int, int]:
    """The blocks [first, last) that tokens may skip: all but the first and the last quarter, at least one at each end. The same number at both ends, as skips want it.

    Raises UserError where nothing lies between.
    """
    ends = max(1, depth // 4)
    if depth <= 2 * ends:
        raise UserError(f"a network of {depth} blocks has no middle that tokens could skip. Take one of at least 3, or route no tokens (fit.routed 0)")
    return ends, depth - ends
