"""From a clip to what the vision tower of a Qwen vision-language model takes: sampled at a rate that is part of the reward's contract, resized, normalised, cut into patches.

Letters: T frames of a clip, F sampled frames, P frames a temporal patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from base_model.errors import UserError
from base_model.prompts.vision import Patches, PatchFormat, fitted_size, normalise, patchify, resize_frames, spread_frames
from reward.types import same_rate


@dataclass(frozen=True)
class FrameSampler:
    """Which frames of a clip are seen, and how large. Part of a reward model's contract: at another rate the scores mean something else."""

    fps: float = 2.0  # frames seen a second
    min_frames: int = 4  # of a short clip, closer together then
    max_frames: int = 64  # a clip that needs more is refused: the rate would fall
    min_pixels: int = 128 * 28 * 28  # of a frame; smaller ones grow
    max_pixels: int = 448 * 448

    def __post_init__(self) -> None:
        if not (self.fps > 0 and 1 <= self.min_frames <= self.max_frames and 1 <= self.min_pixels <= self.max_pixels):
            raise UserError(f"not a frame sampler: {self}. Give a rate above 0, and least values that are not above the largest")


def frame_indices(num_frames: int, fps: float, sampler: FrameSampler, multiple: int) -> list[int]:
    """The frames of a clip of T frames at `fps` that `sampler` sees: evenly spaced from the first to the last, their number a multiple of P.

    T / fps * sampler.fps, by the rule of `spread_frames`. Raises UserError where the clip runs slower than the sampler looks, or needs more than max_frames.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"a clip's frame rate is a positive number, not {fps}. Give the rate the clip was made at")
    if fps < sampler.fps and not same_rate(fps, sampler.fps):
        raise UserError(f"a clip has {fps:g} frames a second, and the reward model looks at {sampler.fps:g}. Give it clips of at least that rate")
    wanted = num_frames / fps * sampler.fps
    if wanted > sampler.max_frames:
        limit = f"{num_frames / fps:.3g} seconds long and needs {math.ceil(wanted)} frames at {sampler.fps:g} a second"
        raise UserError(f"the clip is {limit}; the reward model looks at {sampler.max_frames} at most. Score shorter pieces, or train with a larger max_frames")
    return spread_frames(num_frames, wanted, sampler.min_frames, sampler.max_frames, multiple)


def read_clip(video: Tensor, fps: float, sampler: FrameSampler, form: PatchFormat) -> Patches:
    """A clip [T,3,H,W] in [0,1] at `fps` -> its patches. Raises UserError as `frame_indices` and `fitted_size` do."""
    if video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(f"a clip is [T,3,H,W] with at least one frame, not {list(video.shape)}")
    index = frame_indices(len(video), fps, sampler, form.frames)
    size = fitted_size(video.shape[2], video.shape[3], form.side, sampler.min_pixels, sampler.max_pixels)
    seen = resize_frames(video[index].float(), size)  # [F,3,h,w]
    values, grid = patchify(normalise(seen, form), form)
    starts = index[:: form.frames]
    times = tuple((first + last) / 2 / fps for first, last in zip(starts, index[form.frames - 1 :: form.frames], strict=True))
    seconds = form.frames * (index[-1] - index[0]) / max(len(index) - 1, 1) / fps
    return Patches(values, grid, times, seconds or form.frames / fps)
