"""The eye: what the simulated labelers see of a clip. A small network asked, colour by colour, "is there a thing of this colour, what shape, how does it move?".

It is trained on rendered clips only (`python -m recipes.shapes.train_eye`) and shares no code with the judge or with any reward model, so three readers of
the same pixels can disagree.

    look(video, prompts) -> Perception     probabilities that what was asked is there, and four plain signals (sharpness, brightness, movement, flashing)

How it works: features of small neighbourhoods -> one soft gate over places for each colour. How far the colour's gate opens says whether such a thing is there;
its size, centre and spread per frame, over time, say the motion; deeper features gathered under it say the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_model.checkpoint import load_weights
from base_model.errors import UserError
from recipes.shapes.prompts import COLORS, MOTIONS, SHAPES, ShapesPrompt

WEIGHTS = Path(__file__).parent / "weights" / "eye.safetensors"
COLOR_NAMES = tuple(COLORS)
MAX_THINGS = 2
BATCH = 16
SHAPE_FRAMES = 5  # a shape is read from this many frames spread over the clip
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class EyeLogits(NamedTuple):
    """Answers about B clips: every colour's presence, and shape and motion for N questions (one clip, one colour each)."""

    present: Tensor  # [B, 6], order of COLORS
    shape: Tensor  # [N, 4], order of SHAPES
    motion: Tensor  # [N, 11], order of MOTIONS


class Signals(NamedTuple):
    """Weight-free measures of B clips, each [B] and in about [0, 1]."""

    sharpness: Floats
    """Steepest edges: the 99th percentile of the luminance step between neighbouring pixels."""
    brightness: Floats
    """Mean luminance."""
    movement: Floats
    """Mean absolute change of a pixel from frame to frame once the change of the whole frame's mean is taken out."""
    flashing: Floats
    """Mean absolute change of the whole frame's mean luminance from frame to frame."""


@dataclass(frozen=True)
class Perception:
    """What the eye saw of B clips. The probabilities are [B, 2], nan where a prompt asks for one thing or (real clips) for none.

    Example: asked for one red circle moving left, shown a red bar moving left: color [[.99, nan]], shape [[.02, nan]], motion [[.97, nan]].
    """

    color: Floats
    """Probability that a thing of the colour asked for is there at all."""
    shape: Floats
    """Probability that it has the shape asked for, given that it is there."""
    motion: Floats
    """Probability that it moves as asked, given that it is there."""
    extra: Floats
    """[B] probability that things nobody asked for (other colours) are there too."""
    signals: Signals

    def __len__(self) -> int:
        return len(self.extra)

    def __getitem__(self, rows: Sequence[int] | slice) -> Perception:
        at = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, dtype=np.int64)
        return Perception(self.color[at], self.shape[at], self.motion[at], self.extra[at], Signals(*(s[at] for s in self.signals)))

    @property
    def right(self) -> Floats:
        """[B] probability that every attribute asked for is right, as if independent; nan where nothing was asked."""
        asked = ~np.isnan(self.color)
        each = np.where(asked, self.color * self.shape * self.motion, 1.0)
        return np.where(asked.any(1), each.prod(1) * (1 - self.extra), np.nan)


def mean_over_things(probability: Floats) -> Floats:
    """[B, 2] with nan for things nobody asked for -> [B]; nan where nothing was asked."""
    asked = ~np.isnan(probability)
    count = asked.sum(1)
    return np.where(count > 0, np.where(asked, probability, 0.0).sum(1) / np.maximum(count, 1), np.nan)


class EyeNet(nn.Module):
    """The network behind the eye (see the module's text). Any clip size from 1x16x16 up; lengths are fractions of the frame, so it reads all sizes alike."""

    def __init__(self, width: int = 24, deep: int = 48, time: int = 48) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, width, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU()
        )
        self.query = nn.Conv2d(width, len(COLOR_NAMES), 1)  # one row a colour: how much a place looks like it
        self.deep = nn.Sequential(
            nn.Conv2d(width + 1, deep, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(deep, deep, 3, padding=1), nn.SiLU(), nn.Conv2d(deep, deep, 3, padding=1), nn.SiLU()
        )
        self.shape = nn.Sequential(nn.Linear(2 * deep, 64), nn.SiLU(), nn.Linear(64, len(SHAPES)))
        self.present = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))
        self.steps = nn.ModuleList(nn.Conv1d(a, time, 3, padding=d, dilation=d, padding_mode="replicate") for a, d in ((12, 1), (time, 1), (time, 2), (time, 4)))
        self.motion = nn.Sequential(nn.Linear(2 * time, 64), nn.SiLU(), nn.Linear(64, len(MOTIONS)))

    def forward(self, video: Tensor, clip: Tensor, color: Tensor) -> EyeLogits:
        """video [B,T,3,H,W] in [0,1]; question n of N is about the thing of colour `color[n]` in clip `clip[n]` (both int64) -> EyeLogits."""
        b, t = video.shape[:2]
        seen = self.pixels((2 * video - 1).flatten(0, 1).contiguous(memory_format=torch.channels_last))  # [B*T, c, h, w]
        logit = self.query(seen).unflatten(0, (b, t)).transpose(1, 2)  # [B, 6, T, h, w]
        gate = torch.sigmoid(logit[clip, color])  # [N, T, h, w]
        picked = torch.linspace(0, t - 1, min(t, SHAPE_FRAMES)).round().long()  # [P]
        rows = clip[:, None] * t + picked  # [N, P]
        return EyeLogits(self._present(logit.flatten(3)), self._shape(seen[rows], gate[:, picked]), self._motion(self._moments(gate)))

    def _present(self, logit: Tensor) -> Tensor:
        """Gate logits [B, 6, T, h*w] -> [B, 6]: how strong each frame's strongest places are, and how many there are."""
        strongest = logit.topk(8, dim=3).values.mean(3)  # [B, 6, T]
        mass = torch.sigmoid(logit).mean(3)  # [B, 6, T]
        told = torch.stack([strongest.mean(2), strongest.amin(2), strongest.amax(2), mass.mean(2) * 10], dim=2)  # [B, 6, 4]
        return self.present(told)[..., 0] + strongest.mean(2)

    def _moments(self, gate: Tensor) -> Tensor:
        """[N, T, h, w] -> [N, T, 6]: size, centre x and y, spread x and y, and area of the gate; lengths in halves of the frame's shorter side."""
        h, w = gate.shape[2:]
        half = min(h, w) / 2
        y, x = (torch.arange(h) + 0.5 - h / 2) / half, (torch.arange(w) + 0.5 - w / 2) / half  # [h], [w]
        mass = gate.sum((2, 3)) + 1e-3  # [N, T]
        columns, rows = gate.sum(2), gate.sum(3)  # [N, T, w], [N, T, h]
        cx, cy = columns @ x / mass, rows @ y / mass  # [N, T]
        sx = (columns @ x.square() / mass - cx.square()).clamp_min(1e-6).sqrt()
        sy = (rows @ y.square() / mass - cy.square()).clamp_min(1e-6).sqrt()
        return torch.stack([mass.sqrt() / half, cx, cy, sx, sy, sx * sy], dim=2)

    def _motion(self, frames: Tensor) -> Tensor:
        """[N, T, 6] -> [N, 11]: the moments and their distance from the clip's mean, through convolutions over time."""
        x = torch.cat([frames, 4 * (frames - frames.mean(1, keepdim=True))], dim=2).transpose(1, 2)  # [N, 12, T]
        for i, step in enumerate(self.steps):
            x = F.silu(step(x)) + (x if i else 0)  # [N, time, T]
        return self.motion(torch.cat([x.mean(2), x.amax(2)], dim=1))

    def _shape(self, seen: Tensor, gate: Tensor) -> Tensor:
        """[N, P, c, h, w], [N, P, h, w] -> [N, 4]: deep features gathered under the gate in P frames, frames weighted by the gate's mass."""
        n, p = gate.shape[:2]
        under = gate.flatten(0, 1)[:, None]  # [N*P, 1, h, w]
        x = self.deep(torch.cat([seen.flatten(0, 1) * under, under], dim=1).contiguous(memory_format=torch.channels_last))  # [N*P, deep, h/2, w/2]
        weight = F.adaptive_max_pool2d(under, x.shape[2:])  # [N*P, 1, h/2, w/2]
        mass = weight.sum((2, 3)) + 1e-3  # [N*P, 1]
        gathered = torch.cat([(x * weight).sum((2, 3)) / mass, (x * weight).amax((2, 3))], dim=1)  # [N*P, 2 deep]
        share = mass.view(n, p, 1) / mass.view(n, p, 1).sum(1, keepdim=True)  # [N, P, 1]
        return self.shape((gathered.view(n, p, -1) * share).sum(1))


def signals(video: Tensor) -> Signals:
    """[B,T,3,H,W] in [0,1] -> Signals. A single frame has no movement and no flashing."""
    luminance = (video * video.new_tensor([0.299, 0.587, 0.114]).view(1, 1, 3, 1, 1)).sum(2)  # [B, T, H, W]
    across = torch.cat([luminance.diff(dim=2).abs().flatten(1), luminance.diff(dim=3).abs().flatten(1)], dim=1)  # [B, ...]
    count = max(1, across.shape[1] // 100)
    level = luminance.mean((2, 3))  # [B, T]
    if video.shape[1] == 1:
        still = torch.zeros(len(video))
        return Signals(*(_floats(x) for x in (across.topk(count, dim=1).values.amin(1), level.mean(1), still, still)))
    change = level.diff(dim=1)  # [B, T-1]
    inside = (luminance.diff(dim=1) - change[:, :, None, None]).abs().mean((1, 2, 3))
    return Signals(*(_floats(x) for x in (across.topk(count, dim=1).values.amin(1), level.mean(1), inside, change.abs().mean(1))))


class Eye:
    """The shipped eye. Not differentiable; runs on the CPU.

    Example: `Eye.load().look(video, prompts).right` -> [B] probabilities that each clip is what its prompt asked for.
    """

    def __init__(self, net: EyeNet) -> None:
        self.net = net.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Eye:
        """Raises UserError where the file is missing, pickled or belongs to another network."""
        tensors, _ = load_weights(path)
        net = EyeNet()
        expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
        if expected != {name: tuple(value.shape) for name, value in tensors.items()}:
            raise UserError(f"the weights do not fit the eye's network, {path}. Train them again with `python -m recipes.shapes.train_eye`")
        net.load_state_dict(tensors)
        return cls(net)

    @torch.inference_mode()
    def answer(self, video: Tensor, clip: Sequence[int], color: Sequence[int]) -> EyeLogits:
        """[B,T,3,H,W] in [0,1]; N questions as in `EyeNet.forward` -> EyeLogits. Works through small batches, which is faster on a CPU."""
        which, asked = torch.tensor(clip, dtype=torch.long), torch.tensor(color, dtype=torch.long)
        order = which.argsort(stable=True)
        parts = []
        for start in range(0, len(video), BATCH):
            here = order[(which[order] >= start) & (which[order] < start + BATCH)]
            parts.append(self.net(video[start : start + BATCH], which[here] - start, asked[here]))
        back = order.argsort()
        return EyeLogits(torch.cat([p.present for p in parts]), torch.cat([p.shape for p in parts])[back], torch.cat([p.motion for p in parts])[back])

    def look(self, video: Tensor, prompts: Sequence[ShapesPrompt]) -> Perception:
        """[B,T,3,H,W] in [0,1] and B prompts -> Perception. A single frame shows no motion: every motion is given the same probability.

        Raises ValueError where the numbers of clips and prompts differ or are zero.
        """
        if not prompts or len(video) != len(prompts):
            raise ValueError(f"{len(video)} clips but {len(prompts)} prompts")
        asked = [(b, i, thing) for b, prompt in enumerate(prompts) for i, thing in enumerate(prompt.things)]
        colors = [COLOR_NAMES.index(thing.color) for _, _, thing in asked]
        answers = self.answer(video, [b for b, _, _ in asked], colors)
        present = _floats(answers.present.sigmoid())  # [B, 6]
        shape, motion = _floats(answers.shape.softmax(-1)), _floats(answers.motion.softmax(-1))  # [N, 4], [N, 11]
        if video.shape[1] == 1:
            motion[:] = 1 / len(MOTIONS)
        color_right, shape_right, motion_right = np.full((3, len(video), MAX_THINGS), np.nan)
        absent = 1 - present  # [B, 6]
        for n, (b, i, thing) in enumerate(asked):
            color_right[b, i] = present[b, colors[n]]
            shape_right[b, i] = shape[n, SHAPES.index(thing.shape)]
            motion_right[b, i] = motion[n, MOTIONS.index(thing.motion)]
            absent[b, colors[n]] = 1.0
        return Perception(color_right, shape_right, motion_right, 1 - absent.prod(1), signals(video))


def look_at_real(video: Tensor) -> Perception:
    """[B,T,3,H,W] of real footage -> a Perception with the signals only: nothing was asked in the words of the built-in world."""
    nothing = np.full((len(video), MAX_THINGS), np.nan)
    return Perception(nothing, nothing, nothing, np.zeros(len(video)), signals(video))


def _floats(x: Tensor) -> Floats:
    return x.detach().double().cpu().numpy()
