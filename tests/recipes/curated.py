"""Clips that no file holds, for tests of curation: what a file is called decides what it shows, and a log tells which were decoded. Also a process that curates such clips."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base_model.errors import UserError
from base_model.video.files import Frame
from recipes.clip_scores import Opened

LOG = ".log"
"""Where there is a file of that name beside a clip, the clip's name is added to it when it is decoded."""


class Shown(NamedTuple):
    """What a name says: `seed-frames-side`, and a word for what goes wrong."""

    seed: int
    frames: int
    side: int
    word: str


def shown(path: Path) -> Shown:
    seed, frames, side, *word = path.stem.split("-")
    return Shown(int(seed), int(frames), int(side), *word or [""])


def textured(seed: int, side: int) -> Frame:
    """A smooth random picture [side,side,3], another for each seed."""
    import cv2

    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def frames_of(what: Shown) -> Iterator[tuple[Frame, float]]:
    """A picture that moves by a pixel a frame, 12 frames a second."""
    picture = textured(what.seed, what.side)
    for k in range(what.frames):
        yield np.roll(picture, k, axis=1), k / 12


def read(path: Path) -> Opened:
    """Opens such a file; words: `damaged`, `hangs`, `killed` (its worker), `large` (takes all memory), `wrong` (a bug), `slow`."""
    if (path.parent / LOG).exists():
        with open(path.parent / LOG, "ab", buffering=0) as file:
            file.write(f"{path.name}\n".encode())
    what = shown(path)
    if what.word == "damaged":
        raise UserError(f"the video file is truncated or damaged after 3 frames, {path}. Copy or make it again")
    if what.word == "hangs":
        time.sleep(600)
    if what.word == "killed":
        os.kill(os.getpid(), 9)
    if what.word == "large":
        return Opened("none", "mp4", iter([(np.zeros((1 << 16, 1 << 16, 3), np.uint8), 0.0)]))
    if what.word == "wrong":
        raise RuntimeError("a bug\nof two lines")
    if what.word == "slow":
        time.sleep(0.1)
    return Opened("none", "mp4", frames_of(what))


if __name__ == "__main__":  # curated.py INPUT OUT WORKERS
    from recipes import curate
    from tests.recipes import curated

    curate.curated(curate.Config(input=sys.argv[1], out=Path(sys.argv[2]), workers=int(sys.argv[3])), read=curated.read)
