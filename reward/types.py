"""What a scorer is: a callable that says, per clip and reward dimension, how good it is and how sure it is of that.

Letters: B clips, T frames, R reward dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Scores(NamedTuple):
    """Scores of B clips in R dimensions; nan where a clip could not be scored (never 0)."""

    mean: Tensor  # [B, R] float32
    spread: Tensor  # [B, R] float32, >= 0: one standard deviation of the scorer's own doubt


class Scorer(Protocol):
    """Anything that scores clips: a trained reward model, a weight-free signal, a foreign judge."""

    @property
    def dims(self) -> tuple[str, ...]:
        """The R names of the reward dimensions."""
        ...

    @property
    def differentiable(self) -> bool:
        """Whether the gradient of a score with respect to the pixels may be used."""
        ...

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        """video [B,T,3,H,W] in [0,1] and one prompt a clip -> scores [B,R]."""
        ...
