"""Classifier-free guidance: a model that is told its prompt more loudly than it was trained to hear it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from base_model.paths import Path, like
from base_model.types import Conditioning, LatentSpec, VideoModel


@dataclass(frozen=True)
class Guided:
    """`model` under guidance: u = u_empty + scale (u_prompt - u_empty), Ho & Salimans 2022 (arXiv 2207.12598), eq. 6 with scale = 1 + w. Itself a `VideoModel`.

    Two passes of the network a step; one where scale is 1, which is `model` itself. The model must have been trained with some captions dropped.
    scale: a number, or a function of t [B] -> [B] where a model wants another one at other times.
    train_empty: whether a gradient goes through the pass without prompt too. The velocity is the same, so what was sampled is replayed either way.
    joined: whether both passes are one of 2 B rows, which suits small batches. Where only one of them has a gradient, they stay two.
    """

    model: VideoModel
    scale: float | Callable[[Tensor], Tensor]
    train_empty: bool = True
    joined: bool = False

    @cached_property
    def unprompted(self) -> Conditioning:
        """The empty prompt, encoded once; 1."""
        return self.model.encode_text([""])

    @property
    def path(self) -> Path:
        return self.model.path

    @property
    def latents(self) -> LatentSpec:
        return self.model.latents

    @property
    def network(self) -> nn.Module:
        return self.model.network

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> u [B,C,F,H,W]."""
        if self.scale == 1:
            return self.model(x_t, t, cond)
        scale = like(self.scale(t.expand(len(x_t))), x_t) if callable(self.scale) else self.scale
        unprompted = replace(self.unprompted.repeat(len(cond)), known=cond.known, image=cond.image)  # B: a visual prompt holds in both passes
        if self.joined and self.train_empty:
            u, empty = self.model(torch.cat([x_t, x_t]), t.expand(len(x_t)).repeat(2), cond.followed_by(unprompted)).chunk(2)  # [B,C,F,H,W] each
            return empty + scale * (u - empty)
        u = self.model(x_t, t, cond)  # [B,C,F,H,W]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_empty):
            empty = self.model(x_t, t, unprompted)  # [B,C,F,H,W]
        return empty + scale * (u - empty)

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        return self.model.encode_text(prompts)

    def encode(self, video: Tensor) -> Tensor:
        return self.model.encode(video)

    def decode(self, x0: Tensor) -> Tensor:
        return self.model.decode(x0)
