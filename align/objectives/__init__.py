"""Objectives: pure functions from tensors to a `Loss`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """A value to minimise and what to log about it."""

    value: Tensor  # []
    stats: dict[str, Tensor]  # detached scalars

    def plus(self, name: str, term: Tensor) -> Loss:
        """Add a term [] to the value and log it under its name. Raises ValueError where the name is taken."""
        if name in self.stats:
            raise ValueError(f"the loss already has a statistic named {name!r}")
        return Loss(self.value + term, {**self.stats, name: term.detach()})


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of x [B] over the valid clips -> []; 0 (still with a graph) where none is valid. Values that are not valid may be nan."""
    if valid is None:
        return x.mean()
    return x.where(valid, x.new_zeros(())).sum() / valid.sum().clamp_min(1)
