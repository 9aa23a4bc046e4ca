"""What the guards share: limits, versions, which frames are looked at."""

from __future__ import annotations

import hashlib

from base_model.errors import UserError


def check_limits(threshold: float, block_from: float) -> None:
    """Raises UserError unless they rise within 0 and 1."""
    if not 0 < threshold <= block_from <= 1:
        raise UserError(f"limits of {threshold:g} and {block_from:g}: they rise within 0 and 1. Give others")


def version_of(*parts: object) -> str:
    """The hash of what decides a guard's rulings."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).digest())
    return digest.hexdigest()[:16]


def frames_at(frames: int, fps: float, rate: float) -> list[int]:
    """Which of a clip's frames are looked at: one every 1 / rate seconds from the first, and the last one."""
    step = max(1.0, fps / rate)
    return sorted({*(round(k * step) for k in range(int((frames - 1) / step) + 1)), frames - 1})
