"""What measures of clips share: optical flow and the camera in it, flicker, grids, noise, means over cells. None needs weights or a prompt.

Pixels are decoded frames, `uint8 [H,W,3]` (RGB), or their luma [H,W]; what cannot be told is nan. Optical flow is OpenCV's DIS (Kroeger et al. 2016, arXiv 1603.03590), the
camera a similarity transform fitted to it by RANSAC.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

DIS_LEAST_SIDE = 16
FLICKER_WINDOW = 5
PERIODS = (4, 8, 16, 32)


def flow_finder(*, refined: bool = True) -> Any:
    """What `flow_between` needs: OpenCV's DIS, one for all steps. Not refined it takes half the time, and mean speeds differ by 4 % or less."""
    import cv2

    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setFinestScale(0)  # at half the size, the default, objects of 16 pixels move half as fast
    if not refined:
        dis.setVariationalRefinementIterations(0)
    return dis


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


def luma_flicker(mean_luma: NDArray[np.float64]) -> float:
    """Mean luma of each frame [T] -> its standard deviation around a running mean of five frames; nan below three frames."""
    if len(mean_luma) < 3:
        return math.nan
    half = min(FLICKER_WINDOW // 2, (len(mean_luma) - 1) // 2)
    padded = np.pad(mean_luma, half, mode="reflect", reflect_type="odd")  # a steady fade is no flicker at the ends either
    running = np.convolve(padded, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")  # [T]
    return float((mean_luma - running).std())


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
