"""Perceptual hashes of a clip over time, and clips that are nearly the same by them.

    clip -> a frame every 1/12 s -> luma 32 x 32 -> signs of its 64 lowest frequencies -> one hash a frame

Two clips are as far apart as their hashes differ on average, in bits, at the best offset and speed at which half of the shorter one is covered.
Frames without structure have no hash. What hashes cannot see: the same thing in another picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SAMPLES_A_SECOND = 12
SIDE = 32
BITS = 64
LUMA = (0.299, 0.587, 0.114)
FLAT_BELOW = 0.01  # standard deviation of luma
SPEEDS = tuple(2 ** (step / 12) for step in range(-12, 13))
CROP = 0.075  # of each side
BITS_APART = 9.0  # mean distance of clips that are nearly the same, at most

Array = NDArray[np.float64]


def clip_hashes(video: Tensor, fps: float) -> tuple[str, ...]:
    """[T,3,H,W] in [0,1] -> a hash for every sampled frame, hexadecimal, empty for frames without structure. Raises ValueError for pixels that are not finite."""
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the clip holds nan or infinite pixels")
    count = max(1, math.ceil(len(video) / fps * SAMPLES_A_SECOND - 1e-6))
    at = (torch.arange(count) / SAMPLES_A_SECOND * fps).round().long().clamp(max=len(video) - 1)  # [S]
    luma = torch.einsum("tchw,c->thw", video[at].float(), torch.tensor(LUMA, device=video.device)).cpu()
    small = F.adaptive_avg_pool2d(luma[:, None], SIDE)[:, 0].double()  # [S,SIDE,SIDE]
    return hashes_of(small.numpy())


def hashes_of(luma: Array) -> tuple[str, ...]:
    """Luma of S small frames in [0,1], [S,SIDE,SIDE] -> S hashes."""
    waves = _waves()
    bits = np.einsum("shw,kh,lw->skl", luma, waves, waves, optimize=True)[:, *_lowest()] > 0  # [S,BITS]
    flat = luma.reshape(len(luma), -1).std(1, ddof=1) < FLAT_BELOW
    return tuple("" if is_flat else np.packbits(row).tobytes().hex() for row, is_flat in zip(bits, flat.tolist(), strict=True))


def look(frame: NDArray[np.uint8]) -> tuple[str, Array]:
    """A small frame uint8 [H,W,3] -> (its hash and that of its middle without CROP at each side, behind each other, empty where it has no structure;
    its luma in [0,1], [SIDE,SIDE])."""
    import cv2

    height, width = frame.shape[:2]
    top, left = round(CROP * height), round(CROP * width)
    luma = np.reshape(cv2.transform(frame.astype(np.float32), np.array([LUMA], np.float32) / 255), (height, width))
    both = np.stack([averaged(luma), averaged(luma[top : height - top, left : width - left])])
    whole, middle = hashes_of(both)
    return whole + middle if whole and middle else "", both[0]


def averaged(luma: NDArray[np.float32]) -> Array:
    """[H,W] -> [SIDE,SIDE]."""
    height, width = luma.shape
    return (_averages(height) @ luma @ _averages(width).T).astype(np.float64)


@lru_cache(maxsize=16)
def _averages(length: int) -> NDArray[np.float32]:
    """[SIDE,length]: the averages of torch's adaptive pooling, as a matrix."""
    found = np.zeros((SIDE, length), np.float32)
    for k in range(SIDE):
        begin, end = k * length // SIDE, -(-(k + 1) * length // SIDE)
        found[k, begin:end] = 1 / (end - begin)
    return found


def unpacked(hashes: Sequence[str]) -> Array:
    """[S,BITS] of 0 and 1, nan where there is no hash. Raises ValueError for text that is none."""
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(each), np.uint8)).astype(np.float64) if each else np.full(BITS, np.nan) for each in hashes]
    if any(len(row) != BITS for row in rows) or not rows:
        raise ValueError("a hash has another length")
    return np.stack(rows)


def bits_apart(one: Array, other: Array) -> float:
    """Bits [S,BITS] and [U,BITS] of 0, 1 or nan -> the mean distance at the best offset and speed, infinite where too few frames have a hash.

    Where even the most similar frames, in any order, are 2 BITS_APART away, so are the clips: their distance is returned without a look at the order.
    """
    distance = one @ (1 - other).T + (1 - one) @ other.T  # [S,U]
    nearest = np.sort(np.where(np.isfinite(distance), distance, np.inf).min(1))
    bound = float(nearest[: math.ceil(_covered(len(one), len(other), max(SPEEDS)))].mean())
    return bound if bound >= 2 * BITS_APART else min((float(np.mean(path)) for path in _paths(distance)), default=math.inf)


def near_duplicates(hashes: Sequence[tuple[str, ...]], *, apart: float = BITS_APART) -> list[tuple[int, int, float]]:
    """Hashes of N clips, in their order -> (row, the earlier row that it repeats most closely, bits apart) of every row that is at most `apart` bits from one."""
    raise NotImplementedError


def _covered(count: int, others: int, speed: float) -> float:
    """The least number of frames that must be compared: half of the shorter clip."""
    return max(1, min(count, others / speed) / 2)


def _paths(distance: Array) -> Iterator[Array]:
    """Distances along every line of constant speed that covers half of the shorter clip."""
    count, others = distance.shape
    for speed in SPEEDS:
        steps = speed * np.arange(count)
        for offset in range(-math.ceil(steps[-1]), others):
            at = np.rint(steps + offset).astype(np.int64)
            inside = (at >= 0) & (at < others)
            path = distance[np.flatnonzero(inside), at[inside]]
            path = path[np.isfinite(path)]
            if len(path) >= _covered(count, others, speed):
                yield path


@cache
def _waves() -> Array:
    """Cosines of the discrete cosine transform [frequencies,SIDE]."""
    return np.cos(np.pi * np.arange(12)[:, None] * (np.arange(SIDE) + 0.5) / SIDE)


@cache
def _lowest() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows and columns of the BITS lowest frequencies but 0."""
    k, l = np.meshgrid(np.arange(12), np.arange(12), indexing="ij")
    order = np.argsort((k**2 + l**2).ravel(), kind="stable")[1 : BITS + 1]
    return k.ravel()[order], l.ravel()[order]
