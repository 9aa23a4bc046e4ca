"""Visual prompts of `rushes generate`: files become a canvas with given pixels, and what is made is joined to what was given.

Given files are checked before anything is computed. A clip that goes on from another, leads to it or connects two keeps the given frames as they are; where pixels are
given inside a frame, the whole clip is what the model made of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative
from base_model.errors import UserError
from base_model.prompts.conditions import Canvas, blank, give_frames
from base_model.types import ClipShape
from base_model.video.files import cover, from_uint8, read_video, resample_fps

Kind = Literal["text", "image", "edit", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint"]
STRIDE = 4  # frames of a latent frame after the first


class Visual(BaseConfig):
    """What a clip is made from beside its text."""

    kind: Kind = "text"
    """`text` alone; `image` (the first frame); `edit` (SDEdit: a clip noised to `strength` and made again); `extend` and `extend_back`; `connect` (`file`, then `second`);
    `loop` (back to its own beginning); `inpaint` (white in `mask` is made anew); `outpaint` (`file` is smaller and lies in the middle)."""
    file: Path | None = None
    """The image or clip that is given."""
    second: Path | None = None
    """The clip to arrive at, for `connect`."""
    mask: Path | None = None
    """An image, white where pixels are made anew, for `inpaint`."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Noise level an edit starts from: 1 forgets the clip."""
    frames: Count = 5
    """Frames of a given clip that the model sees at each joint, at most; rounded down to what the autoencoder can cut."""
    cover: bool = False
    """Resizes and crops what is given to the sampler's size; without it another size is refused."""
    seconds: NonNegative = 0.0
    """How long the clip is to become, for `text`, `image` and `extend`: made by going on from its last frames again and again. 0 means one clip of `sampler.frames`."""


@dataclass(frozen=True)
class Prepared:
    """A visual prompt, checked and read. `join` puts what was made, [T,3,H,W], together with what was given."""

    canvas: Canvas
    start: Tensor | None  # [T,3,H,W] what an edit starts from
    join: Callable[[Tensor], Tensor]
    key: str  # sha256 of everything that is given


def prepare(visual: Visual, clip: ClipShape, fps: float) -> Prepared:
    """Reads and checks the files. Raises UserError for a file that is missing, superfluous, unreadable, of another size, or too long or short for its kind."""
    needed = {"text": (), "connect": ("file", "second"), "inpaint": ("file", "mask")}.get(visual.kind, ("file",))
    for name in ("file", "second", "mask"):
        path = getattr(visual, name)
        if (path is None) == (name in needed):
            what = f"visual.{name} is missing" if path is None else f"visual.{name} is given"
            raise UserError(f"{what}, visual.kind {visual.kind}: it takes {' and '.join(f'visual.{each}' for each in needed) or 'no file'}")
    if visual.seconds and visual.kind not in ("text", "image", "extend"):
        raise UserError(f"visual.seconds is given, visual.kind {visual.kind}. Only text, image and extend grow longer: leave it out")
    read = {name: _read(getattr(visual, name), visual, clip, fps) for name in needed if name != "mask"}
    hole = _hole(visual.mask, clip) if visual.mask else None
    try:
        canvas, start, join = _canvas(visual, clip, read, hole)
    except ValueError as error:
        raise UserError(f"{error}, {visual.file}. Change sampler.frames, visual.frames or the file") from error
    digest = hashlib.sha256(repr((visual.kind, visual.strength, visual.frames, visual.seconds)).encode())
    for part in (canvas.video.where(canvas.given[:, None], 0), canvas.given, *([start] if start is not None else []), *read.values()):
        digest.update(part.contiguous().numpy().tobytes())
    return Prepared(canvas, start, join, digest.hexdigest())


def _canvas(visual: Visual, clip: ClipShape, read: dict[str, Tensor], hole: Tensor | None) -> tuple[Canvas, Tensor | None, Callable[[Tensor], Tensor]]:
    """Raises ValueError where what is given does not fit the clip."""
    whole: Callable[[Tensor], Tensor] = lambda made: made  # noqa: E731
    if visual.kind == "text":
        return blank(clip), None, whole
    source = read["file"]
    ahead = head_frames(visual.frames, len(source), clip)
    if visual.kind == "image":
        return give_frames(clip, {0: source[:1]}), None, whole
    if visual.kind == "edit":
        return blank(clip), _fitting(source, clip), whole
    if visual.kind == "extend":
        return give_frames(clip, {0: source[-ahead:]}), None, lambda made: torch.cat([source, made[ahead:]])
    if visual.kind == "extend_back":
        behind = tail_frames(visual.frames, len(source), clip)
        return give_frames(clip, {clip.frames - behind: source[:behind]}), None, lambda made: torch.cat([made[:-behind], source])
    if visual.kind in ("connect", "loop"):
        target = read.get("second", source)
        behind = tail_frames(min(visual.frames, clip.frames - ahead - STRIDE), len(target), clip)
        canvas = give_frames(clip, {0: source[-ahead:], clip.frames - behind: target[:behind]})
        tail = target if visual.kind == "connect" else target[:0]
        return canvas, None, lambda made: torch.cat([source, made[ahead : clip.frames - behind], tail])
    video = _fitting(source, clip)
    if visual.kind == "inpaint":
        assert hole is not None
        return Canvas(video, ~hole.expand(clip.frames, -1, -1)), None, whole
    return _in_the_middle(video, clip), None, whole


def head_frames(wanted: int, there: int, clip: ClipShape) -> int:
    """Frames to go on from: 1 + a multiple of 4, at most `wanted`, as many as there are, and not the whole clip."""
    return 1 + max(0, (min(wanted, there, clip.frames - STRIDE) - 1) // STRIDE) * STRIDE


def tail_frames(wanted: int, there: int, clip: ClipShape) -> int:
    """Frames to arrive at: a multiple of 4. Raises ValueError where there are fewer than 4."""
    found = min(wanted, there, clip.frames - 1) // STRIDE * STRIDE
    if found < STRIDE and there < STRIDE:
        raise ValueError(f"{there} frames are too few to arrive at, at least {STRIDE} are needed")
    if found < STRIDE:
        raise ValueError(f"visual.frames {wanted} or a clip of {clip.frames} frames leaves fewer than {STRIDE} frames to arrive at")
    return found


def _fitting(source: Tensor, clip: ClipShape) -> Tensor:
    if len(source) < clip.frames:
        raise ValueError(f"{len(source)} frames are given, the clip has {clip.frames}")
    return source[: clip.frames]


def _in_the_middle(video: Tensor, clip: ClipShape) -> Canvas:
    """A smaller clip in the middle of the canvas. Raises ValueError where it does not fit."""
    height, width = video.shape[-2:]
    if height > clip.height or width > clip.width or (height, width) == (clip.height, clip.width):
        raise ValueError(f"the given clip is {height}x{width}, there is nothing to add around it in {clip.height}x{clip.width}")
    top, left = (clip.height - height) // 2, (clip.width - width) // 2
    canvas = blank(clip)
    canvas.video[:, :, top : top + height, left : left + width] = video
    canvas.given[:, top : top + height, left : left + width] = True
    return canvas


# Files

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _read(path: Path, visual: Visual, clip: ClipShape, fps: float) -> Tensor:
    """Frames [T,3,H,W] at `fps`, of the sampler's size."""
    if path.suffix.lower() in IMAGES:
        frames = read_image(path)[None]
    else:
        video = read_video(path)
        frames = resample_fps(from_uint8(video.frames), video.fps, fps)
    if visual.cover and visual.kind != "outpaint":
        return cover(frames, clip.height, clip.width)
    if visual.kind != "outpaint" and frames.shape[-2:] != (clip.height, clip.width):
        found = f"{frames.shape[-2]}x{frames.shape[-1]}"
        raise UserError(f"{path} is {found}, the clip {clip.height}x{clip.width}. Give --sampler.height and --sampler.width, or --visual.cover true to resize and crop")
    return frames


def read_image(path: Path) -> Tensor:
    """[3,H,W] in [0,1]. Raises UserError where there is no image that can be read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return from_uint8(np.array(ImageOps.exif_transpose(image).convert("RGB"))[None])[0]
    except FileNotFoundError as error:
        raise UserError(f"no such image, {path}. Check the path") from error
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image: {error}, {path}. Give a PNG or JPEG") from error


def _hole(path: Path, clip: ClipShape) -> Tensor:
    """[H,W] bool, True where the mask is white. Raises UserError where it has another size, or leaves nothing to make or nothing given."""
    white = read_image(path).mean(0) > 0.5  # [H,W]
    if white.shape != (clip.height, clip.width):
        raise UserError(f"{path} is {white.shape[0]}x{white.shape[1]}, the clip {clip.height}x{clip.width}. Draw the mask in the size of the clip")
    if white.all() or not white.any():
        raise UserError(f"{path} is {'white' if white.all() else 'black'} all over: white is made anew, black is kept. Draw both")
    return white
