"""Captioned clips of the built-in world, drawn one by one from their own random streams: clip i is the same however many are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from base_model.types import ClipShape
from recipes.shapes.events import sample_event_pair
from recipes.shapes.render import sample_clip_shape, sample_curated_pair, sample_messy_pair

Kind = Literal["messy", "curated"]


@dataclass(frozen=True)
class ClipSet:
    """N captions and N clips of native sizes, uint8 [T,3,H,W]."""

    texts: tuple[str, ...]
    videos: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """sha256 over captions and pixels."""
        digest = hashlib.sha256()
        for text, video in zip(self.texts, self.videos, strict=True):
            digest.update(text.encode())
            digest.update(str(tuple(video.shape)).encode())
            digest.update(video.numpy().tobytes())
        return digest.hexdigest()


def draw_clips(
    kind: Kind, number: int, *, seed: int, shape: ClipShape | None = None, events: float = 0.0, progress: Callable[[Iterator[int]], Iterator[int]] = lambda it: it
) -> ClipSet:
    """`number` captioned clips: "messy" as a base model's data are (wrong captions, blur, flashing), "curated" right, sharp and calm.

    `shape` fixes the size of all; without it sizes are native (`render.sample_clip_shape`). `events`: share of clips that show one (`events.py`).
    """
    texts, videos = [], []
    for index in progress(iter(range(number))):
        rng = np.random.default_rng([seed, index, 0 if kind == "messy" else 1])
        if events and rng.random() < events:
            text, video = sample_event_pair(rng, shape)
        else:
            clip = shape or sample_clip_shape(rng)
            text, video = sample_messy_pair(rng, clip)[:2] if kind == "messy" else sample_curated_pair(rng, clip)
        texts.append(text)
        videos.append((video * 255).round().to(torch.uint8))
    return ClipSet(tuple(texts), tuple(videos))


def by_shape(tensors: Sequence[Tensor]) -> dict[tuple[int, ...], list[int]]:
    """Indices of the tensors of each shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tuple(tensor.shape), []).append(index)
    return groups
