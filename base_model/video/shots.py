"""Where one scene ends and another begins, found while frames come by: hard cuts from frame to frame, and pictures that fade into another.

A cut is a step that changes the frame far more than the steps around it, that no motion explains (the frames are not alike even once the
next one is warped back by the camera's motion), and after which the scene of before does not come back at once, as it does after a flash. A dissolve is half a second
to two in which the frames between two unlike pictures are mixtures of both, more and more of the later one; light that rises or falls leaves a picture like itself, and
something that moves is no mixture.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from base_model.video.signals import Frames, camera_flow, flow_between, flow_finder

Array = NDArray[np.float64]

CHANGE = 5.0  # of 255, mean over pixels and colours
AROUND = 5  # steps on either side
ALIKE = 0.7  # correlation of luma from which two frames show one scene
EVIDENCE = 1.15  # times that a cut changes more than the steps around it, times how unlike its frames are (1 - correlation)
TINY = 48  # a side, for correlations
EVEN = 1e-5  # variance of luma of a frame of one level
BACK = 4  # frames within which a scene that comes back was never left
FADES = (6, 12, 24)  # lengths of a dissolve, samples of 1/12 s
FADE_CHANGE = 0.06  # root mean square over luma in [0,1]
FADE_UNLIKE = 0.4  # correlation of its two ends at most
FADE_ERROR = 0.14  # of that change, what mixtures of the two ends leave unexplained; of a wave that moves until it is that unlike, 0.15
FADE_APART = 12  # samples from which two dissolves are two


class CutFinder:
    """Frames one after another -> the steps that are hard cuts. It keeps a few frames, and two numbers a step."""

    def __init__(self) -> None:
        self._change = array("d")  # of each step: mean absolute, of 255
        self._like = array("d")  # correlation of its frames, at the best of all ways to explain the change without a cut
        self._before: tuple[Frames, Frames] | None = None  # frame and luma
        self._recent: deque[Array] = deque(maxlen=BACK + 1)
        self._pending: dict[int, Array] = {}  # step -> the frame before it: the scene that may come back
        self._dis: Any = flow_finder()

    def add(self, frame: Frames, luma: Frames) -> None:
        """A small frame uint8 [H,W,3] and its luma [H,W]."""
        import cv2

        tiny = _tiny(luma)
        if self._before is not None:
            self._forget_what_comes_back(tiny)
            change = float(cv2.absdiff(self._before[0], frame).mean())
            like = likeness(self._recent[-1], tiny) if change >= CHANGE else 1.0
            if like < ALIKE:
                like = max(like, *(likeness(earlier, tiny) for earlier in self._recent))
            if like < ALIKE:
                like = max(like, _moved_likeness(self._dis, self._before[1], luma))
                self._pending[len(self._like)] = self._recent[-1]
            self._change.append(change)
            self._like.append(like)
        self._before = frame, luma
        self._recent.append(tiny)

    def cuts(self) -> list[int]:
        """The frames that begin a scene, of all so far."""
        change = np.array(self._change)
        unlike = [k for k, like in enumerate(self._like) if like < ALIKE]
        return [k + 1 for k in unlike if (1 - self._like[k]) * change[k] >= EVIDENCE * _around(change, k)]

    def _forget_what_comes_back(self, tiny: Array) -> None:
        for step, scene in list(self._pending.items()):
            self._like[step] = max(self._like[step], likeness(scene, tiny))
            if len(self._like) - step >= BACK:
                del self._pending[step]


class DissolveFinder:
    """Luma in [0,1] of small frames, every 1/12 s -> when one picture has faded into another, in samples. It keeps two seconds."""

    def __init__(self) -> None:
        self._lumas: deque[Array] = deque(maxlen=max(FADES) + 1)
        self._count = self._last = 0
        self.found: list[int] = []
        self._last = 0  # when one was seen

    def add(self, luma: Array) -> None:
        """[h,w] in [0,1]."""
        self._lumas.append(luma)
        recent = list(self._lumas)
        middle = next((self._count - length // 2 for length in FADES if length < len(recent) and _is_dissolve(recent[-1 - length :])), None)
        if middle is not None:
            if not self.found or self._count - self._last > FADE_APART:
                self.found.append(middle)
            self._last = self._count
        self._count += 1


def likeness(one: Array, other: Array) -> float:
    """Correlation of two pictures of luma in [0,1]; 1 for two of one even level each, 0 for one that is and one that is not."""
    a, b = one.ravel() - one.mean(), other.ravel() - other.mean()
    one_spread, other_spread = float(a @ a) / len(a), float(b @ b) / len(b)
    if min(one_spread, other_spread) < EVEN:
        return float(max(one_spread, other_spread) < EVEN)
    return float(a @ b) / len(a) / math.sqrt(one_spread * other_spread)


def _tiny(luma: Frames) -> Array:
    """uint8 [H,W] -> in [0,1], at most TINY a side."""
    import cv2

    height, width = luma.shape
    return np.asarray(cv2.resize(luma, (min(width, TINY), min(height, TINY)), interpolation=cv2.INTER_AREA), np.float64) / 255


def _moved_likeness(dis: Any, here: Frames, there: Frames) -> float:
    """Likeness once the next frame is warped back by the motion of the camera, over what both show, if that is half of it."""
    import cv2

    flow = camera_flow(flow_between(dis, here, there))
    height, width = here.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    at_x, at_y = x + flow[..., 0], y + flow[..., 1]
    inside = (at_x >= 0) & (at_x <= width - 1) & (at_y >= 0) & (at_y <= height - 1)
    if inside.mean() < 0.5:
        return 0.0
    warped = cv2.remap(there, at_x, at_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return likeness(here[inside] / 255, warped[inside] / 255)


def _around(change: Array, step: int) -> float:
    """What three quarters of the steps around `step` do not exceed."""
    near = np.concatenate([change[max(0, step - AROUND) : step], change[step + 1 : step + 1 + AROUND]])
    return float(np.quantile(near, 0.75)) if near.size else 0.0


def _is_dissolve(lumas: list[Array]) -> bool:
    begin, end = lumas[0], lumas[-1]
    difference = end - begin
    size = float(np.sqrt((difference**2).mean()))
    if size < FADE_CHANGE or likeness(begin, end) > FADE_UNLIKE:
        return False
    shares, errors = [], []
    for quarter in (1, 2, 3):
        part = lumas[quarter * (len(lumas) - 1) // 4] - begin
        share = float((part * difference).mean()) / size**2
        shares.append(share)
        errors.append(float(np.sqrt(((part - share * difference) ** 2).mean())) / size)
    return max(errors) < FADE_ERROR and 0.08 < shares[0] < shares[1] < shares[2] < 0.92
