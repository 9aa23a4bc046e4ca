"""Captioned clips in memory as `recipes/examples.py: Examples`: what benchmarks and tests learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from base_model.types import Conditioning
from recipes.examples import Shape


@dataclass(frozen=True)
class InMemory:
    """N captioned clips; their captions are encoded already."""

    clips: Sequence[Tensor]  # N latents [C,F,H,W]
    conds: Conditioning  # N + 1, the empty prompt last
    sources: Sequence[str]  # N

    @property
    def texts(self) -> Sequence[str]:
        return self.conds.prompts[:-1]

    @property
    def shapes(self) -> Sequence[Shape]:
        return [(c, f, h, w) for c, f, h, w in (clip.shape for clip in self.clips)]

    def __len__(self) -> int:
        return len(self.clips)

    def latent(self, row: int) -> Tensor:
        return self.clips[row]

    def cond(self, row: int | None) -> Conditioning:
        place = len(self) if row is None else row
        return self.conds[place : place + 1]

    def video(self, row: int) -> Tensor:
        raise ValueError("these clips are latents alone: nothing that needs pixels is measured on them")
