"""Flashing light in a clip, as WCAG 2.3.1 counts it: what of a frame can flash, opposing swings of it, and the most flashes in any second.

A transition is a swing of a cell's relative luminance by at least 0.10 whose darker end is below 0.80; or of its redness, max(0, R - G - B) of linear values, by at least
20/320 with one end a saturated red, R/(R+G+B) >= 0.8. It may take several frames. Two opposing transitions are one flash. What is a hazard is decided in
`reward/safety/video.py`, by the same swings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.video.signals import averages

UNITS = 10_000  # luminance 1.0; signals are whole numbers, so that a swing of exactly the limit is one
SWING = 1_000  # 0.10 of relative luminance
DARKER_BELOW = 8_000
RED_UNITS = 16_000  # redness 1.0, in units in which 20/320 is SWING
NO_END = 32_000  # above every signal of a frame
FAR = 1 << 30  # above every sum of changes: those of KEPT_FRAMES are below 2^23
AREA = 0.25
CELLS_A_SIDE = 48
LEVELS = 16 * 255  # finer than the levels of a file, and holding each of them exactly
DARK_END = DARKER_BELOW + SWING - 1  # clipped there, luminance has no swing left whose darker end is not below DARKER_BELOW
ALIKE, TOGETHER = 0.5, 0.5  # of the mean change of a quarter; share of its cells that change so much
KEPT_SECONDS = 2.0
KEPT_FRAMES = 512
SAME_TIME = 2e-3  # seconds by which containers round

Signal = NDArray[np.int16 | np.int32]  # of a frame, or what its changes add up to
Cells = NDArray[np.float32]


class Swings(NamedTuple):
    """Where swings may end, whole numbers [T,B,P]: `top` a bright end, `bottom` a dark one. The same signal but for frames that may not be such an end,
    which stand below every signal in `top` and above every one in `bottom`."""

    top: Signal
    bottom: Signal


@cache
def _linear_light() -> NDArray[np.float32]:
    """sRGB level 0..LEVELS -> linear light in [0, 1]."""
    x = np.arange(LEVELS + 1) / LEVELS
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)


def light_signals(video: Tensor) -> tuple[Signal, Signal, NDArray[np.bool_]]:
    """[B,T,3,H,W] -> luminance, redness (whole numbers) and whether the cell is a saturated red, [T,B,P] each."""
    levels = (video.transpose(0, 1) * LEVELS + 0.5).clamp_(0, LEVELS).to(torch.int16)  # [T,B,3,H,W]
    return _signals(torch.from_numpy(_linear_light()[levels.numpy()]))  # [T,B,3,H,W]


def _signals(linear: Tensor) -> tuple[Signal, Signal, NDArray[np.bool_]]:
    """The same of linear light [T,B,3,H,W]."""
    height, width = linear.shape[-2:]
    if max(height, width) > CELLS_A_SIDE:
        cells = min(height, CELLS_A_SIDE), min(width, CELLS_A_SIDE)
        linear = F.adaptive_avg_pool2d(linear.flatten(0, 1), cells).unflatten(0, linear.shape[:2])  # [T,B,3,h,w]
    red, green, blue = linear.flatten(3).unbind(2)  # 3 x [T,B,P]
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue  # [T,B,P]
    others = green + blue  # [T,B,P]
    redness = (red - others).clamp_(min=0)  # [T,B,P]
    return _whole(luminance * UNITS), _whole(redness * RED_UNITS), ((red >= 4 * others) & (red > 0)).numpy()


def _whole(x: Tensor) -> Signal:
    return x.round_().to(torch.int16).numpy()


def transitions(swings: Swings, size: int, limit: Signal) -> NDArray[np.uint8]:
    """Swings [size + windows,B,P] -> the most opposing swings of at least `limit` in every window of `size` changes [windows,B,P].

    y follows the signal with a slack of limit - 1 below it, so it turns exactly when the signal has come back by `limit` from its last extreme. What the first swing
    is measured from is open, so both are counted: a first swing down (y starts at its lowest) and a first swing up (y starts at the signal).
    """
    windows = len(swings.top) - size
    lowest, highest = swings.top - (limit - 1), swings.bottom  # [size + windows,B,P]
    counts = []
    for y, rising in ((lowest[:windows], True), (highest[:windows], False)):
        up = np.full(y.shape, rising)
        count = np.zeros(y.shape, np.uint8)
        for i in range(1, size + 1):
            follow = np.maximum(y, lowest[i : i + windows])
            np.minimum(follow, highest[i : i + windows], out=follow)
            turned = (follow > y) | (up > (follow < y))
            count += turned != up
            y, up = follow, turned
        counts.append(count)
    return np.maximum(*counts)


class FlashCounter:
    """Frames one after another -> the most whole flashes in any second of the mean light of a quarter of the frame.

    A step counts where half of the quarter changes alike: textures that move do not flash, nor does a row of bright windows that passes by, which swings the mean as much but
    lights one part of the quarter after another. It keeps two seconds of numbers. A red flash counts where all its bright ends, or all its dark ones, are saturated.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._steps: list[_Step] = []  # to every frame that is kept
        self._before: Cells | None = None
        self._most = 0

    def add(self, frame: NDArray[np.uint8], time: float) -> None:
        """A frame uint8 [H,W,3] that is shown at `time` in seconds. Times rise."""
        linear = _averaged(_linear_light()[::16][frame].transpose(2, 0, 1))  # [3,CELLS_A_SIDE,CELLS_A_SIDE]
        luminance, redness, saturated = _signals(torch.from_numpy(linear)[None, None])
        cells = np.stack([np.minimum(luminance, DARK_END), redness]).reshape(2, -1)[:, _quarters()].astype(np.float32)  # [2,9,cells]
        still = np.zeros((2, 9), np.float32)
        self._steps.append(_Step(still if self._before is None else alike(cells - self._before), saturated.ravel()[_quarters()].mean(1) >= 0.5))
        self._times.append(time)
        self._before = cells
        if time - self._times[0] >= KEPT_SECONDS or len(self._times) >= KEPT_FRAMES:
            kept = self._count()
            del self._times[:-kept], self._steps[:-kept]

    def flashes(self) -> float:
        """Of all frames so far."""
        self._count()
        return float(self._most // 2)

    def _count(self) -> int:
        """Counts the swings in every second that begins in what is kept; returns how many frames of it later seconds need."""
        changes = np.searchsorted(self._times, np.asarray(self._times) + 1 - SAME_TIME) - np.arange(len(self._times))  # that fit into a second, from each frame on
        size = min(int(changes.max(initial=1)), len(self._times) - 1)
        if size >= 2:
            steps, saturated = (np.stack(column) for column in zip(*self._steps, strict=True))  # [T,2,9], [T,9]
            luminance, redness = _followed(steps)  # 2 x [T,1,9]
            self._most = max(self._most, _most_swings(luminance, lambda signal: [Swings(signal, signal)], size))
            if saturated.any():
                self._most = max(self._most, _most_swings(redness, lambda signal: _red(signal, saturated[:, None]), size))
        return max(1, size)


class _Step(NamedTuple):
    """What a frame changes in each of nine quarters."""

    change: Cells  # [2,9] of luminance and of redness, whole numbers as far as it is alike
    saturated: NDArray[np.bool_]  # [9] whether half of the quarter is a saturated red now


def alike(change: Cells) -> Cells:
    """Changes of cells [...,P] -> their mean [...] where half of them or more go its way, at least half as far; else 0."""
    mean = change.mean(-1, keepdims=True)
    with_it = (change * np.sign(mean) >= ALIKE * np.abs(mean)).mean(-1)
    return np.where(with_it >= TOGETHER, mean[..., 0], 0)


def _followed(steps: Cells) -> tuple[Signal, Signal]:
    """Steps [T,2,9] -> the signals that take them [T,1,9]; only their swings mean anything. Steps that are not alike are left out, so these wander far from any luminance."""
    luminance, redness = np.rint(np.cumsum(steps, 0)).astype(np.int32).transpose(1, 0, 2)[:, :, None]
    return luminance, redness


@cache
def _quarters() -> NDArray[np.int64]:
    """Cells of the nine quarters of half a side that begin at a multiple of a fourth [9,P]."""
    cells, part = np.arange(CELLS_A_SIDE**2).reshape(CELLS_A_SIDE, CELLS_A_SIDE), CELLS_A_SIDE // 4
    return np.stack([cells[part * row : part * (row + 2), part * column : part * (column + 2)].ravel() for row in range(3) for column in range(3)])


def _averaged(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """[C,H,W] -> [C,CELLS_A_SIDE,CELLS_A_SIDE]; the pixels of small frames are repeated."""
    height, width = planes.shape[1:]
    return np.ascontiguousarray(averages(height, CELLS_A_SIDE) @ planes @ averages(width, CELLS_A_SIDE).T)


def _red(redness: Signal, saturated: NDArray[np.bool_]) -> list[Swings]:
    """Most red flashes have all their bright ends, or all their dark ones, saturated."""
    return [
        Swings(np.where(saturated, redness, np.int32(-FAR)), redness),
        Swings(redness, np.where(saturated, redness, np.int32(FAR))),
    ]


def _most_swings(signal: Signal, swings: Callable[[Signal], list[Swings]], size: int) -> int:
    """Signal [T,1,P] -> the most opposing swings that one of P makes in any `size` changes."""
    if int((signal.max(0) - signal.min(0)).max()) < SWING:
        return 0
    return max(int(transitions(each, size, np.full((1, 1), SWING, np.int16)).max()) for each in swings(signal))
