"""A clip that hashes can tell from others, for tests of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def scene(seed: int, frames: int = 25, height: int = 48, width: int = 64) -> Tensor:
    """Blobs that drift over a textured ground. [T,3,H,W]"""
    rng = np.random.default_rng(seed)
    ground = F.interpolate(torch.from_numpy(rng.random((1, 3, 5, 6))).float(), size=(height, width), mode="bicubic")[0]
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    clip = ground.clamp(0, 1).repeat(frames, 1, 1, 1)
    for _ in range(3):
        (cx, cy, vx, vy), colour = rng.uniform([0.1, 0.1, -0.4, -0.4], [0.9, 0.9, 0.4, 0.4]), torch.from_numpy(rng.random(3)).float()
        for t in range(frames):
            inside = ((x - cx - vx * t / frames) ** 2 + (y - cy - vy * t / frames) ** 2 < 0.02).float()
            clip[t] = clip[t] * (1 - inside) + colour[:, None, None] * inside
    return clip
