"""What can be measured of a clip before it becomes training data: numbers for a table, hashes and small pictures, in one pass over its frames.

Nothing here decides: thresholds are applied to the table. `SENSIBLE` proposes some.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from base_model.video.files import Frame


class Measure(NamedTuple):
    """What a number says."""

    unit: str
    what: str


class Measured(NamedTuple):
    """All that is kept of a clip."""

    scores: dict[str, float]  # by the names of MEASURES; nan where the clip cannot tell (one frame has no motion)
    hashes: tuple[str, ...]  # over time (`base_model/video/hashes.py`)
    thumbnails: tuple[Frame, ...]  # at most three small frames uint8 [h,w,3], longest side 160


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
    "static_share": Measure("of steps", "frames that are the one before again"),
    "longest_still": Measure("s", "longest time in which nothing changes"),
    "repeated_share": Measure("of steps", "frames that are the one before again between others that move: a clip that was slowed or converted by repeating frames"),
    "black_share": Measure("of frames", "frames whose 98th percentile of luma is below 32 of 255"),
    "noise": Measure("of 255", "median absolute diagonal Haar detail over 0.6745, at full size"),
    "blockiness": Measure("times", "strongest of the periods 4, 8, 16 and 32 in the spectrum of the gradient, against its neighbours, at full size: 1 is none"),
}

SENSIBLE: dict[str, tuple[float | None, float | None]] = {
    "cuts": (None, 0.0),
    "dissolves": (None, 0.0),
    "flashes": (None, 3.0),
    "letterbox": (None, 0.02),
    "static_share": (None, 0.5),
    "repeated_share": (None, 0.25),
    "black_share": (None, 0.1),
}
"""Least and most of a measure that training data should have, None where it does not matter; a number that is not known (nan) is no reason to drop a clip."""


def measure(frames: Iterable[tuple[Frame, float]]) -> Measured:
    """Frames uint8 [H,W,3] with the second at which each is shown, as `base_model.video.files.timed_frames` gives them -> what is kept of the clip.

    One pass; what lies in memory is a few frames and a few numbers for every one. Raises UserError where there is no frame, or anything but frames of one size.
    """
    raise NotImplementedError
