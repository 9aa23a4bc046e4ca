"""A clip filter for what was blocked before: perceptual hashes over time (`base_model/video/hashes.py`), kept in a small file.

A clip is looked at as it is and mirrored, a blocked one whole and with its edges cropped, at the best offset and speed. Frames without structure have no hash.
What it cannot see: the same thing in another picture; that is for filters that know what things are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.video.files import write_atomic
from base_model.video.hashes import BITS, BITS_APART, SAMPLES_A_SECOND, bits_apart, clip_hashes, unpacked
from reward.safety.contract import Reason, Ruling, Verdict
from reward.safety.policy import Policy

CROPS = (0.0, 0.025, 0.05)  # of each side
FORMAT = 1


@dataclass(frozen=True)
class BlockedClip:
    """What is kept of a blocked clip: which it was, what it broke, and for each of CROPS its hashes as hexadecimal text, empty for frames without structure."""

    clip_id: str
    policy: str
    looks: tuple[tuple[str, ...], ...]


class DuplicateFilter:
    """Near-duplicates of blocked clips are blocked for what these were blocked for.

    score = 1 - distance / (2 BITS_APART), at least 0: 1 for the same hashes, 0.5 at the threshold. The version names the blocked clips too.
    """

    id = "near-duplicate"
    threshold = 0.5

    def __init__(self, policy: Policy, blocked: Sequence[BlockedClip]) -> None:
        unknown = sorted({each.policy for each in blocked if each.policy not in policy})
        if unknown or not blocked:
            raise ValueError(f"clips are blocked under {unknown[0]}, which the policy does not have" if unknown else "no clip is blocked yet: leave the near-duplicate filter out")
        self._blocked = [(each, [unpacked(look) for look in each.looks]) for each in blocked]
        self.policies = tuple(sorted({each.policy for each in blocked}))
        self.version = f"2+{_digest(blocked)}"

    @torch.no_grad()
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        """video [B,T,3,H,W] in [0,1] -> one ruling a clip for each policy under which a clip is blocked."""
        return [self._check(clip, fps) for clip in video]

    def _check(self, clip: Tensor, fps: float) -> list[Ruling]:
        looks = unpacked(clip_hashes(clip, fps)), unpacked(clip_hashes(clip.flip(-1), fps))
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
    """Writes what `load_blocked` reads."""
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
            unpacked(look)
    except OSError as error:
        raise UserError(f"cannot read the blocked clips: {error.strerror}, {path}. Check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no file of blocked clips ({type(error).__name__}). Write it with save_blocked") from error
    return clips


def _digest(blocked: Sequence[BlockedClip]) -> str:
    """Eight hexadecimal digits that tell one set of blocked clips from another, in whatever order and under whatever names."""
    return hashlib.sha256(json.dumps(sorted({(each.policy, each.looks) for each in blocked})).encode()).hexdigest()[:8]


def _cropped(video: Tensor, share: float) -> Tensor:
    top, left = (round(share * side) for side in video.shape[-2:])
    return video[..., top : video.shape[-2] - top, left : video.shape[-1] - left]
