"""The nouns every package shares: the shape of a clip, of its latents, the conditions, and what a video model is.

Letters: B clips, T frames, C F H W latent channels/frames/height/width, L D text tokens/width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from base_model.paths import Path


@dataclass(frozen=True)
class ClipShape:
    """Frames, height and width of a clip in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class LatentSpec:
    """How pixels become latents: `channels` per position, one latent frame for the first frame and one for every `time_stride` after it."""

    channels: int
    time_stride: int
    space_stride: int

    def shape(self, clip: ClipShape) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a clip. Raises ValueError where the clip does not fall on the grid or holds no pixel."""
        if min(clip.frames, clip.height, clip.width) < 1:
            raise ValueError(f"clip {clip} holds no pixel: frames, height and width must be positive")
        if (clip.frames - 1) % self.time_stride or clip.height % self.space_stride or clip.width % self.space_stride:
            raise ValueError(f"clip {clip} does not fit the latent grid: frames must be 1 + a multiple of {self.time_stride}, sides a multiple of {self.space_stride}")
        return self.channels, 1 + (clip.frames - 1) // self.time_stride, clip.height // self.space_stride, clip.width // self.space_stride


@dataclass(frozen=True)
class Known:
    """The latents of B clips that a visual prompt gives: they have noise level 0 and no loss (`prompts/conditions.py`)."""

    values: Tensor  # [B,C,F,H,W], read where `mask` is True
    mask: Tensor  # [B,F,H,W] bool, whole patches of the network

    def to(self, device: torch.device) -> Known:
        return Known(self.values.to(device), self.mask.to(device))

    def __getitem__(self, rows: Tensor) -> Known:
        return Known(self.values[rows], self.mask[rows])


@dataclass(frozen=True)
class Conditioning:
    """What a model is told about B clips.

    Example: two prompts of at most five tokens: `text` [2, 5, 384], `mask` [2, 5] with False behind the end of the shorter one.
    """

    prompts: tuple[str, ...]  # B
    text: Tensor  # [B, L, D]
    mask: Tensor  # [B, L] bool
    pooled: Tensor | None = None  # [B, P]
    known: Known | None = None  # B; None where the text is all that is told
    image: Tensor | None = None  # [B, M, E] states of an image encoder, for a network that is told them beside its text

    def __len__(self) -> int:
        return len(self.prompts)

    def repeat(self, n: int) -> Conditioning:
        """Each prompt n times in a row, B -> B n."""
        return self[torch.arange(len(self)).repeat_interleave(n)]

    def followed_by(self, other: Conditioning) -> Conditioning:
        """The conditions of both, clips of `other` last. Shorter texts are padded. Raises ValueError where only one of them holds `pooled`, `known` or `image`."""
        if any((getattr(self, name) is None) != (getattr(other, name) is None) for name in ("pooled", "known", "image")):
            raise ValueError("conditions that hold different things cannot be one batch")
        longest = max(self.text.shape[1], other.text.shape[1])
        text, mask = ([pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])) for part in parts] for parts in ((self.text, other.text), (self.mask, other.mask)))
        pooled, image = (None if a is None or b is None else torch.cat([a, b]) for a, b in ((self.pooled, other.pooled), (self.image, other.image)))
        known = None if self.known is None or other.known is None else Known(torch.cat([self.known.values, other.known.values]), torch.cat([self.known.mask, other.known.mask]))
        return Conditioning((*self.prompts, *other.prompts), torch.cat(text), torch.cat(mask), pooled, known, image)

    def to(self, device: torch.device) -> Conditioning:
        """The same conditions with their tensors on `device`."""
        pooled, image = (None if part is None else part.to(device) for part in (self.pooled, self.image))
        known = None if self.known is None else self.known.to(device)
        return Conditioning(self.prompts, self.text.to(device), self.mask.to(device), pooled, known, image)

    @overload
    def __getitem__(self, index: slice) -> Conditioning: ...
    @overload
    def __getitem__(self, index: Tensor) -> Conditioning: ...
    @overload
    def __getitem__(self, index: Sequence[int]) -> Conditioning: ...
    def __getitem__(self, index: slice | Tensor | Sequence[int]) -> Conditioning:
        rows = (torch.arange(len(self))[index] if isinstance(index, slice) else torch.as_tensor(index)).to(self.text.device)
        pooled, image = (None if part is None else part[rows] for part in (self.pooled, self.image))
        known = None if self.known is None else self.known[rows]
        return Conditioning(tuple(self.prompts[i] for i in rows.tolist()), self.text[rows], self.mask[rows], pooled, known, image)


class VideoModel(Protocol):
    """A latent video generator on a probability path. `network` is the only part that trains; LoRA goes there."""

    @property
    def path(self) -> Path: ...
    @property
    def latents(self) -> LatentSpec: ...
    @property
    def network(self) -> nn.Module: ...

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x_t [B,C,F,H,W], t [B] -> velocity u [B,C,F,H,W], float32."""
        ...

    def encode_text(self, prompts: Sequence[str]) -> Conditioning: ...
    def encode(self, video: Tensor) -> Tensor:
        """[B,T,3,H,W] in [0,1] -> latents [B,C,F,H,W] of about unit variance."""
        ...

    def decode(self, x0: Tensor) -> Tensor:
        """Latents [B,C,F,H,W] -> [B,T,3,H,W] in [0,1]; differentiable."""
        ...


class TrainableModel(VideoModel, Protocol):
    """What a recipe asks of a model beyond `VideoModel`: a network that an adapter can wrap, and what only the model knows of how it is adapted and sampled."""

    network: nn.Module

    @property
    def device(self) -> torch.device:
        """Where the network is; conditions and noise go there."""
        ...

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents that are one token of the network."""
        ...

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Ends of the names of the linears that an adapter goes onto (`lora.py: add_lora`)."""
        ...

    @property
    def mlp_targets(self) -> tuple[str, ...]:
        """Those of the MLPs, which an adapter may go onto as well."""
        ...

    def times(self, steps: int, clip: ClipShape) -> Tensor:
        """The model's own sampling grid, [steps + 1] from noise to 0. May raise ValueError for a clip, or a number of steps, that it is not sampled in."""
        ...
