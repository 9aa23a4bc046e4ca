"""Weight-free signals of a clip: brightness, colour, sharpness, motion, flicker. They do not see the prompt.

Used as the signal-only floor that a reward model must beat, as extra inputs of its heads, and to rank real clips in simulation. All are
differentiable almost everywhere, finite for one frame (motion and flicker are then 0), and defined for any size from 8x8 up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SIGNALS = {
    "brightness": "mean luma (Rec. 601)",
    "contrast": "standard deviation of luma within a frame, mean over frames",
    "saturation": "mean of max - min over the colour channels",
    "colourfulness": "Hasler & Suesstrunk 2003, on [0,1] pixels",
    "dark_share": "soft share of pixels darker than 0.05",
    "bright_share": "soft share of pixels brighter than 0.95",
    "red": "mean red minus luma",
    "blue": "mean blue minus luma",
    "sharpness": "mean absolute Laplacian of luma",
    "edge_peak": "mean over frames of the 98th percentile of the gradient's magnitude",
    "noise": "median absolute diagonal detail (Haar HH) over 0.6745",
    "grid": "column and row periodicity of 8 pixels in the gradient: the dot and grid artefact",
    "motion": "mean absolute change of a pixel between neighbouring frames, after the frame's mean change is taken out",
    "motion_peak": "largest such change over the clip's steps",
    "motion_share": "soft share of pixels that ever move by more than 0.1",
    "unsteadiness": "standard deviation over steps of that change",
    "acceleration": "mean absolute second difference in time",
    "flicker": "mean absolute change of the frame's mean luma",
    "flicker_peak": "largest change of the frame's mean luma",
    "red_flicker": "mean absolute change of the frame's mean red excess",
    "first_to_last": "mean absolute difference of the first and the last frame",
    "centre": "luma contrast of the middle half of the frame against its border",
}
LUMA = (0.299, 0.587, 0.114)


def signal_features(video: Tensor) -> Tensor:
    """video [B,T,3,H,W] in [0,1] -> [B, len(SIGNALS)] float32, in the order of SIGNALS."""
    luma = torch.einsum("btchw,c->bthw", video, video.new_tensor(LUMA))  # [B, T, H, W]
    return torch.stack([*_colour(video, luma), *_detail(luma), *_time(video, luma), _centre(luma)], dim=-1)  # [B, S]


def _colour(video: Tensor, luma: Tensor) -> list[Tensor]:
    red, green, blue = video.unbind(2)  # [B, T, H, W]
    rg, yb = red - green, (red + green) / 2 - blue
    spread = (_variance(rg) + _variance(yb)).clamp(min=1e-8).sqrt()  # [B]
    offset = (_mean(rg).square() + _mean(yb).square() + 1e-8).sqrt()
    return [
        _mean(luma),
        (luma - luma.mean((-1, -2), keepdim=True)).square().mean((-1, -2)).clamp(min=1e-8).sqrt().mean(-1),
        _mean(video.amax(2) - video.amin(2)),
        spread + 0.3 * offset,
        _mean(torch.sigmoid((0.05 - luma) * 50)),
        _mean(torch.sigmoid((luma - 0.95) * 50)),
        _mean(red - luma),
        _mean(blue - luma),
    ]


def _detail(luma: Tensor) -> list[Tensor]:
    dx, dy = luma.diff(dim=-1), luma.diff(dim=-2)  # [B, T, H, W-1], [B, T, H-1, W]
    laplacian = dx.diff(dim=-1)[..., 1:-1, :] + dy.diff(dim=-2)[..., 1:-1]  # [B, T, H-2, W-2]
    magnitude = (dx[..., 1:, :].square() + dy[..., 1:].square() + 1e-8).sqrt().flatten(2)  # [B, T, P]
    top = magnitude.topk(max(1, magnitude.shape[-1] // 50), dim=-1).values[..., -1]  # [B, T]
    h, w = luma.shape[-2] // 2 * 2, luma.shape[-1] // 2 * 2
    even = luma[..., :h, :w]
    diagonal = (even[..., ::2, ::2] - even[..., 1::2, ::2] - even[..., ::2, 1::2] + even[..., 1::2, 1::2]) / 2  # [B, T, H/2, W/2]
    return [
        laplacian.abs().flatten(1).mean(-1),
        top.mean(-1),
        diagonal.abs().flatten(1).median(-1).values / 0.6745,
        (_period(dx.abs().mean((1, 2))) + _period(dy.abs().mean((1, 3)))) / 2,
    ]


def _period(profile: Tensor) -> Tensor:
    """How much stronger edges are at one of the eight phases of an 8-pixel grid than on average, [B,P] -> [B]."""
    if profile.shape[-1] < 16:
        return torch.zeros_like(profile[:, 0])
    phases = profile[:, : profile.shape[-1] // 8 * 8].unflatten(-1, (-1, 8)).mean(1)  # [B, 8]
    return (phases.amax(-1) - phases.mean(-1)) / (phases.mean(-1) + 0.01)


def _time(video: Tensor, luma: Tensor) -> list[Tensor]:
    if video.shape[1] == 1:
        return [luma.new_zeros(len(luma))] * 9
    mean = luma.mean((2, 3))  # [B, T]
    excess = video[:, :, 0].mean((2, 3)) - mean  # [B, T]
    centred = luma - mean[:, :, None, None]
    change = centred.diff(dim=1).abs()  # [B, T-1, H, W]
    per_step = change.mean((2, 3))  # [B, T-1]
    step, red = mean.diff(dim=1).abs(), excess.diff(dim=1).abs()  # [B, T-1]
    second = centred.diff(n=2, dim=1).abs().flatten(1).mean(-1) if video.shape[1] > 2 else torch.zeros_like(mean[:, 0])
    return [
        per_step.mean(-1),
        per_step.amax(-1),
        torch.sigmoid((change.amax(1) - 0.1) * 40).mean((1, 2)),
        (per_step.var(-1, correction=0) + 1e-10).sqrt(),
        second,
        step.mean(-1),
        step.amax(-1),
        red.mean(-1),
        (video[:, -1] - video[:, 0]).abs().flatten(1).mean(-1),
    ]


def _centre(luma: Tensor) -> Tensor:
    h, w = luma.shape[-2:]
    inner = luma[..., h // 4 : h - h // 4, w // 4 : w - w // 4]
    whole, part = luma.flatten(1), inner.flatten(1)
    border = (whole.sum(-1) - part.sum(-1)) / (whole.shape[-1] - part.shape[-1])
    return part.mean(-1) - border


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(-1)


def _variance(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return (x - x.mean(-1, keepdim=True)).square().mean(-1)


def subsampled_chroma(video: Tensor) -> Tensor:
    """Colour at half the resolution of brightness, as 4:2:0 video keeps it and people see it: [B,T,3,H,W] -> the same size. Encoding it again takes little more away."""
    luma = torch.einsum("btchw,c->bthw", video, video.new_tensor(LUMA))[:, :, None]  # [B,T,1,H,W]
    chroma = (video - luma).flatten(0, 1)  # [B T,3,H,W]
    half = F.avg_pool2d(chroma, 2, ceil_mode=True, count_include_pad=False)
    full = F.interpolate(half, size=chroma.shape[-2:], mode="bilinear", align_corners=False)
    return (luma + full.unflatten(0, video.shape[:2])).clamp(0, 1)
