"""Clips changed on purpose: what everybody minds, and what nobody sees. Both are drawn anew for every clip, so that no one strength or pattern is learned.

Rankings of a generator's takes say little about faults that this generator does not make. A fault planted into a clip makes it worse than it was; a harmless change
leaves it as good as it was: both are known without asking anyone (degradation ranking: Liu et al. 2017, RankIQA, arXiv 1707.08347).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.video.files import from_uint8, read_video, resample_fps, write_mp4

Change = Callable[[Tensor, np.random.Generator], Tensor]
"""[T,3,H,W] in [0,1] -> the same, perhaps of another length."""


def blurred(video: Tensor, rng: np.random.Generator) -> Tensor:
    """A box blur of a fifteenth to a fifth of the short side, three pixels at least."""
    width = max(3, round(min(video.shape[-2:]) * rng.uniform(1 / 15, 1 / 5)) | 1)
    return F.avg_pool2d(F.pad(video, (width // 2,) * 4, mode="replicate"), width, stride=1)


def gridded(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Lines, in one direction or both, or dots where they cross, 4 to 16 pixels apart, brighter or darker than the picture."""
    period, (top, left) = int(rng.integers(4, 17)), rng.integers(0, 16, 2)
    rows, columns = (((torch.arange(n) + int(at)) % period == 0).float() for n, at in zip(video.shape[-2:], (top, left), strict=True))
    pattern = [rows[:, None] + columns, rows[:, None] * columns, rows[:, None] + 0 * columns, 0 * rows[:, None] + columns][rng.choice(4, p=[0.5, 0.2, 0.15, 0.15])]
    return (video + float(rng.uniform(0.08, 0.3) * rng.choice([-1, 1], p=[0.3, 0.7])) * pattern).clamp(0, 1)


def oversaturated(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Colours two to five times as far from grey."""
    grey = video.mean(1, keepdim=True)
    return (grey + float(rng.uniform(2, 5)) * (video - grey)).clamp(0, 1)


def noisy(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Gaussian noise of standard deviation 0.04 to 0.15, new in every frame."""
    noise = torch.from_numpy(rng.standard_normal(tuple(video.shape), dtype=np.float32))
    return (video + float(rng.uniform(0.04, 0.15)) * noise).clamp(0, 1)


def shuffled(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Frames in a random order, or every second or third one first and then those between."""
    stride = int(rng.integers(1, 4))
    if stride == 1:
        return video[torch.from_numpy(rng.permutation(len(video)))]
    return video[[i for start in rng.permutation(stride).tolist() for i in range(start, len(video), stride)]]


def frozen(video: Tensor, rng: np.random.Generator) -> Tensor:
    """One of its frames throughout."""
    return video[int(rng.integers(len(video)))].expand_as(video)


def h264(video: Tensor, fps: float) -> Tensor:
    """[T,3,H,W] in [0,1] written as H.264 and read again."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_mp4(file, video, fps, upscale=False)
        height, width = video.shape[-2:]
        return from_uint8(read_video(file).frames)[:, :, :height, :width]  # odd sides come back one longer


def reencoded(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Written as H.264 and read again."""
    return h264(video, 12.0)


def cut_short(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Without its first or its last frame."""
    if len(video) < 3:
        return video
    return video[1:] if rng.random() < 0.5 else video[:-1]


def held(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Its first or last frame stands a frame longer."""
    return torch.cat([video[:1], video] if rng.random() < 0.5 else [video, video[-1:]])


def at_another_rate(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Played at 1.2 to 2 times the rate, frames shown twice where there are not enough."""
    return resample_fps(video, 12.0, float(12 * rng.uniform(1.2, 2)))


FAULTS: Mapping[str, Change] = MappingProxyType({"blurred": blurred, "gridded": gridded, "over-saturated": oversaturated, "noisy": noisy, "shuffled": shuffled, "frozen": frozen})
HARMLESS: Mapping[str, Change] = MappingProxyType({"re-encoded": reencoded, "cut short": cut_short, "held": held, "at another rate": at_another_rate})
