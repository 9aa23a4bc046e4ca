"""Made-up footage: clips with the statistics of filmed ones, of nothing in particular.

Dead leaves (Lee, Mumford & Huang 2001, "Occlusion models for natural images"): discs and boxes of every size that hide one another have the edges, flat parts and scale
invariance of photographs. Pink noise has their spectrum where there are no edges. A camera pans and zooms over such a picture, and a few pieces of others move before it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from base_model.types import ClipShape

CANVAS = 128  # pixels of a picture, at scale 1 twice what is seen at 32 pixels
_FINER = 3  # samples of a picture per pixel and axis, averaged


def sample_footage(rng: np.random.Generator, clip: ClipShape) -> Tensor:
    """[T,3,H,W] in [0,1]. In three of ten clips the camera stands; one in four is black and white."""
    u = torch.linspace(-1, 1, clip.frames) if clip.frames > 1 else torch.zeros(1)
    stands = bool(rng.random() < 0.3)
    scale = _scale(rng)
    video = _view(_picture(rng), u, clip, rng, scale=scale, speed=0.0 if stands else rng.exponential(0.5) * scale, zoom=0.0 if stands else rng.normal(0, 0.1))
    for _ in range(int(rng.integers(stands, 4))):
        scale = _scale(rng)
        piece = _view(_picture(rng), u, clip, rng, scale=scale, speed=rng.exponential(0.2) * scale, zoom=rng.normal(0, 0.1))
        video = video + _mask(u, clip, rng) * (piece - video)
    return _graded(video, rng)


def _scale(rng: np.random.Generator) -> float:
    """Part of a picture that is seen."""
    return math.exp(rng.uniform(math.log(0.12), math.log(0.9)))


def _picture(rng: np.random.Generator) -> Tensor:
    """[3,CANVAS,CANVAS]: leaves, noise, or one through the other."""
    kind = rng.random()
    if kind < 0.5:
        return _dead_leaves(rng)
    if kind < 0.7:
        return _pink_noise(rng)
    return torch.lerp(_dead_leaves(rng), _pink_noise(rng), rng.uniform(0.15, 0.6))


def _dead_leaves(rng: np.random.Generator) -> Tensor:
    """[3,CANVAS,CANVAS]; radii follow 1/r^2, so that no scale stands out."""
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    picture = np.broadcast_to(rng.random((3, 1, 1), np.float32), (3, CANVAS, CANVAS)).copy()
    smallest, contrast, colour = math.exp(rng.uniform(0, math.log(8))), rng.uniform(0.08, 0.45), rng.uniform(0, 0.25)
    for _ in range(int(rng.integers(40, 400))):
        radius = min(CANVAS / 2, smallest / rng.uniform(2 * smallest / CANVAS, 1))
        stretch, (cx, cy) = math.exp(rng.normal(0, 0.5)), rng.uniform(0, CANVAS, 2)
        left, right = (int(np.clip(cx + side * (radius * stretch + 2), 0, CANVAS)) for side in (-1, 1))
        top, bottom = (int(np.clip(cy + side * (radius / stretch + 2), 0, CANVAS)) for side in (-1, 1))
        dx, dy = x[top:bottom, left:right] - cx, y[top:bottom, left:right] - cy
        disc = np.hypot(dx / stretch, dy * stretch) - radius
        distance = disc if rng.random() < 0.6 else np.maximum(np.abs(dx) - radius * stretch, np.abs(dy) - radius / stretch)
        shade = 0.5 + contrast * rng.standard_normal() + colour * rng.standard_normal((3, 1, 1))
        part = picture[:, top:bottom, left:right]
        part += np.clip(0.5 - distance, 0, 1) * (shade.clip(0, 1).astype(np.float32) - part)
    return torch.from_numpy(picture)


def _pink_noise(rng: np.random.Generator) -> Tensor:
    """[3,CANVAS,CANVAS] with an amplitude of 1/f^a, a of 0.5 to 1.6, mostly grey."""
    frequency = np.hypot(np.fft.fftfreq(CANVAS)[:, None], np.fft.fftfreq(CANVAS))
    frequency[0, 0] = 1 / CANVAS
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((4, CANVAS, CANVAS))) * frequency ** -rng.uniform(0.5, 1.6)).real
    noise /= noise.std((1, 2), keepdims=True)
    picture = rng.uniform(0.2, 0.8, (3, 1, 1)) + (noise[:1] + noise[1:] * rng.uniform(0, 0.6)) * rng.uniform(0.03, 0.3)
    return torch.from_numpy(picture.clip(0, 1).astype(np.float32))


def _view(picture: Tensor, u: Tensor, clip: ClipShape, rng: np.random.Generator, *, scale: float, speed: float, zoom: float) -> Tensor:
    """What a camera sees that passes over a picture at times u [T] in [-1,1], on a path that bends a little: [T,3,H,W]."""
    angle, bend = rng.uniform(0, 2 * math.pi), rng.uniform(-0.3, 0.3)
    side = min(clip.height, clip.width)
    seen = scale * torch.exp(zoom * u)  # [T]
    affine = torch.zeros(len(u), 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = seen * clip.width / side, seen * clip.height / side
    affine[:, 0, 2] = speed * math.cos(angle) * (u + bend * u * u)
    affine[:, 1, 2] = speed * math.sin(angle) * (u - bend * u * u)
    places = F.affine_grid(affine, [len(u), 3, _FINER * clip.height, _FINER * clip.width], align_corners=False)
    fine = F.grid_sample(picture.expand(len(u), -1, -1, -1), places, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(fine, _FINER)


def _mask(u: Tensor, clip: ClipShape, rng: np.random.Generator) -> Tensor:
    """Where a moving ellipse or box is, [T,1,H,W]; it goes straight or sways."""
    side = min(clip.height, clip.width)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) * n / side for n in (clip.height, clip.width)), indexing="ij")
    (cx, cy), (vx, vy) = rng.uniform(-0.7, 0.7, 2), rng.normal(0, 0.3, 2)
    radius, stretch = rng.uniform(0.1, 0.6), math.exp(rng.normal(0, 0.3))
    path = u if rng.random() < 0.6 else torch.sin(rng.uniform(2, 6) * u + rng.uniform(0, 6))  # [T]
    dx, dy = x - (cx + vx * path)[:, None, None], y - (cy + vy * path)[:, None, None]  # [T,H,W]
    distance = torch.hypot(dx / stretch, dy * stretch) if rng.random() < 0.7 else torch.maximum(dx.abs() / stretch, dy.abs() * stretch)
    return ((radius - distance) * side / 2 + 0.5).clamp(0, 1)[:, None]


def _graded(video: Tensor, rng: np.random.Generator) -> Tensor:
    """Sometimes black and white, sometimes of another contrast, sometimes grainy."""
    if rng.random() < 0.25:
        video = video.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    if rng.random() < 0.4:
        video = (video - 0.5) * rng.uniform(0.6, 1.6) + 0.5 + rng.normal(0, 0.1)
    if rng.random() < 0.3:
        grain: NDArray[np.float32] = rng.standard_normal(tuple(video.shape), np.float32)
        video = video + rng.uniform(0, 0.025) * torch.from_numpy(grain)
    return video.clamp(0, 1)
