"""What can be measured of a clip before it becomes training data: numbers for a table, hashes and small pictures, in one pass over its frames.

Nothing here decides: thresholds are applied to the table. `SENSIBLE` proposes some.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from base_model.errors import UserError
from base_model.video.files import Frame
from base_model.video.flashes import SAME_TIME, FlashCounter
from base_model.video.hashes import SAMPLES_A_SECOND, look
from base_model.video.shots import CutFinder, DissolveFinder
from base_model.video.signals import camera_flow, flow_between, flow_finder, grid, luma_flicker, noise, to_luma

Plane = NDArray[np.uint8]  # [H,W]

WORK_SIDE = 128  # short side of the frames that most is measured on
WORK_LONG_SIDE = 512
THUMBNAIL_SIDE = 160
THUMBNAILS = 8  # kept on the way, for three
CLOSE_LOOKS = 2.0  # a second, at full size
LONGEST_STEP = 10.0  # seconds: where a file says more, its clock is wrong
CELLS = 16  # a side: what changes is looked for in each
STILL = 3.5  # of 255: mean change of a cell that cannot be told from that of a codec
STILL_SECONDS = 0.5  # and longer in which nothing changes more stand still
BLACK = 20  # of 255
BLACK_PIXELS = 0.98  # of a frame
REPEAT_STEPS = 3  # on either side
REPEAT = 0.15  # of what the steps around it change
SHADOW, LIGHT = 4, 251  # of 255
DETAILS = ("sharpness", "crushed_share", "blown_share", "contrast", "noise", "blockiness")
BORDER_LOOKS = 32  # frames in which borders are looked for
BORDER_SIDE = 256
EVEN = 6  # of 255: how far a border may be from its level
EVEN_SHARE = 0.98  # of a row's pixels that are near its level
EDGE_SHARE = 0.7  # of a row right behind the border that differs from it, where the picture reaches both sides of the frame
EDGE_SHARE_INSIDE = 0.95  # where there are borders on all sides: words on a card have these too


class Measure(NamedTuple):
    """What a number says."""

    unit: str
    what: str


class Measured(NamedTuple):
    """All that is kept of a clip."""

    scores: dict[str, float]  # by the names of MEASURES; nan where the clip cannot tell (one frame has no motion)
    hashes: tuple[str, ...]  # over time (`base_model/video/hashes.py`)
    thumbnails: tuple[Frame, ...]  # at most three small frames uint8 [h,w,3], longest side 160


VERSION = 3
"""Of the numbers and the hashes below: raised whenever the same clip gets others, so that tables of before are measured again."""
MEASURES: dict[str, Measure] = {
    "frames": Measure("frames", "frames that were decoded"),
    "seconds": Measure("s", "from the first frame until the last one has been shown as long as the usual one"),
    "fps": Measure("frames/s", "one over the usual time from a frame to the next"),
    "fps_irregularity": Measure("of a step", "how far steps are from the usual one, mean: 0 is an even rate"),
    "cuts": Measure("cuts", "hard cuts: one scene ends and another begins from a frame to the next"),
    "dissolves": Measure("transitions", "gradual transitions: one picture fades into another, or into black"),
    "longest_shot": Measure("s", "longest stretch without a cut or a transition"),
    "motion": Measure("diagonals/s", "mean speed of the flow; cuts are left out"),
    "camera_motion": Measure("diagonals/s", "mean speed of the flow that one similarity transform of the frame explains"),
    "object_motion": Measure("diagonals/s", "mean speed of the flow that the camera does not explain"),
    "flicker": Measure("of 255", "standard deviation of the frames' mean luma around its running mean of five frames, within shots"),
    "flashes": Measure("flashes/s", "most general or red flashes (WCAG 2.3.1) in any second, of a quarter of the frame"),
    "sharpness": Measure("of 255, squared", "variance of the Laplacian of luma, at full size"),
    "brightness": Measure("of 1", "mean luma"),
    "crushed_share": Measure("of pixels", "pixels of luma 4 and below of 255: no detail left in the shadows"),
    "blown_share": Measure("of pixels", "pixels of luma 251 and above of 255: no detail left in the lights"),
    "contrast": Measure("of 1", "standard deviation of luma within a frame, mean over frames"),
    "letterbox": Measure("of the frame", "borders of one even colour that stay through the whole clip, and end in a straight edge"),
    "static_share": Measure("of the time", "stretches of half a second and longer in which nothing changes"),
    "longest_still": Measure("s", "longest stretch in which nothing changes"),
    "repeated_share": Measure("of steps", "frames that are the one before again between others that move: a clip that was slowed or converted by repeating frames"),
    "black_share": Measure("of frames", "frames whose 98th percentile of luma is below 20 of 255"),
    "noise": Measure("of 255", "median absolute diagonal Haar detail over 0.6745, at full size"),
    "blockiness": Measure("times", "strongest of the periods 4, 8, 16 and 32 in the spectrum of the gradient, against its neighbours, at full size: 1 is none"),
}

SENSIBLE: dict[str, tuple[float | None, float | None]] = {
    "cuts": (None, 0.0),
    "dissolves": (None, 0.0),
    "flashes": (None, 3.0),
    "letterbox": (None, 0.02),
    "static_share": (None, 0.4),
    "repeated_share": (None, 0.25),
    "black_share": (None, 0.1),
}
"""Least and most of a measure that training data should have, None where it does not matter; a number that is not known (nan) is no reason to drop a clip."""


def measure(frames: Iterable[tuple[Frame, float]]) -> Measured:
    """Frames uint8 [H,W,3] with the second at which each is shown, as `base_model.video.files.timed_frames` gives them -> what is kept of the clip.

    One pass; what lies in memory is a few frames and a few numbers for every one. Raises UserError where there is no frame, or anything but frames of one size.
    """
    meter: _Meter | None = None
    for frame, time in frames:
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3 or not frame.size or (meter and frame.shape != meter.shape):
            raise UserError(f"frames to measure are uint8 [H,W,3] of one size with pixels, not {frame.dtype} {list(frame.shape)}. Decode them with `timed_frames`")
        meter = meter or _Meter(frame.shape)
        meter.add(frame, time)
    if meter is None:
        raise UserError("there is no frame to measure. Give a clip")
    return meter.measured()


def scene_cuts(frames: Iterable[Frame]) -> list[int]:
    """Frames uint8 [H,W,3] -> those that begin a scene, the first left out: what `measure` counts, and nothing else of it."""
    finder = CutFinder()
    for frame in frames:
        small = _shrunk(frame, WORK_SIDE, WORK_LONG_SIDE)
        finder.add(small, to_luma(small))
    return finder.cuts()


class _Meter:
    """All that is known of the frames so far."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.clock, self.sampler, self.thumbnails = _Clock(), _Sampler(), _Spread(THUMBNAILS)
        self.shots, self.flashes, self.changes, self.close = CutFinder(), FlashCounter(), _Changes(), _CloseLooks()
        self.moves, self.stills, self.dissolves = _Moves(), _Stills(), DissolveFinder()
        self.hashes: list[str] = []
        self.levels = array("d")
        self.black = 0

    def add(self, frame: Frame, time: float) -> None:
        second = self.clock.add(time)
        small = _shrunk(frame, WORK_SIDE, WORK_LONG_SIDE)
        luma = to_luma(small)
        # 1. From every frame
        self.shots.add(small, luma)
        self.flashes.add(small, second)
        self.changes.add(luma)
        self.levels.append(float(luma.mean(dtype=np.float64)))
        self.black += bool(np.count_nonzero(luma < BLACK) > BLACK_PIXELS * luma.size)
        self.thumbnails.add(lambda: _shrunk(frame, THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        # 2. Twice a second, from the frame as it is
        self.close.add(frame, second)
        # 3. Twelve times a second, from the frame before, now that it is known how long it is shown
        self._sample(self.sampler.add(_Sample(small, luma, len(self.levels) - 1, second)))

    def _sample(self, sampled: tuple[_Sample, int] | None) -> None:
        if sampled is not None:
            sample, ticks = sampled
            moment, luma = look(sample.frame)
            self.hashes += [moment] * ticks
            for _ in range(ticks):
                self.dissolves.add(luma)
            self.moves.add(sample)
            self.stills.add(sample)

    def measured(self) -> Measured:
        self._sample(self.sampler.end(self.clock.end))
        cuts = self.shots.cuts()
        scores = {
            **self.clock.scores(),
            "cuts": float(len(cuts)),
            "dissolves": float(len(self.dissolves.found)),
            "longest_shot": self._longest_shot(cuts),
            **self.moves.scores(cuts),
            **self.stills.scores(),
            "flicker": _flicker(self.levels, cuts),
            "flashes": self.flashes.flashes() if len(self.levels) > 1 else math.nan,
            "brightness": float(np.mean(self.levels)) / 255,
            "repeated_share": self.changes.repeated_share(),
            "black_share": self.black / len(self.levels),
            **self.close.scores(),
        }
        return Measured({name: scores[name] for name in MEASURES}, tuple(self.hashes), self.thumbnails.three())

    def _longest_shot(self, cuts: Sequence[int]) -> float:
        if len(self.levels) == 1:
            return math.nan
        ends = [self.clock.seconds[cut] for cut in cuts] + [middle / SAMPLES_A_SECOND for middle in self.dissolves.found]
        return float(np.diff([0.0, *sorted(ends), self.clock.end]).max())


class _Clock:
    """Times as the file gives them -> seconds that begin at 0 and rise, and what is odd about them."""

    def __init__(self) -> None:
        self.seconds = array("d")
        self._time = self._expected = math.nan  # of the last frame: by the file, and as it should be
        self._steps = array("d")  # nan where the file's clock is wrong
        self._usual = 1 / SAMPLES_A_SECOND

    def add(self, time: float) -> float:
        if not self.seconds:
            self.seconds.append(0.0)
            self._expected = time
        else:
            step = next((time - last for last in (self._expected, self._time) if 0 < time - last <= LONGEST_STEP), math.nan)
            self._steps.append(step)
            self._usual = self._usual if math.isnan(step) else step
            self._expected = self._expected + self._usual if math.isnan(step) else time
            self.seconds.append(self.seconds[-1] + self._usual)
        self._time = time
        return self.seconds[-1]

    @property
    def end(self) -> float:
        """When the last frame has been shown."""
        return self.seconds[-1] + (float(np.median(np.diff(self.seconds))) if self._steps else 1 / SAMPLES_A_SECOND)

    def scores(self) -> dict[str, float]:
        count = len(self.seconds)
        if count == 1:
            return {"frames": 1.0, "seconds": math.nan, "fps": math.nan, "fps_irregularity": math.nan}
        steps = np.diff(self.seconds)
        usual = float(np.median(steps))
        one = np.sort(steps)[(count - 2) // 2]  # a median that is there: of an even number the lower of the middle two
        rate = 1 / float(steps[np.abs(steps - one) <= SAME_TIME].mean())  # 33 and 34 ms are both a thirtieth of a second
        irregularity = np.nan_to_num(np.abs(np.array(self._steps) - usual) / usual, nan=1.0)  # where the clock cannot be right, it is off by a whole step
        return {"frames": float(count), "seconds": self.end, "fps": rate, "fps_irregularity": float(irregularity.mean())}


class _Sample(NamedTuple):
    """A frame that is shown at one twelfth of a second or more."""

    frame: Frame
    luma: Plane
    number: int
    second: float


class _Sampler:
    """Frames one after another -> those nearest to each twelfth of a second, with how many of these there are. It keeps one frame."""

    def __init__(self) -> None:
        self._held: _Sample | None = None
        self._ticks = 0

    def add(self, sample: _Sample) -> tuple[_Sample, int] | None:
        """The frame before, where it is one."""
        found = self._until((self._held.second + sample.second) / 2) if self._held else None
        self._held = sample
        return found

    def end(self, second: float) -> tuple[_Sample, int] | None:
        return self._until(max(second, 1e-3))

    def _until(self, second: float) -> tuple[_Sample, int] | None:
        ticks = math.ceil(second * SAMPLES_A_SECOND - 1e-6) - self._ticks
        self._ticks += max(0, ticks)
        return (self._held, ticks) if self._held and ticks > 0 else None


class _Changes:
    """How much the part of the frame that changes most does, step by step."""

    def __init__(self) -> None:
        self._before: Plane | None = None
        self._most = array("d")

    def add(self, luma: Plane) -> None:
        if self._before is not None:
            self._most.append(change(self._before, luma))
        self._before = luma

    def repeated_share(self) -> float:
        if not self._most:
            return math.nan
        padded = np.pad(np.array(self._most), REPEAT_STEPS)
        near = np.lib.stride_tricks.sliding_window_view(padded, 2 * REPEAT_STEPS + 1)  # [steps,window]
        around = np.minimum(near[:, :REPEAT_STEPS].max(1), near[:, REPEAT_STEPS + 1 :].max(1))
        return float(((around > STILL) & (near[:, REPEAT_STEPS] <= np.minimum(REPEAT * around, STILL))).mean())


class _Moves:
    """Flow from sample to sample."""

    def __init__(self) -> None:
        self._dis: Any = flow_finder(refined=False)
        self._before: _Sample | None = None
        self._steps = array("d")  # five of each: frames from and to; mean speed, of the camera and of the rest, in diagonals a second

    def add(self, sample: _Sample) -> None:
        if self._before is not None:
            same = np.array_equal(self._before.luma, sample.luma)
            speeds = (0.0, 0.0, 0.0) if same else self._speeds(self._before.luma, sample.luma, sample.second - self._before.second)
            self._steps.extend((self._before.number, sample.number, *speeds))
        self._before = sample

    def _speeds(self, here: Plane, there: Plane, seconds: float) -> tuple[float, float, float]:
        flow = flow_between(self._dis, here, there)
        camera = camera_flow(flow)
        unit = math.hypot(*here.shape) * seconds
        whole, moved, rest = (float(np.hypot(part[..., 0], part[..., 1]).mean()) / unit for part in (flow, camera, flow - camera))
        return whole, moved, rest

    def scores(self, cuts: Sequence[int]) -> dict[str, float]:
        steps = np.array(self._steps).reshape(-1, 5)
        over = [np.searchsorted(cuts, steps[:, side], "right") for side in (0, 1)]  # cuts until then
        within = steps[over[0] == over[1], 2:]
        speeds = within.mean(0).tolist() if len(within) else [math.nan] * 3
        return dict(zip(("motion", "camera_motion", "object_motion"), speeds, strict=True))


class _Stills:
    """Stretches in which no sample differs from their first one by more than a codec does. What moves slowly is soon far enough from where it was."""

    def __init__(self) -> None:
        self._first: _Sample | None = None
        self._last = 0.0
        self._stretches: list[float] = []

    def add(self, sample: _Sample) -> None:
        if self._first is None or change(self._first.luma, sample.luma) > STILL:
            self._end()
            self._first = sample
        self._last = sample.second

    def _end(self) -> None:
        if self._first is not None and self._last - self._first.second >= STILL_SECONDS - 1e-6:
            self._stretches.append(self._last - self._first.second)

    def scores(self) -> dict[str, float]:
        self._end()
        self._first = None
        return {
            "static_share": sum(self._stretches) / self._last if self._last else math.nan,
            "longest_still": max(self._stretches, default=0.0) if self._last else math.nan,
        }


class _CloseLooks:
    """What only the frame at its full size tells, twice a second; and what the borders of some of these frames are."""

    def __init__(self) -> None:
        self._next = 0.0
        self._found = array("d")  # of each look, by the names of DETAILS
        self._lumas = _Spread(BORDER_LOOKS)

    def add(self, frame: Frame, second: float) -> None:
        if second < self._next - 1e-6:
            return
        self._next = second + 1 / CLOSE_LOOKS
        luma = to_luma(frame)
        self._found.extend(_close_look(luma))
        self._lumas.add(lambda: _shrunk(luma, BORDER_SIDE, 2 * BORDER_SIDE))

    def scores(self) -> dict[str, float]:
        means = np.array(self._found).reshape(-1, len(DETAILS)).mean(0).tolist()
        return {**dict(zip(DETAILS, means, strict=True)), "letterbox": letterbox(np.stack([luma for _, luma in self._lumas.kept]))}


def _close_look(luma: Plane) -> tuple[float, ...]:
    """DETAILS of a frame."""
    import cv2

    counts = np.bincount(luma.ravel(), minlength=256)
    shadow, light = counts[: SHADOW + 1].sum() / luma.size, counts[LIGHT:].sum() / luma.size
    return float(cv2.Laplacian(luma, cv2.CV_32F).var()), float(shadow), float(light), float(luma.std() / 255), noise(luma), grid(luma)


def letterbox(lumas: Plane) -> float:
    """Luma of frames all over a clip, uint8 [K,H,W] -> share of the frame that is a border: of one level all the time, up to an edge that is straight in half of the frames."""
    _, height, width = lumas.shape
    across = lumas.transpose(0, 2, 1)
    (top, bottom, wide), (left, right, high) = _borders(lumas), _borders(across)
    inside = lumas[:, top : height - bottom, left : width - right]
    if not (wide and high) and not (max(top, bottom) and max(left, right) and _off(inside, lumas[:, 0]).mean() >= EDGE_SHARE):
        return 0.0  # a picture that touches no side has borders on both pairs of them; words and shapes on an even ground leave most of it even
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


def _borders(lumas: Plane) -> tuple[int, int, bool]:
    """Rows at the top and at the bottom that are borders, and whether the picture between them reaches both sides of the frame; so it does where there are none."""
    (top, reaches), (bottom, also) = _border(lumas), _border(lumas[:, ::-1])
    return top, bottom, reaches or also or not (top or bottom)


def _border(lumas: Plane) -> tuple[int, bool]:
    """Rows at the top that are one, and whether what is behind it reaches both sides of the frame."""
    height = lumas.shape[1]
    off = _off(lumas, lumas[:, 0])  # [K,H,W]
    uneven = np.flatnonzero(off.mean((0, 2)) > 1 - EVEN_SHARE)
    rows = int(uneven[0]) if uneven.size else 0
    if not 0 < rows < height / 2:
        return 0, False
    picture = np.flatnonzero(off.any((0, 1)))  # columns that are not border from top to bottom
    edge = off[:, rows : rows + max(2, height // 16), picture[0] : picture[-1] + 1].mean(2).max(1)  # [K] share of one row right behind the border that differs from it
    reaches = bool(picture[0] == 0 and picture[-1] == lumas.shape[2] - 1)
    return (rows if np.median(edge) >= (EDGE_SHARE if reaches else EDGE_SHARE_INSIDE) else 0), reaches


def _off(lumas: Plane, border: Plane) -> NDArray[np.bool_]:
    """Which pixels are not of the border's level."""
    return np.asarray(np.abs(lumas - np.float32(np.median(border))) > EVEN)


def change(one: Plane, other: Plane) -> float:
    """Luma of two frames [H,W] -> the mean absolute difference of the cell that changes most, of 255."""
    import cv2

    height, width = one.shape
    return float(cv2.resize(cv2.absdiff(one, other).astype(np.float32), (min(width, CELLS), min(height, CELLS)), interpolation=cv2.INTER_AREA).max())


def _flicker(levels: Sequence[float], cuts: Sequence[int]) -> float:
    """Of every shot, mean over frames."""
    shots = [shot for shot in np.split(np.array(levels), list(cuts)) if len(shot) >= 3]
    return math.sqrt(sum(len(shot) * luma_flicker(shot) ** 2 for shot in shots) / sum(map(len, shots))) if shots else math.nan


class _Spread:
    """A few of many things, all over them, however many there are: every second one goes where there are too many."""

    def __init__(self, most: int) -> None:
        self.kept: list[tuple[int, Any]] = []  # with their numbers
        self.count, self._apart, self._most = 0, 1, most

    def add(self, make: Callable[[], Any]) -> None:
        if self.count % self._apart == 0 and len(self.kept) == self._most:
            self.kept, self._apart = self.kept[::2], 2 * self._apart
        if self.count % self._apart == 0:
            self.kept.append((self.count, make()))
        self.count += 1

    def three(self) -> tuple[Any, ...]:
        """Those nearest to a sixth, a half and five sixths, as far as they are different ones."""
        near = [min(range(len(self.kept)), key=lambda k: abs(self.kept[k][0] - share * (self.count - 1))) for share in (1 / 6, 1 / 2, 5 / 6)]
        return tuple(self.kept[k][1] for k in sorted(set(near)))


def _shrunk(frame: Frame, short: int, long: int) -> Frame:
    """A frame, or its luma, whose sides are at most `short` and `long`, averaged; never larger than it was, and never a view of it."""
    import cv2

    height, width = frame.shape[:2]
    shrink = min(1.0, short / min(height, width), long / max(height, width))
    if shrink == 1:
        return np.array(frame)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
