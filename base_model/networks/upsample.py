"""Super-resolution stages of a cascade, in space or in time (Imagen Video: Ho et al. 2022, arXiv 2210.02303, sections 2.2 to 2.5).

A stage denoises the large clip beside the small one, upsampled to the same grid and corrupted by noise at a level that the network is told. It works on pixels: the
codec gives clips back less exactly than bilinear upsampling does. All sides double. Letters: B clips, T frames, H W height and width, C channels, N tokens of all
clips together, c values of a token, w width, S clips of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate

from base_model.networks.dit import Beside, DiT, DiTConfig
from base_model.networks.layers import time_features
from base_model.networks.packing import Segments
from base_model.networks.temporal import TemporalDiT
from base_model.paths import Path, add_noise

Axis = Literal["space", "time"]


def upsample_space(video: Tensor) -> Tensor:
    """Bilinear, [B,T,3,H,W] -> [B,T,3,2H,2W]."""
    return interpolate(video.flatten(0, 1), scale_factor=2.0, mode="bilinear", align_corners=False).unflatten(0, video.shape[:2])


def shrink_space(video: Tensor) -> Tensor:
    """Means of 2x2 pixels, [B,T,3,2H,2W] -> [B,T,3,H,W]. Raises ValueError for an odd side."""
    if video.shape[-1] % 2 or video.shape[-2] % 2:
        raise ValueError(f"frames of {video.shape[-2]}x{video.shape[-1]} cannot be halved: both sides must be even")
    return avg_pool3d(video, (1, 2, 2))


def upsample_time(video: Tensor) -> Tensor:
    """Between two frames comes their mean, [B,T,3,H,W] -> [B,2T-1,3,H,W]."""
    between = (video[:, :-1] + video[:, 1:]) / 2  # [B,T-1,3,H,W]
    return torch.cat([torch.stack([video[:, :-1], between], dim=2).flatten(1, 2), video[:, -1:]], dim=1)


def shrink_time(video: Tensor) -> Tensor:
    """Every second frame, the first and the last included, [B,2T-1,3,H,W] -> [B,T,3,H,W]. Raises ValueError for an even number of frames."""
    if video.shape[1] % 2 == 0:
        raise ValueError(f"{video.shape[1]} frames cannot be halved: their number must be odd, so that the last one stays")
    return video[:, ::2]


class Resampling(NamedTuple):
    """How a clip becomes small, and how the small one comes back to the large grid."""

    shrink: Callable[[Tensor], Tensor]
    upsample: Callable[[Tensor], Tensor]


RESAMPLING: dict[Axis, Resampling] = {"space": Resampling(shrink_space, upsample_space), "time": Resampling(shrink_time, upsample_time)}


def corrupt(path: Path, low: Tensor, level: Tensor, eps: Tensor) -> Tensor:
    """Noise conditioning augmentation (Ho et al. 2021, arXiv 2106.15282, section 4.1): the path's own noise at time `level`, whatever is denoised. low, eps [B, ...], level [B]."""
    return add_noise(path, low, eps, level)


def random_crop(clips: Sequence[Tensor], side: int, generator: torch.Generator) -> list[Tensor]:
    """The same window of at most side x side out of each of the clips [...,H,W], which agree in H and W; all frames."""
    height, width = clips[0].shape[-2:]
    top, left = (int(torch.randint(max(0, size - side) + 1, (), generator=generator)) for size in (height, width))
    return [clip[..., top : top + side, left : left + side] for clip in clips]


class Expected(NamedTuple):
    """What is known of a clip before the network speaks, if latents were Gaussian. All [S]."""

    centre: Tensor  # times the corrupted small clip: the clip one expects, m
    alpha: Tensor  # the noisy clip, less alpha m, is the part that carries news, y
    slope: Tensor  # d alpha / dt
    pull: Tensor  # the expected velocity is slope m + pull y
    spread_in: Tensor  # standard deviation of y
    spread_out: Tensor  # standard deviation of what the expected velocity misses


def expect(path: Path, t: Tensor, level: Tensor, detail: Tensor) -> Expected:
    """Preconditioning (Karras et al. 2022, arXiv 2206.00364, eq. 7 and appendix B.6) about the small clip instead of about zero, on any path.

    x0 = low + r with low ~ N(0, 1) and r ~ N(0, detail^2); told are alpha(level) low + sigma(level) n and x_t. t, level [S]; detail [].
    """
    told = path.alpha(level).square() + path.sigma(level).square()  # [S]
    variance = detail.square() + path.sigma(level).square() / told  # [S] of x0 about m
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    d_alpha, d_sigma = path.velocity(one, zero, t), path.velocity(zero, one, t)
    power = alpha.square() * variance + sigma.square()  # [S] of y
    pull = (alpha * d_alpha * variance + sigma * d_sigma) / power  # [S]
    return Expected(path.alpha(level) / told, alpha, d_alpha, pull, power.sqrt(), (variance / power).sqrt() * (alpha * d_sigma - d_alpha * sigma).abs())


class Upsampler(nn.Module):
    """One stage. tokens and low (N,c), t and level (S,), all else as in `DiT` -> velocity (N,c).

    Channel concatenation: the tokens' matrix and `low_in` are the two halves of one matrix on (noisy, low). `network` attends jointly (DiT) or apart in space and time
    (TemporalDiT). It says what the expected velocity misses, in units of what that is worth: a fresh stage already gives a blurred clip back.
    """

    detail: Tensor

    def __init__(self, network: DiT | TemporalDiT, path: Path) -> None:
        super().__init__()
        w = network.config.width
        self.config: DiTConfig = network.config
        self.path = path
        self.network = network
        self.low_in = nn.Linear(network.config.token_width, w)
        self.level_in = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, w))
        self.register_buffer("detail", torch.tensor(0.1))  # standard deviation of what upsampling loses, measured before training

    def forward(self, tokens: Tensor, low: Tensor, positions: Tensor, segments: Segments, t: Tensor, level: Tensor, text: Tensor, text_segments: Segments) -> Tensor:
        expected = expect(self.path, t, level, self.detail)
        centre, alpha, slope, pull, spread_in, spread_out = (segments.spread(part)[:, None] for part in expected)  # [N,1] each
        news = tokens - alpha * centre * low  # [N,c]
        beside = Beside(self.low_in(low), self.level_in(time_features(level, self.config.width)))  # [N,w], [S,w]
        missed = self.network(news / spread_in, positions, segments, t, text, text_segments, beside=beside)  # [N,c]
        return slope * centre * low + pull * news + spread_out * missed
