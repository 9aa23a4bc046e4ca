"""Several scorers -> one reward a clip: standardise, be pessimistic about doubt, weigh, add; a blocked clip cannot buy itself back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reward.types import Scorer, Scores


@dataclass(frozen=True)
class Term:
    """One dimension of one scorer in the mixture: weight * ((mean - pessimism * spread) - center) / scale.

    `center` and `scale` are the scorer's mean and standard deviation over a frozen reference set, stored with it: never those of the present batch.
    """

    scorer: str
    dim: str
    weight: float = 1.0
    center: float = 0.0
    scale: float = 1.0
    pessimism: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.scorer}.{self.dim}"


class Mixed(NamedTuple):
    """What B clips earned."""

    reward: Tensor  # [B]; nan where any term of weight other than 0 is unknown
    parts: dict[str, Tensor]  # term -> standardised value [B] before its weight
    unknown: Tensor  # [B] bool


@dataclass(frozen=True)
class Mixture:
    """Scorers by name and the terms made of them. Raises ValueError for a term that names no scorer or dimension, or a scale that is not positive."""

    scorers: Mapping[str, Scorer]
    terms: tuple[Term, ...]
    blocked_reward: float = -4.0  # the most a blocked clip can get, in units of the weighted sum

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a mixture needs at least one term")
        for term in self.terms:
            if term.scorer not in self.scorers:
                raise ValueError(f"term {term.name}: no scorer {term.scorer!r} among {sorted(self.scorers)}")
            if term.dim not in self.scorers[term.scorer].dims:
                raise ValueError(f"term {term.name}: scorer {term.scorer!r} has the dimensions {self.scorers[term.scorer].dims}")
            if not term.scale > 0:
                raise ValueError(f"term {term.name}: scale must be positive, got {term.scale}")

    def __call__(self, video: Tensor, prompts: Sequence[str], blocked: Tensor | None = None) -> Mixed:
        """video [B,T,3,H,W] in [0,1], one prompt a clip, which clips are blocked [B] bool -> Mixed."""
        used = {term.scorer for term in self.terms}
        scores = {name: scorer(video, prompts) for name, scorer in self.scorers.items() if name in used}
        return mix({name: (self.scorers[name].dims, score) for name, score in scores.items()}, self.terms, blocked, self.blocked_reward)


def mix(
    scores: Mapping[str, tuple[tuple[str, ...], Scores]], terms: Sequence[Term], blocked: Tensor | None = None, blocked_reward: float = -4.0
) -> Mixed:
    """Scores [B,R] by scorer, with the names of their dimensions -> Mixed.

    Unknown stays unknown: nan in a term makes the sum nan. A blocked clip gets at most `blocked_reward`, also where its scores are unknown.
    """
    parts: dict[str, Tensor] = {}
    total: Tensor | None = None
    for term in terms:
        dims, score = scores[term.scorer]
        column = dims.index(term.dim)
        low = score.mean[:, column] - term.pessimism * score.spread[:, column]  # [B]
        parts[term.name] = (low - term.center) / term.scale
        weighted = term.weight * parts[term.name] if term.weight else torch.zeros_like(low)
        total = weighted if total is None else total + weighted
    assert total is not None
    unknown = ~torch.isfinite(total)
    reward = torch.where(unknown, total.new_tensor(torch.nan), total)
    if blocked is not None:
        reward = torch.where(blocked, torch.nan_to_num(reward, nan=blocked_reward).clamp(max=blocked_reward), reward)
    return Mixed(reward, parts, unknown)
