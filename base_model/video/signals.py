"""Measures of a clip that need no weights and no prompt: flicker, motion, camera, cuts, frozen and black frames, blur, grids, saturation, noise.

They filter training data, guard reinforcement learning against a reward that is being gamed, and warn beside every learned score. They say nothing
about whether a clip shows what was asked. All take decoded pixels, `uint8 [T,H,W,3]` (RGB); what a clip cannot tell (the motion of one frame) is nan.
Optical flow is OpenCV's DIS (Kroeger et al. 2016, arXiv 1603.03590), the camera a similarity transform fitted to it by RANSAC.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from base_model.errors import UserError

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

SIGNALS = {
    "temporal_flickering": "VBench's: (255 - mean absolute change of a pixel between neighbouring frames) / 255; 1 is perfectly still, so never read it without motion",
    "luma_flicker": "standard deviation of the frames' mean luma around its running mean of five frames, of 255 levels",
    "warp_residual": "mean absolute difference between a frame and the next one warped back by the flow, of 255 levels (short side 256 at most): what motion does not explain",
    "warp_residual_peak": "95th percentile of that difference, mean over steps",
    "dynamic_degree": "VBench's form: mean of the fastest 5 % of the flow, in thresholds (6 pixels a step at a short side of 256, 8 frames a second); mean over steps",
    "dynamic": "1 where a quarter of the frames or more move faster than that threshold, else 0 (VBench's dynamic degree)",
    "camera_motion": "mean speed of the camera's flow, short sides a second",
    "object_motion": "mean speed of the flow that the camera does not explain, short sides a second",
    "cuts": "scene cuts: steps whose mean change of hue, saturation and value exceeds 27 of 255 and three times its median over the clip (PySceneDetect's content score)",
    "frozen_share": "share of steps in which no more than one pixel value in a thousand changes by more than one level",
    "black_share": "share of frames whose 98th percentile of luma is below 32 of 255",
    "sharpness": "variance of the Laplacian of luma, mean over frames",
    "grid": "strongest of the periods 4, 8, 16 and 32 in the spectrum of the gradient, against its neighbours: dots and blocks (1 is none)",
    "saturation": "mean of max - min over the colour channels, of 1",
    "clipped_share": "share of pixel values at 0 or 255",
    "noise": "median absolute diagonal Haar detail over 0.6745, of 255 levels, mean over frames",
}
DIS_LEAST_SIDE = 16
FLOW_MOST_SIDE = 256
FLICKER_WINDOW = 5
CUT_CONTENT = 27.0
CUT_RATIO = 3.0
FROZEN_VALUES = 0.001
BLACK_LUMA = 32
PERIODS = (4, 8, 16, 32)


class Motion(NamedTuple):
    """One step from a frame to the next."""

    flow: Floats  # [H,W,2] pixels: x, y
    camera: Floats  # [H,W,2] the part that one similarity transform explains
    residual: Floats  # [H,W] absolute luma difference after warping; nan where the next frame does not reach


def signals(frames: Frames, fps: float) -> dict[str, float]:
    """Every measure of one clip, uint8 [T,H,W,3] at `fps`. Raises UserError for anything else."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise UserError(f"a clip to measure is uint8 [T,H,W,3] with pixels, not {frames.dtype} {list(frames.shape)}. Decode it with `read_video`")
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"a clip cannot have {fps} frames a second. Give the rate it is played at")
    luma = np.stack([to_luma(frame) for frame in frames])  # [T,H,W]
    found = {**_changes(frames, luma), **_motion(luma, fps), **_over_frames(frames, luma)}
    return {name: found[name] for name in SIGNALS}


def motions(luma: Frames) -> Iterator[Motion]:
    """Flow, camera and residual of each step of uint8 luma [T,H,W]."""
    dis = flow_finder()
    for here, there in itertools.pairwise(luma):
        flow = flow_between(dis, here, there)
        yield Motion(flow, camera_flow(flow), warp_residual(here, there, flow))


def flow_finder(*, refined: bool = True) -> Any:
    """What `flow_between` needs: OpenCV's DIS, one for all steps. Not refined it takes half the time, and mean speeds differ by 4 % or less."""
    import cv2

    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setFinestScale(0)  # at half the size, the default, objects of 16 pixels move half as fast
    if not refined:
        dis.setVariationalRefinementIterations(0)
    return dis


def camera_flow(flow: Floats) -> Floats:
    """The flow [H,W,2] of the similarity transform that most of it follows (RANSAC, one pixel); zero where none is found."""
    import cv2

    height, width = flow.shape[:2]
    step = max(1, min(height, width) // 16)
    y, x = np.mgrid[0:height:step, 0:width:step].reshape(2, -1).astype(np.float32)
    from_points = np.stack([x, y], axis=-1)  # [N,2]
    to_points = from_points + flow[y.astype(int), x.astype(int)]  # [N,2]
    cv2.setRNGSeed(0)
    matrix = cv2.estimateAffinePartial2D(from_points, to_points, method=cv2.RANSAC, ransacReprojThreshold=1.0)[0] if len(from_points) > 1 else None
    if matrix is None:
        return np.zeros_like(flow)
    change = (matrix - np.eye(2, 3)).astype(np.float32)
    down = np.arange(height, dtype=np.float32)[:, None, None] * change[:, 1]  # [H,1,2]
    camera: Floats = np.arange(width, dtype=np.float32)[:, None] * change[:, 0] + (down + change[:, 2])
    return camera


# Over time


def _changes(frames: Frames, luma: Frames) -> dict[str, float]:
    import cv2

    steps = [cv2.absdiff(a, b) for a, b in itertools.pairwise(frames)]
    return {
        "temporal_flickering": (255 - _mean(float(step.mean()) for step in steps)) / 255,
        "luma_flicker": luma_flicker(luma.mean((1, 2), dtype=np.float64)),
        "cuts": float(len(cuts(frames))),
        "frozen_share": _mean(float((step > 1).mean() <= FROZEN_VALUES) for step in steps),
    }


def _motion(luma: Frames, fps: float) -> dict[str, float]:
    small = _at_most(luma, FLOW_MOST_SIDE)
    side = min(small.shape[1:])
    fastest, camera, objects, residual, peak = [], [], [], [], []
    for motion in motions(small):
        fastest.append(_fastest(motion.flow) * fps / 8 / (6 * side / 256))
        camera.append(_speed(motion.camera) * fps / side)
        objects.append(_speed(motion.flow - motion.camera) * fps / side)
        known = motion.residual[np.isfinite(motion.residual)]
        residual.append(float(known.mean()) if known.size else math.nan)
        peak.append(float(np.quantile(known, 0.95)) if known.size else math.nan)
    return {
        "warp_residual": _mean(residual),
        "warp_residual_peak": _mean(peak),
        "dynamic_degree": _mean(fastest),
        "dynamic": float(sum(one > 1 for one in fastest) >= max(1, round(len(luma) / 4))) if fastest else math.nan,
        "camera_motion": _mean(camera),
        "object_motion": _mean(objects),
    }


def luma_flicker(mean_luma: NDArray[np.float64]) -> float:
    """Mean luma of each frame [T] -> its standard deviation around a running mean of five frames; nan below three frames."""
    if len(mean_luma) < 3:
        return math.nan
    half = min(FLICKER_WINDOW // 2, (len(mean_luma) - 1) // 2)
    padded = np.pad(mean_luma, half, mode="reflect", reflect_type="odd")  # a steady fade is no flicker at the ends either
    running = np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")  # [T]
    return float((mean_luma - running).std())


def cuts(frames: Frames) -> list[int]:
    """Indices of the frames that begin a new scene, in uint8 [T,H,W,3]."""
    import cv2

    hsv = [cv2.cvtColor(frame, cv2.COLOR_RGB2HSV_FULL).astype(np.int16) for frame in frames]
    content = np.array([_content(a, b) for a, b in itertools.pairwise(hsv)])  # [T-1]
    if not content.size:
        return []
    usual = float(np.median(content))
    return [int(step) + 1 for step in np.flatnonzero((content > CUT_CONTENT) & (content > CUT_RATIO * usual))]


def _content(a: NDArray[np.int16], b: NDArray[np.int16]) -> float:
    difference = np.abs(a - b)
    difference[..., 0] = np.minimum(difference[..., 0], 256 - difference[..., 0])  # hue is a circle
    return float(difference.mean())


def _at_most(luma: Frames, side: int) -> Frames:
    """Luma [T,H,W] shrunk until its short side is `side`: flow at full size costs much and tells little more."""
    import cv2

    height, width = luma.shape[1:]
    shrink = min(1.0, side / min(height, width))
    if shrink == 1:
        return luma
    return np.stack([cv2.resize(frame, (round(width * shrink), round(height * shrink)), interpolation=cv2.INTER_AREA) for frame in luma])


def flow_between(dis: Any, here: Frames, there: Frames) -> Floats:
    """Where the pixels of luma [H,W] go until the next one, [H,W,2] in pixels: x, y."""
    import cv2

    height, width = here.shape
    grow = max(1.0, DIS_LEAST_SIDE / min(height, width))
    if grow == 1:
        flow: Floats = dis.calc(here, there, None)
        return flow
    size = (math.ceil(width * grow), math.ceil(height * grow))
    large = dis.calc(*(np.ascontiguousarray(cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)) for frame in (here, there)), None)
    small: Floats = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA) / np.float32(grow)
    return small


def warp_residual(here: Frames, there: Frames, flow: Floats) -> Floats:
    """Absolute difference [H,W] of luma and the next one warped back by the flow; nan where the next one does not reach."""
    import cv2

    height, width = here.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    at_x, at_y = x + flow[..., 0], y + flow[..., 1]
    warped = cv2.remap(there.astype(np.float32), at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    inside = (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
    residual: Floats = np.where(inside, np.abs(warped - here), np.float32(np.nan))
    return residual


def _fastest(flow: Floats) -> float:
    speed = np.sort(np.hypot(flow[..., 0], flow[..., 1]), axis=None)
    return float(speed[-max(1, int(speed.size * 0.05)) :].mean())


def _speed(flow: Floats) -> float:
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean())


# Within frames


def _over_frames(frames: Frames, luma: Frames) -> dict[str, float]:
    import cv2

    return {
        "black_share": _mean([float(np.quantile(frame, 0.98) < BLACK_LUMA) for frame in luma]),
        "sharpness": _mean([float(cv2.Laplacian(frame, cv2.CV_32F).var()) for frame in luma]),
        "grid": _mean([grid(frame) for frame in luma]),
        "saturation": _mean([float((frame.max(-1).astype(np.int16) - frame.min(-1)).mean() / 255) for frame in frames]),
        "clipped_share": _mean([float(((frame == 0) | (frame == 255)).mean()) for frame in frames]),
        "noise": _mean([noise(frame) for frame in luma]),
    }


def grid(luma: Frames) -> float:
    """Peak of the gradient's spectrum at the periods of patches, over the median of its neighbours, in uint8 [H,W]; nan where no side holds four periods of 4."""
    peaks = []
    for axis in (axis for axis in (0, 1) if luma.shape[axis] > 4 * PERIODS[0]):
        profile = np.abs(np.diff(luma.astype(np.float64), axis=axis)).mean(1 - axis)  # [P]
        spectrum = np.abs(np.fft.rfft(profile - profile.mean(), n=_whole(len(profile))))
        for period in PERIODS:
            at = _whole(len(profile)) // period
            if len(profile) >= 4 * period and 2 <= at < len(spectrum):
                around = np.concatenate([spectrum[max(1, at - 4) : at - 1], spectrum[at + 2 : at + 5]])
                peaks.append(float(spectrum[at] / max(float(np.median(around)), 1e-3 * float(spectrum.max()), 1e-6)) if around.size else math.nan)
    return max(peaks, default=math.nan)


def _whole(length: int) -> int:
    """The next multiple of the longest period, so that every period falls on a line of the spectrum."""
    return -(-length // PERIODS[-1]) * PERIODS[-1]


def noise(luma: Frames) -> float:
    """Median absolute diagonal Haar detail of uint8 [H,W] over 0.6745, the standard deviation of white noise; nan below 2x2."""
    height, width = (side // 2 * 2 for side in luma.shape)
    even = luma[:height, :width].astype(np.float32)
    diagonal = (even[::2, ::2] - even[1::2, ::2] - even[::2, 1::2] + even[1::2, 1::2]) / 2  # [H/2,W/2]
    return float(np.median(np.abs(diagonal)) / 0.6745) if diagonal.size else math.nan


@lru_cache(maxsize=64)
def averages(length: int, cells: int) -> Floats:
    """[cells,length]: means of `length` numbers over so many cells, those of torch's adaptive pooling, as a matrix."""
    found = np.zeros((cells, length), np.float32)
    for k in range(cells):
        begin, end = k * length // cells, -(-(k + 1) * length // cells)
        found[k, begin:end] = 1 / (end - begin)
    return found


def to_luma(frame: Frames) -> Frames:
    """uint8 [H,W,3] -> [H,W]."""
    import cv2

    return np.asarray(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY), np.uint8)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return float(np.mean(known)) if len(known) else math.nan
