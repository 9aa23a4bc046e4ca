"""Wan 2.2 A14B: two transformers, one for high noise and one for low, as the one network of a model; and a guidance scale for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """What Wan's transformer is, with every clip sent to the expert of its time: `transformer` from the boundary up to noise, `transformer_2` below, by diffusers' names.

    An adapter goes onto both, but a step whose clips all lie on one side leaves the other without a gradient.
    """

    _repeated_blocks = ("WanTransformerBlock",)
    _supports_gradient_checkpointing = True

    def __init__(self, transformer: Any, transformer_2: Any, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def enable_gradient_checkpointing(self, run: Callable[..., Tensor]) -> None:
        for expert in (self.transformer, self.transformer_2):
            expert.enable_gradient_checkpointing(run)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_image: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """timestep: [B], or one a token [B,n], where the noisiest token decides."""

        def said(expert: Any, rows: Tensor) -> Tensor:
            image = None if encoder_hidden_states_image is None else encoder_hidden_states_image[rows]
            found: Tensor = expert(hidden_states[rows], timestep[rows], encoder_hidden_states[rows], image, return_dict=False)[0]
            return found

        high = is_high(timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep, self.boundary)  # [B]
        parts = [(expert, rows.nonzero()[:, 0]) for expert, rows in ((self.transformer, high), (self.transformer_2, ~high)) if bool(rows.any())]
        order = torch.cat([rows for _, rows in parts]).argsort()
        return (torch.cat([said(expert, rows) for expert, rows in parts])[order],)  # [B,C,F,H,W]


@dataclass(frozen=True)
class TwoScales:
    """A scale for `Guided`: `high` from the boundary up to noise, `low` below; t [B] -> [B]."""

    boundary: float
    high: float
    low: float

    def __call__(self, t: Tensor) -> Tensor:
        return torch.where(is_high(1000 * t, self.boundary), self.high, self.low)


def is_high(timestep: Tensor, boundary: float) -> Tensor:
    """Whether 1000 t is at or above the boundary, which is a share of the path: the comparison of Wan's pipeline."""
    return timestep >= 1000 * boundary
