"""From a clip to what the vision tower of a Qwen vision-language model takes: sampled, resized, normalised, cut into patches.

transformers' own video processors need torchvision, which this project does without; here everything is torch, and the gradient passes through.

Letters: T frames of a clip, F sampled frames, P frames a temporal patch, p pixels a side of a patch, m patches a side of a merged token, N patches of a clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.errors import UserError
from reward.types import same_rate

LONGEST_SIDE_RATIO = 200


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


@dataclass(frozen=True)
class PatchFormat:
    """How a vision tower wants its patches: from the model's configuration, the constants of normalisation from its preprocessor's."""

    patch: int  # p
    frames: int  # P
    merge: int  # m
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Patches(NamedTuple):
    """A clip as the vision tower takes it."""

    values: Tensor  # [N, 3 P p p]
    grid: tuple[int, int, int]  # N = its product: temporal patches, rows, columns
    times: tuple[float, ...]  # seconds into the clip, one a temporal patch: the mean of its first and last frame
    seconds: float  # between the starts of two temporal patches


def frame_indices(num_frames: int, fps: float, sampler: FrameSampler, multiple: int) -> list[int]:
    """The frames of a clip of T frames at `fps` that `sampler` sees: evenly spaced from the first to the last, their number a multiple of P.

    VideoReward's rule (VideoAlign, `smart_nframes`, sample type "uniform"): T / fps * sampler.fps, at least min_frames, at most T, rounded to a multiple.
    A clip of fewer frames than P repeats its last one. Raises UserError where the clip runs slower than the sampler looks, or needs more than max_frames.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"a clip's frame rate is a positive number, not {fps}. Give the rate the clip was made at")
    if fps < sampler.fps and not same_rate(fps, sampler.fps):
        raise UserError(f"a clip has {fps:g} frames a second, and the reward model looks at {sampler.fps:g}. Give it clips of at least that rate")
    wanted = num_frames / fps * sampler.fps
    if wanted > sampler.max_frames:
        limit = f"{num_frames / fps:.3g} seconds long and needs {math.ceil(wanted)} frames at {sampler.fps:g} a second"
        raise UserError(f"the clip is {limit}; the reward model looks at {sampler.max_frames} at most. Score shorter pieces, or train with a larger max_frames")
    if num_frames < multiple:
        return [*range(num_frames), *[num_frames - 1] * (multiple - num_frames)]
    least, most = -(-sampler.min_frames // multiple), max(1, min(num_frames, sampler.max_frames) // multiple)
    count = min(max(round(wanted / multiple), least), most) * multiple
    return [int(i) for i in torch.linspace(0, num_frames - 1, count).round()]


def fitted_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size a frame is resized to: multiples of `factor`, the pixels within the limits, the aspect as near as that allows (Qwen2-VL, `smart_resize`)."""
    if max(height, width) > LONGEST_SIDE_RATIO * min(height, width):
        raise UserError(f"a frame of {height}x{width} is too long and thin for a vision-language model. Give frames of at most {LONGEST_SIDE_RATIO} : 1")
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def patchify(video: Tensor, form: PatchFormat) -> tuple[Tensor, tuple[int, int, int]]:
    """Normalised frames [F,3,H,W] -> patches [N, 3 P p p] and their grid, in the order of transformers' processors: the m x m patches of a token together.

    F must be a multiple of P, H and W of p m.
    """
    p, m = form.patch, form.merge
    f, c, h, w = video.shape
    grid = (f // form.frames, h // p, w // p)
    x = video.reshape(grid[0], form.frames, c, grid[1] // m, m, p, grid[2] // m, m, p)  # [t,P,c,h/m,m,p,w/m,m,p]
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid  # [t h w, c P p p]


def read_clip(video: Tensor, fps: float, sampler: FrameSampler, form: PatchFormat) -> Patches:
    """A clip [T,3,H,W] in [0,1] at `fps` -> its patches. Raises UserError as `frame_indices` and `fitted_size` do."""
    if video.ndim != 4 or video.shape[1] != 3 or not len(video):
        raise ValueError(f"a clip is [T,3,H,W] with at least one frame, not {list(video.shape)}")
    index = frame_indices(len(video), fps, sampler, form.frames)
    size = fitted_size(video.shape[2], video.shape[3], form.patch * form.merge, sampler.min_pixels, sampler.max_pixels)
    seen = video[index].float()  # [F,3,H,W]
    if seen.shape[-2:] != size:
        seen = F.interpolate(seen, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    mean, std = (seen.new_tensor(values).view(3, 1, 1) for values in (form.mean, form.std))
    values, grid = patchify((seen - mean) / std, form)
    starts = index[:: form.frames]
    times = tuple((first + last) / 2 / fps for first, last in zip(starts, index[form.frames - 1 :: form.frames], strict=True))
    seconds = form.frames * (index[-1] - index[0]) / max(len(index) - 1, 1) / fps
    return Patches(values, grid, times, seconds or form.frames / fps)
