"""What a scorer is: a callable that says, per clip and reward dimension, how good it is and how sure it is of that.

Letters: B clips, T frames, R reward dimensions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


def same_rate(one: float, other: float) -> bool:
    """Whether two frame rates are one: 24, 24000/1001 and 23.976 are; nobody sees a thousandth."""
    return math.isclose(one, other, rel_tol=2e-3)


def one_rate(rates: Iterable[float]) -> float | None:
    """The rate of clips that have one, as most of them give it; None where there are several, or none."""
    found = Counter(rates)
    return found.most_common(1)[0][0] if found and same_rate(min(found), max(found)) else None


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
