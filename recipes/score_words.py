"""Scores said in words behind a caption, so that a model learns what they look like and can be asked for them: "a red ball, motion 7 of 9" (score conditioning).

A score is said by its place among the kept clips, in tenths from 0 to 9, whatever its unit is: words stay few, and those at the ends are as common as those in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

TENTHS = 9
"""Largest of the places."""


def tenths(values: Sequence[float]) -> tuple[float, ...]:
    """The nine numbers between ten equally large parts of the finite ones, by `numpy.quantile`. Raises ValueError where there is none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        raise ValueError("no number to put in order")
    return tuple(float(edge) for edge in np.quantile(finite, np.arange(1, 10) / 10))


def place(value: float, edges: Sequence[float]) -> int:
    """How many of the edges lie below a number: 0 to 9. Where many clips say the same, all of them have one place."""
    return int(np.searchsorted(np.asarray(edges), value, side="left"))


def with_scores(text: str, scores: Mapping[str, float | None], edges: Mapping[str, Sequence[float]]) -> str:
    """The caption with the place of every score that is known behind it. edges: name -> `tenths`.

    Example: `with_scores("a red ball", {"motion": 0.3}, {"motion": (0.1,) * 5 + (0.5,) * 4})` is "a red ball, motion 5 of 9".
    """
    known = {name: value for name in edges if (value := scores.get(name)) is not None and np.isfinite(value)}
    return "".join([text, *(f", {name.replace('_', ' ')} {place(value, edges[name])} of {TENTHS}" for name, value in known.items())])
