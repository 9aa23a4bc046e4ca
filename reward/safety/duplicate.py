"""A clip filter for what was blocked before: perceptual hashes over time, kept in a small file.

    clip -> a frame every 1/12 s -> luma 32 x 32 -> signs of its 64 lowest frequencies -> one hash a frame

Two clips are as far apart as their hashes differ on average, in bits, at the best offset and speed at which half of the shorter one is covered; a clip is looked at
as it is and mirrored, a blocked one whole and with its edges cropped. Frames without structure have no hash.
What it cannot see: the same thing in another picture; that is for filters that know what things are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.errors import UserError
from base_model.video.files import write_atomic
from reward.safety.contract import Reason, Ruling, Verdict
from reward.safety.policy import Policy

SAMPLES_A_SECOND = 12
SIDE = 32
BITS = 64
LUMA = (0.299, 0.587, 0.114)
CROPS = (0.0, 0.025, 0.05)  # of each side
FLAT_BELOW = 0.01  # standard deviation of luma
SPEEDS = tuple(2 ** (step / 12) for step in range(-12, 13))
BITS_APART = 9.0  # mean distance at the threshold
FORMAT = 1

Bits = NDArray[np.bool_]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class BlockedClip:
    """What is kept of a blocked clip: which it was, what it broke, and for each of CROPS its hashes as hexadecimal text, empty for frames without structure."""

    clip_id: str
    policy: str
    looks: tuple[tuple[str, ...], ...]


class DuplicateFilter:
    """Near-duplicates of blocked clips are blocked for what these were blocked for.

    score = 1 - distance / (2 BITS_APART), at least 0: 1 for the same hashes, 0.5 at the threshold.
    """

    id = "near-duplicate"
    version = "1"
    threshold = 0.5

    def __init__(self, policy: Policy, blocked: Sequence[BlockedClip]) -> None:
        unknown = sorted({each.policy for each in blocked if each.policy not in policy})
        if unknown or not blocked:
            raise ValueError(f"clips are blocked under {unknown[0]}, which the policy does not have" if unknown else "no clip is blocked yet: leave the near-duplicate filter out")
        self._blocked = [(each, [_unpacked(look) for look in each.looks]) for each in blocked]
        self.policies = tuple(sorted({each.policy for each in blocked}))

    @torch.no_grad()
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip for each policy under which a clip is blocked."""
        return [self._check(clip, fps) for clip in video]

    def _check(self, clip: Tensor, fps: float) -> list[Ruling]:
        looks = _unpacked(clip_hashes(clip, fps)), _unpacked(clip_hashes(clip.flip(-1), fps))
        apart = [(min(bits_apart(look, other) for look in looks for other in others), each) for each, others in self._blocked]
        return [self._rule(code, *min(((bits, each) for bits, each in apart if each.policy == code), key=lambda pair: pair[0])) for code in self.policies]

    def _rule(self, code: str, bits: float, nearest: BlockedClip) -> Ruling:
        score = max(0.0, 1 - bits / (2 * BITS_APART))
        if score < self.threshold:
            return Ruling(Verdict.ALLOW, code, score, (), self.id, self.version, self.threshold)
        text = f"the clip is nearly the blocked clip {nearest.clip_id}, {bits:.1f} of {BITS} bits apart"
        return Ruling(Verdict.BLOCK, code, score, (Reason(text),), self.id, self.version, self.threshold)


def block(clip_id: str, policy: str, video: Tensor, fps: float) -> BlockedClip:
    """What to keep of a clip [T,3,H,W] that is blocked."""
    return BlockedClip(clip_id, policy, tuple(clip_hashes(_cropped(video, share), fps) for share in CROPS))


def save_blocked(path: str | Path, blocked: Sequence[BlockedClip]) -> None:
    rows = [{"clip_id": each.clip_id, "policy": each.policy, "looks": [" ".join(look) for look in each.looks]} for each in blocked]
    write_atomic(Path(path), json.dumps({"format": FORMAT, "samples_a_second": SAMPLES_A_SECOND, "clips": rows}, indent=1).encode())


def load_blocked(path: str | Path) -> list[BlockedClip]:
    """Raises UserError for a file that is missing, or that this version did not write."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["samples_a_second"] != SAMPLES_A_SECOND:
            raise UserError(f"{path} holds hashes of another kind. Hash the blocked clips again")
        clips = [BlockedClip(str(row["clip_id"]), str(row["policy"]), tuple(tuple(look.split(" ")) for look in row["looks"])) for row in found["clips"]]
        for look in (look for clip in clips for look in clip.looks):
            _unpacked(look)
    except OSError as error:
        raise UserError(f"cannot read the blocked clips: {error.strerror}, {path}. Check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of blocked clips ({type(error).__name__}). Write it with save_blocked") from error
    return clips


def clip_hashes(video: Tensor, fps: float) -> tuple[str, ...]:
    """[T,3,H,W] in [0,1] -> a hash for every sampled frame. Raises ValueError for pixels that are not finite."""
    if not bool(torch.isfinite(video).all()):
        raise ValueError("the clip holds nan or infinite pixels")
    count = max(1, math.ceil(len(video) / fps * SAMPLES_A_SECOND - 1e-6))
    at = (torch.arange(count) / SAMPLES_A_SECOND * fps).round().long().clamp(max=len(video) - 1)  # [S]
    luma = torch.einsum("tchw,c->thw", video[at].float(), torch.tensor(LUMA, device=video.device)).cpu()
    small = F.adaptive_avg_pool2d(luma[:, None], SIDE)[:, 0].double()  # [S,SIDE,SIDE]
    waves = torch.from_numpy(_waves())
    bits = torch.einsum("shw,kh,lw->skl", small, waves, waves).numpy()[:, *_lowest()] > 0  # [S,BITS]
    flat = small.flatten(1).std(1) < FLAT_BELOW
    return tuple("" if is_flat else np.packbits(row).tobytes().hex() for row, is_flat in zip(bits, flat.tolist(), strict=True))


def bits_apart(one: Array, other: Array) -> float:
    """Bits [S,BITS] and [U,BITS] of 0, 1 or nan -> the mean distance at the best offset and speed, infinite where too few frames have a hash.

    Where even the most similar frames, in any order, are 2 BITS_APART away, so are the clips: their distance is returned without a look at the order.
    """
    distance = one @ (1 - other).T + (1 - one) @ other.T  # [S,U]
    nearest = np.sort(np.where(np.isfinite(distance), distance, np.inf).min(1))
    bound = float(nearest[: math.ceil(_covered(len(one), len(other), max(SPEEDS)))].mean())
    return bound if bound >= 2 * BITS_APART else min((float(np.mean(path)) for path in _paths(distance)), default=math.inf)


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


def _cropped(video: Tensor, share: float) -> Tensor:
    top, left = (round(share * side) for side in video.shape[-2:])
    return video[..., top : video.shape[-2] - top, left : video.shape[-1] - left]


def _unpacked(hashes: Sequence[str]) -> Array:
    """[S,BITS] of 0 and 1, nan where there is no hash. Raises ValueError for text that is none."""
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(each), np.uint8)).astype(np.float64) if each else np.full(BITS, np.nan) for each in hashes]
    if any(len(row) != BITS for row in rows) or not rows:
        raise ValueError("a hash has another length")
    return np.stack(rows)


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
