"""Clip filters that need no weights: photosensitive flashing, and clips that are broken.

Flashing, after WCAG 2.3.1 (general flash and red flash thresholds), for clips of any rate and length.
  A transition is a swing of a cell's relative luminance by at least 0.10 whose darker end is below 0.80; or of its redness, max(0, R - G - B) of linear
  values, by at least 20/320 with one end a saturated red, R/(R+G+B) >= 0.8. It may take several frames. Two opposing transitions are one flash.
  A clip is a hazard if within any second more than three flashes happen in each of at least 25 % of the cells. Swings are told apart to 0.0001.
  Cells are pixels; large frames are averaged down to 48 cells a side, which leaves patterns finer than that out, as the guideline does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base_model.video.flashes import AREA, CELLS_A_SIDE, DARKER_BELOW, NO_END, RED_UNITS, SWING, UNITS, Signal, Swings, light_signals, transitions
from base_model.video.signals import grid
from reward.safety.contract import VERDICT_OF, Reason, Ruling, Verdict
from reward.safety.policy import Policy

FAINTEST = 50  # swings below 0.005 are taken for none
FLASHES = 3  # allowed in a second
CHANGES = 2 * (FLASHES + 1)  # of a hazard
CELLS_AT_ONCE = 1 << 14
FRAMES_AT_ONCE = 64
LUMA = (0.299, 0.587, 0.114)
DEGENERATE = (0.01, 0.7, math.inf, 0.0)  # limits of version 1


class Light(NamedTuple):
    """What flashes, whole numbers [T,B,P]: luminance, or redness with whether it is that of a saturated red."""

    signal: Signal
    saturated: NDArray[np.bool_] | None


class FlashRisk(NamedTuple):
    """How near B clips come to a hazard: the largest swing at which each would still be one, in relative luminance and in redness (0 below 0.005), and the
    second in which it is one at the limits, from `start` to `end` (nan where there is none). All [B]."""

    luminance: NDArray[np.float64]
    red: NDArray[np.float64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]


class FlashFilter:
    """P17. score = a / (a + limit) with a the largest swing at which the clip would still be a hazard: 0.5 at the limit, 0.02 where nothing flashes, 0.75 at
    a swing of 0.3 and 0.89 at 0.8, so that the clips of a prompt that always flashes can be told apart. A margin, not a probability."""

    id = "flash"
    version = "2"
    threshold = 0.5
    policies = ("P17",)

    def __init__(self, policy: Policy) -> None:
        self._hit = VERDICT_OF[policy.action("P17")]

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip."""
        risk = flash_risk(video, fps)
        return [[self._rule(*row)] for row in zip(*(column.tolist() for column in risk), strict=True)]

    def _rule(self, luminance: float, red: float, start: float, end: float) -> Ruling:
        relative = max(luminance * UNITS, red * RED_UNITS, FAINTEST / 2) / SWING
        score = relative / (1 + relative)
        if score < self.threshold:
            return Ruling(Verdict.ALLOW, "P17", score, (), self.id, self.version, self.threshold)
        kind, swing = ("red", red) if red * RED_UNITS > luminance * UNITS else ("general", luminance)
        text = f"more than {FLASHES} {kind} flashes in a second over {AREA:.0%} of the frame or more, swing {swing:.2f}"
        return Ruling(self._hit, "P17", score, (Reason(text, start, end),), self.id, self.version, self.threshold)


def flash_risk(video: Tensor, fps: float, *, steps: int = 8) -> FlashRisk:
    """Measures B clips [B,T,3,H,W] at `fps`. The limits are decided exactly, away from them the swing is bisected `steps` times (8: within 1 %).

    A clip too short or too slow for four flashes has risk 0. Raises ValueError for pixels that are not finite.
    """
    _require_finite(video)
    clips = max(1, CELLS_AT_ONCE // min(video.shape[-1] * video.shape[-2], CELLS_A_SIDE**2))
    parts = [_measure(part, fps, steps) for part in video.detach().cpu().float().split(clips)]
    return FlashRisk(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _measure(video: Tensor, fps: float, steps: int) -> FlashRisk:
    luminance, redness, saturated = (np.concatenate(column) for column in zip(*map(light_signals, video.split(FRAMES_AT_ONCE, dim=1)), strict=True))  # 3 x [T,B,P]
    size = min(_window(fps), len(luminance) - 1)
    general, general_window = _largest_swing(Light(luminance, None), size, steps)
    red, red_window = _largest_swing(Light(redness, saturated), size, steps)
    window = np.where(red > general, red_window, general_window).astype(np.float64)  # [B]
    window[window < 0] = math.nan
    return FlashRisk(general / UNITS, red / RED_UNITS, window / fps, (window + size) / fps)


def _window(fps: float) -> int:
    """The most frame changes that fit into one second."""
    return max(1, math.ceil(fps - 1e-6))


def _largest_swing(light: Light, size: int, steps: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(The largest swing at which each clip is a hazard, 0 where none is; its first hazardous window at SWING, -1 where none is), [B] each."""
    count = light.signal.shape[1]
    best, first = np.zeros(count), np.full(count, -1)
    near = _candidates(light) if size >= CHANGES else np.zeros(0, np.int64)
    near = near[_hazard(light, near, np.full(len(near), FAINTEST), size) >= 0]  # [b]
    if len(near) == 0:
        return best, first
    first[near] = _hazard(light, near, np.full(len(near), SWING), size)
    above = first[near] >= 0
    low, high = np.where(above, SWING, FAINTEST), np.where(above, RED_UNITS, SWING)
    for _ in range(steps):
        middle = np.sqrt(low * high).astype(np.int64)
        hit = _hazard(light, near, middle, size) >= 0
        low, high = np.where(hit, middle, low), np.where(hit, high, middle)
    best[near] = low
    return best, first


def _candidates(light: Light) -> NDArray[np.int64]:
    """The clips in which enough cells change at all: a cheap bound, which drops most clips before their swings are counted [b]."""
    changes = light.signal.max(0) - light.signal.min(0) >= FAINTEST  # [B,P]
    if light.saturated is not None:
        changes &= light.saturated.any(0)
    return np.flatnonzero(changes.sum(1) >= AREA * changes.shape[1] - 1e-6)


def _hazard(light: Light, rows: NDArray[np.int64], swing: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """For the clips `rows`: the first window of `size` frame changes in which at least AREA of the cells make more than FLASHES flashes of `swing`, -1 where
    there is none, [b] each."""
    limit = swing.astype(np.int16)[:, None]  # [b,1]
    signal, saturated = light.signal[:, rows], None if light.saturated is None else light.saturated[:, rows]  # [T,b,P]
    first = np.full(len(rows), -1)
    for begin, end in _chunks(len(signal) - size, max(1, CELLS_AT_ONCE // max(1, signal[0].size))):
        part = slice(begin, end + size)
        hit = _flashes(signal[part], size, limit) if saturated is None else _flashes_red(signal[part], saturated[part], size, limit)  # [windows,b]
        first = np.where((first < 0) & hit.any(0), begin + hit.argmax(0), first)
    return first


def _enough(cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[...,P] -> [...]"""
    return cells.sum(-1) >= AREA * cells.shape[-1] - 1e-6


def _flashes(luminance: Signal, size: int, limit: Signal) -> NDArray[np.bool_]:
    """[size + windows,b,P] -> [windows,b]. Clipped one below DARKER_BELOW + limit, luminance has no swing left whose darker end is not below DARKER_BELOW."""
    clipped = np.minimum(luminance, DARKER_BELOW + limit - 1)
    return _enough(transitions(Swings(clipped, clipped), size, limit) >= CHANGES)


def _flashes_red(redness: Signal, saturated: NDArray[np.bool_], size: int, limit: Signal) -> NDArray[np.bool_]:
    """[size + windows,b,P] -> [windows,b]. Most red flashes have all their bright ends, or all their dark ones, saturated; where it matters the others are followed too."""
    possible = transitions(Swings(redness, redness), size, limit) >= CHANGES  # [windows,b,P]
    if not _enough(possible).any():
        return _enough(possible)
    from_red = Swings(np.where(saturated, redness, np.int16(-NO_END // 2)), redness)
    into_red = Swings(redness, np.where(saturated, redness, np.int16(NO_END)))
    flashing = (transitions(from_red, size, limit) >= CHANGES) | (transitions(into_red, size, limit) >= CHANGES)  # [windows,b,P]
    open_ = _enough(possible) & ~_enough(flashing)  # [windows,b]
    window, clip, cell = np.nonzero(possible & ~flashing & open_[:, :, None])  # [E] each
    if len(window):
        frames = window + np.arange(size + 1)[:, None]  # [size + 1,E]
        flashing[window, clip, cell] = _changes_of_either_end(redness[frames, clip, cell], saturated[frames, clip, cell], limit[clip, 0]) >= CHANGES
    return _enough(flashing)


def _changes_of_either_end(redness: Signal, saturated: NDArray[np.bool_], limit: Signal) -> NDArray[np.int64]:
    """[size + 1,E] -> the most opposing swings, up to CHANGES, each of which has a saturated red at one end or the other [E].

    For every number of swings so far, the lowest redness that the last of them fell to and the highest it rose to, of saturated frames and of any.
    """
    shape = CHANGES + 1, redness.shape[1]
    lowest, lowest_red = np.full(shape, NO_END, np.int16), np.full(shape, NO_END, np.int16)
    highest, highest_red = np.full(shape, -NO_END // 2, np.int16), np.full(shape, -NO_END // 2, np.int16)
    for x, is_red in zip(redness, saturated, strict=True):
        rises = np.roll(x - np.where(is_red, lowest, lowest_red) >= limit, 1, axis=0)
        falls = np.roll(np.where(is_red, highest, highest_red) - x >= limit, 1, axis=0)
        rises[0] = falls[0] = True
        np.maximum(highest, x, out=highest, where=rises)
        np.maximum(highest_red, x, out=highest_red, where=rises & is_red)
        np.minimum(lowest, x, out=lowest, where=falls)
        np.minimum(lowest_red, x, out=lowest_red, where=falls & is_red)
    reached = (highest > -NO_END // 2) | (lowest < NO_END)  # [CHANGES + 1,E]
    return CHANGES - reached[::-1].argmax(0)


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + size, count)) for begin in range(0, count, size))


class DegenerateFilter:
    """Q01: clips with nothing in them, the cheapest way past every other filter. Black and blank frames have no spread; noise has no neighbours alike.

    A frame is blank if its colours spread by less than `blank_below`; it is noise if the squared difference of neighbours is at least `noise_above` of what
    independent pixels would have (1.0; a frame of a real clip stays well below 0.5). A clip is broken if half of its frames are. A frozen clip with something in it is not,
    unless `frozen` says so; one with a grid over it is not, unless the peak of its spectrum (`grid` of `base_model/video/signals.py`) reaches `grid_above` in half of its frames.
    The version names limits other than these.
    """

    id = "degenerate"
    threshold = 0.5
    policies = ("Q01",)

    def __init__(self, policy: Policy, *, blank_below: float = 0.01, noise_above: float = 0.7, grid_above: float = math.inf, frozen: bool = False) -> None:
        self._hit = VERDICT_OF[policy.action("Q01")]
        self._blank, self._noise, self._grid, self._frozen = blank_below, noise_above, grid_above, frozen
        chosen = tuple(map(float, (blank_below, noise_above, grid_above, frozen)))
        self.version = "1" if chosen == DEGENERATE else f"1+{hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]}"

    @torch.no_grad()
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip."""
        _require_finite(video)
        spread, roughness = frame_texture(video)  # [B,T] each
        brightness = video.mean((1, 2, 3, 4))  # [B]
        blank = torch.sigmoid(4 * (self._blank - _half_at_most(spread)) / self._blank)  # [B]
        noise = torch.sigmoid(20 * (-_half_at_most(-roughness) - self._noise))  # [B]
        frozen = (video[:, 1:] - video[:, :-1]).abs_().flatten(1).amax(1) < 1 / 255 if video.shape[1] > 1 else torch.zeros(len(video), dtype=torch.bool)
        grids = [half_of_grid(clip) if math.isfinite(self._grid) else 0.0 for clip in video]
        return [self._check(*row) for row in zip(blank.tolist(), noise.tolist(), grids, brightness.tolist(), frozen.tolist(), strict=True)]

    def _check(self, blank: float, noise: float, grids: float, brightness: float, frozen: bool) -> list[Ruling]:
        scores = {
            "black" if brightness < 0.05 else "blank": blank,
            "frozen noise" if frozen else "noise": noise,
            "under a grid": grids / (grids + self._grid),
            "frozen": float(frozen and self._frozen),
        }
        what, score = max(scores.items(), key=lambda item: item[1])
        if score < self.threshold:
            return [Ruling(Verdict.ALLOW, "Q01", score, (), self.id, self.version, self.threshold)]
        return [Ruling(self._hit, "Q01", score, (Reason(f"the clip is {what}"),), self.id, self.version, self.threshold)]


def half_of_grid(video: Tensor) -> float:
    """[T,3,H,W] -> the peak of a grid that half of the frames reach. Raises ValueError where frames are too small to tell: who asks is not answered with "none"."""
    luma = (torch.einsum("tchw,c->thw", video.float(), torch.tensor(LUMA, device=video.device)) * 255).round_().to(torch.uint8).cpu().numpy()
    peaks = [grid(frame) for frame in luma]
    if any(map(math.isnan, peaks)):
        raise ValueError(f"frames of {video.shape[-2]}x{video.shape[-1]} are too small to look for a grid")
    return float(np.median(peaks))


def frame_texture(video: Tensor) -> tuple[Tensor, Tensor]:
    """[B,T,3,H,W] -> (standard deviation over the frame, root mean square over the colours; roughness) [B,T] each.

    Roughness: mean squared difference of horizontal and vertical neighbours over twice the variance; 1 for independent pixels, near 0 for smooth frames, 0 for blank ones.
    """
    parts = [_texture(part) for part in video.float().split(8)]  # a few clips at a time stay in the cache
    return torch.cat([spread for spread, _ in parts]), torch.cat([rough for _, rough in parts])


def _texture(video: Tensor) -> tuple[Tensor, Tensor]:
    pixels = video.flatten(3)  # [B,T,3,H*W]
    variance = (pixels.square().mean(3) - pixels.mean(3).square()).clamp(min=0).mean(2)  # [B,T]
    differences = [video.diff(dim=dim).square_().mean((2, 3, 4)) for dim in (3, 4) if video.shape[dim] > 1]
    rough = torch.stack(differences).mean(0) if differences else torch.zeros_like(variance)  # [B,T]
    return variance.sqrt(), torch.where(variance > 1e-4, rough / (2 * variance).clamp(min=1e-8), 0)


def _require_finite(video: Tensor) -> None:
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the clips hold nan or infinite pixels")


def _half_at_most(x: Tensor) -> Tensor:
    """[B,T] -> the smallest value that half of the frames do not exceed [B]."""
    return x.sort(1).values[:, (x.shape[1] - 1) // 2]
