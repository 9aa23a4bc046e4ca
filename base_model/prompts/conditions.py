"""Visual prompts: pixels that are given become latents that are known, and the model makes the rest.

One idea for all (an image to begin with, frames to go on from or to arrive at, a loop, a hole to fill, a margin to add): a canvas of the size of the clip, and a mask of the
pixels on it that are given. A token all of whose pixels are given is known: it has noise level 0, its clean value, and no loss. The rest of the canvas is filled before it is
encoded, so that nothing leaks through the autoencoder from what is to be made, in training as in use.

Letters: B clips, T frames, C F H W latent channels/frames/height/width, n tokens of a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from base_model.networks.packing import Patch, patchify
from base_model.paths import Path, velocity_towards
from base_model.types import ClipShape, Known, LatentSpec

Kind = Literal["image", "head", "tail", "ends", "hole", "margin"]
"""What a training clip gives of itself: its first frame; some frames from the first on; some up to the last; both; all but a box; only a box."""
KINDS: tuple[Kind, ...] = get_args(Kind)


class Canvas(NamedTuple):
    """Pixels of a clip and which of them are given. `video` may hold anything where nothing is given."""

    video: Tensor  # [T,3,H,W] in [0,1]
    given: Tensor  # [T,H,W] bool


class Encoder(Protocol):
    """What encodes clips into latents."""

    @property
    def latents(self) -> LatentSpec: ...
    def encode(self, video: Tensor) -> Tensor: ...


def encode_known(model: Encoder, canvases: Sequence[Canvas], patch: Patch) -> Known:
    """B canvases of one size -> the latents they give."""
    values = model.encode(torch.stack([fill(canvas) for canvas in canvases]))  # [B,C,F,H,W]
    mask = known_mask(torch.stack([canvas.given for canvas in canvases]), model.latents, patch)  # [B,F,H,W]
    return Known(values, mask.to(values.device))


def fill(canvas: Canvas) -> Tensor:
    """A whole clip [T,3,H,W] from what is given: the mean colour of a frame's given pixels where the frame gives some, else the frame before it (or the next that gives any)."""
    video, given = canvas.video, canvas.given[:, None].to(canvas.video)  # [T,3,H,W], [T,1,H,W]
    count = given.sum((2, 3), keepdim=True)  # [T,1,1,1]
    mean = (video.where(given > 0, 0)).sum((2, 3), keepdim=True) / count.clamp_min(1)  # [T,3,1,1]
    filled = torch.where(given > 0, video, mean)  # [T,3,H,W]
    some = (count > 0).flatten()  # [T]
    if not some.any():
        return torch.full_like(video, 0.5)
    frames = torch.arange(len(video), device=video.device)
    earlier = torch.where(some, frames, -1).cummax(0).values  # [T] the last frame so far that gives any
    return filled[torch.where(earlier < 0, some.nonzero()[0], earlier)]  # [T,3,H,W]


def known_mask(given: Tensor, latents: LatentSpec, patch: Patch) -> Tensor:
    """Pixels [B,T,H,W] -> latents [B,F,H,W] that are known: those in a patch of the network all of whose pixels are given."""
    lead = given[:, :1].expand(-1, latents.time_stride - 1, -1, -1)  # the first latent frame stands for one frame
    cell = latents.time_stride, latents.space_stride, latents.space_stride
    whole = _all(torch.cat([lead, given], dim=1), cell)  # [B,F,H,W]
    tokens = _all(whole, patch)  # [B,F',H',W']
    for axis, size in enumerate(patch):
        tokens = tokens.repeat_interleave(size, dim=axis + 1)
    return tokens  # [B,F,H,W]


def _all(mask: Tensor, cell: tuple[int, int, int]) -> Tensor:
    """[B,F,H,W] -> [B,F/f,H/h,W/w]: True where a whole cell is."""
    b, f, h, w = mask.shape
    return mask.reshape(b, f // cell[0], cell[0], h // cell[1], cell[1], w // cell[2], cell[2]).all(6).all(4).all(2)


def token_mask(mask: Tensor, patch: Patch) -> Tensor:
    """Latents [B,F,H,W] -> tokens [B,n]: True where the whole token is known."""
    return patchify(mask[:, None].to(torch.uint8), patch).bool().all(-1)


def obey(velocity: Callable[[Tensor, Tensor], Tensor], path: Path, patch: Patch, x_t: Tensor, t: Tensor, known: Known) -> Tensor:
    """[B,C,F,H,W] at x_t [B,C,F,H,W], t [B]: what is known has its value and noise level 0, and from there u leads straight to it.

    velocity: (x_t [B,C,F,H,W], one noise level a token [B n]) -> u [B,C,F,H,W].
    """
    given = known.mask[:, None]  # [B,1,F,H,W]
    times = torch.where(token_mask(known.mask, patch), 0, t[:, None]).flatten()  # [B n]
    u = velocity(torch.where(given, known.values, x_t), times)  # [B,C,F,H,W]
    return torch.where(given, velocity_towards(path, x_t, known.values, t), u)


# Canvases


def blank(shape: ClipShape) -> Canvas:
    """Nothing is given."""
    return Canvas(torch.full((shape.frames, 3, shape.height, shape.width), 0.5), torch.zeros(shape.frames, shape.height, shape.width, dtype=torch.bool))


def give_frames(shape: ClipShape, pieces: Mapping[int, Tensor]) -> Canvas:
    """{number of its first frame: frames [k,3,H,W]}: `{0: image[None]}`, `{0: end_of_one, 8: begin_of_another}`.

    Raises ValueError where a piece has another size or does not fit, or where no frame is left to make.
    """
    video, given = blank(shape)
    for begin, frames in pieces.items():
        if frames.shape[-2:] != video.shape[-2:]:
            raise ValueError(f"given frames are {frames.shape[-2]}x{frames.shape[-1]}, the clip is {shape.height}x{shape.width}")
        place = slice(begin, begin + len(frames))
        if begin < 0 or place.stop > shape.frames or given[place].any():
            raise ValueError(f"given frames {begin} to {place.stop - 1} do not fit a clip of {shape.frames} frames beside the others")
        video[place], given[place] = frames, True
    if given.all():
        raise ValueError(f"the given frames leave none of {shape.frames} to make")
    return Canvas(video, given)


def draw_given(kind: Kind, shape: ClipShape, latents: LatentSpec, patch: Patch, generator: torch.Generator) -> Tensor:
    """Which pixels [T,H,W] a training clip gives, at random within its kind and on the grid of tokens. A clip of too few frames for its kind gives its first, an image a box."""

    def draw(low: int, high: int) -> int:
        """low .. high."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    stride, side = latents.time_stride, latents.space_stride * patch[1]
    later = (shape.frames - 1) // stride  # latent frames after the first
    given = torch.zeros(shape.frames, shape.height, shape.width, dtype=torch.bool)
    if kind in ("hole", "margin") or later == 0:
        rows, columns = shape.height // side, shape.width // side
        height, width = draw(1, max(1, rows - 1)), draw(1, max(1, columns - 1))
        top, left = draw(0, rows - height) * side, draw(0, columns - width) * side
        given[:, top : top + height * side, left : left + width * side] = True
        return given if kind == "margin" and not given.all() else ~given
    head = 0 if kind == "image" else draw(0, later - 1) if kind == "head" else draw(0, max(0, later - 2)) if kind == "ends" else -1
    tail = draw(1, later) if kind == "tail" else draw(1, later - head - 1) if kind == "ends" and later >= 2 else 0
    given[: 1 + head * stride if head >= 0 else 0] = True
    given[shape.frames - tail * stride :] = True
    return given
