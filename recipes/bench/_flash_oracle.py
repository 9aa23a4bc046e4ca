"""Flashing by definition (WCAG 2.3.1, general and red flash thresholds), written without the filter: every pair of frames, in double precision, one waveform at a time.

A flash is a pair of opposing changes. A general change: at least 0.10 of relative luminance with the darker image below 0.80. A red one: R/(R+G+B) >= 0.8 before or
after it, and max(0, R-G-B) x 320 changes by at least 20. A change from frame i to frame j > i is on the screen from (i + 1) / fps to j / fps; a second is half-open.
A hazard: more than three flashes within one second, in the same second over at least a quarter of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Clip(NamedTuple):
    """Waveforms [T,3] in sRGB levels 0..255, each over a number of cells, and frames a second."""

    waveforms: tuple[NDArray[np.int64], ...]
    cells: tuple[int, ...]
    fps: float
    kind: str


def linear(level: NDArray[np.int64]) -> Array:
    x = level / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def general_changes(waveform: NDArray[np.int64], swing: float = 0.10, dark: float = 0.80) -> NDArray[np.bool_]:
    """[T,T]: whether the luminance rises from frame i (row) to frame j (column)."""
    y = linear(waveform) @ np.array([0.2126, 0.7152, 0.0722])
    return (y[None] - y[:, None] >= swing) & (y[:, None] < dark)


def red_changes(waveform: NDArray[np.int64], swing: float = 20 / 320) -> NDArray[np.bool_]:
    red, green, blue = linear(waveform).T
    whole = red + green + blue
    saturated = (red >= 0.8 * whole - 1e-12) & (whole > 0)
    redness = np.maximum(red - green - blue, 0)
    return (redness[None] - redness[:, None] >= swing) & (saturated[None] | saturated[:, None])


def changes_in_a_second(rises: NDArray[np.bool_], fps: float) -> NDArray[np.int64]:
    """[T]: the most opposing changes, one after the other, in the second that begins just after each frame."""
    frames = len(rises)
    last = math.ceil(Fraction(fps).limit_denominator(1001) + 1) - 1  # the largest j - i with (j - (i + 1)) / fps < 1
    up, down = np.zeros((frames, frames), np.int64), np.zeros((frames, frames), np.int64)  # [start,end]: the longest chain whose last change goes up (down)
    begun = np.tri(frames, dtype=bool).T  # start <= end
    for j in range(1, frames):
        before = begun[:, :j]
        up[:, j] = np.where(before & rises[:j, j], down[:, :j] + 1, 0).max(1)
        down[:, j] = np.where(before & rises[j, :j], up[:, :j] + 1, 0).max(1)
    both = np.maximum(up, down)
    return np.array([both[start, start : start + last + 1].max() for start in range(frames)])


def is_hazard(clip: Clip, *, swing: float = 1.0, dark: float = 0.80) -> bool:
    """swing: in units of the limits."""
    for rises in (lambda w: general_changes(w, 0.10 * swing, dark), lambda w: red_changes(w, 20 / 320 * swing)):
        flashing = np.stack([changes_in_a_second(rises(w), clip.fps) // 2 > 3 for w in clip.waveforms])  # [waveforms,T]
        if (4 * (np.array(clip.cells) @ flashing) >= sum(clip.cells)).any():
            return True
    return False


def grey(luminance: Sequence[float] | Array) -> NDArray[np.int64]:
    """The grey levels nearest to a relative luminance [T] -> [T,3]."""
    y = np.clip(np.asarray(luminance), 0, 1)
    x = np.where(y <= 0.0031308, 12.92 * y, 1.055 * y ** (1 / 2.4) - 0.055)
    return np.repeat(np.rint(255 * x).astype(np.int64)[:, None], 3, 1)


RATES = (8.0, 10.0, 12.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 48.0, 50.0, 59.94, 60.0)
CELLS = 64


def generate(rng: np.random.Generator) -> Clip:
    """A clip at or around one limit or several: rate of flashes, swing, dark end, area, saturation."""
    fps = float(rng.choice(RATES)) if rng.random() < 0.8 else float(np.round(rng.uniform(8, 60), 3))
    frames = int(fps * rng.uniform(1.0, 1.5)) + 2
    kind = str(rng.choice(["square", "ramp", "telegraph", "levels", "red", "red states"]))
    wave = {"square": _square, "ramp": _ramp, "telegraph": _telegraph, "levels": _levels, "red": _red, "red states": _red_states}[kind]
    first = int(rng.choice([15, 16, 17, 64, int(rng.integers(1, 64))]))
    if first < CELLS and rng.random() < 0.4:  # a second part flashes by its own clock
        second = min(CELLS - first, int(rng.choice([15 - first % 16, 16 - first % 16, 8])))
        waves, cells = [wave(rng, frames, fps), wave(rng, frames, fps)], [first, second]
    else:
        waves, cells = [wave(rng, frames, fps)], [first]
    rest = CELLS - sum(cells)
    return Clip((*waves, *([grey([0.3] * frames)] if rest else [])), (*cells, *([rest] if rest else [])), fps, kind)


def _ends(rng: np.random.Generator) -> tuple[float, float]:
    """Dark and bright ends at or around the limits."""
    low = float(rng.choice([rng.uniform(0, 0.7), 0.8 + rng.normal() * 0.01, 0.3]))
    return low, low + float(rng.choice([0.1, 0.1 + rng.normal() * 0.005, rng.uniform(0.05, 0.4)]))


def _phase(rng: np.random.Generator, frames: int, fps: float) -> Array:
    rate = float(rng.choice([3, 3.5, 4, rng.uniform(2.5, 5)]))
    return np.asarray(rate * np.arange(frames) / fps + float(rng.choice([0, rng.random()])) + 1e-9, np.float64)


def _square(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    low, high = _ends(rng)
    return grey(np.where(_phase(rng, frames, fps) % 1 < 0.5, low, high))


def _ramp(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    low, high = _ends(rng)
    return grey(low + (high - low) * np.abs(2 * (_phase(rng, frames, fps) % 1) - 1) + rng.normal(size=frames) * float(rng.choice([0, 0.005])))


def _telegraph(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    low, high = _ends(rng)
    return grey(np.where(np.cumsum(rng.random(frames) < rng.uniform(6, 11) / fps) % 2, low, high))


def _levels(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    levels = rng.uniform(0, 1, rng.integers(2, 6))
    return grey(np.repeat(rng.choice(levels, frames), max(1, round(fps / 12)))[:frames])


def _colour(red: float, share: float) -> NDArray[np.int64]:
    """R and R/(R+G+B) in linear light -> sRGB levels [3]."""
    others = red * (1 / share - 1) / 2
    return np.array([grey([x])[0, 0] for x in (red, others, others)])


def _red(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    """Red against a grey of the same luminance."""
    red, share = float(rng.uniform(0.05, 0.6)), float(rng.choice([0.8, 0.8 + rng.normal() * 0.01, 1.0]))
    colour = _colour(red, share)
    other = grey([float(linear(colour) @ np.array([0.2126, 0.7152, 0.0722]))])[0]
    return np.where((_phase(rng, frames, fps) % 1 < 0.5)[:, None], colour, other)


def _red_states(rng: np.random.Generator, frames: int, fps: float) -> NDArray[np.int64]:
    """Reds of several strengths, saturated and hardly not."""
    states = np.stack([_colour(float(rng.uniform(0.02, 0.35)), float(np.clip(0.8 + rng.normal() * 0.05, 0.5, 1))) for _ in range(rng.integers(2, 6))])
    return states[np.repeat(rng.integers(0, len(states), frames), max(1, round(fps / rng.uniform(8, 14))))[:frames]]
