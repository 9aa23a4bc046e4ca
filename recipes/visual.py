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
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count
from base_model.errors import UserError
from base_model.networks.packing import Patch
from base_model.prompts.conditions import Canvas, blank, give_frames, known_mask
from base_model.types import ClipShape, LatentSpec
from base_model.video.files import cover, from_uint8, read_image, read_video, resample_fps, to_uint8

Kind = Literal["text", "image", "edit", "extend", "extend_back", "connect", "loop", "inpaint", "outpaint"]


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
    strength: Annotated[float, Field(ge=0.001, le=1)] = 0.6
    """Noise level an edit starts from: 1 forgets the clip."""
    frames: Count = 5
    """Frames of a given clip that the model sees at each joint, at most; rounded down to what the autoencoder can cut."""
    cover: bool = False
    """Resizes and crops what is given to the sampler's size; without it another size is refused."""
    seconds: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """How long the clip is to become, for `text`, `image` and `extend`: made by going on from its last frames again and again. 0 means one clip of `sampler.frames`."""


@dataclass(frozen=True)
class Prepared:
    """A visual prompt, checked and read. `join` puts what was made, [T,3,H,W], together with what was given."""

    canvas: Canvas
    start: Tensor | None  # [T,3,H,W] what an edit starts from
    join: Callable[[Tensor], Tensor]
    key: str  # sha256 of everything that is given


def prepare(visual: Visual, clip: ClipShape, fps: float, latents: LatentSpec, patch: Patch) -> Prepared:
    """Reads and checks the files. Raises UserError for a file that is missing, superfluous, unreadable, of another size, or too long or short for its kind, and where
    nothing or everything would be given to a network of these patches."""
    needed = {"text": (), "connect": ("file", "second"), "inpaint": ("file", "mask")}.get(visual.kind, ("file",))
    for name in ("file", "second", "mask"):
        path = getattr(visual, name)
        if (path is None) == (name in needed):
            what = f"visual.{name} is missing" if path is None else f"visual.{name} is given"
            raise UserError(f"{what}, visual.kind {visual.kind}: it takes {' and '.join(f'visual.{each}' for each in needed) or 'no file'}")
    _check_seconds(visual, clip, fps, latents.time_stride)
    read = {name: _read(getattr(visual, name), visual, clip, fps) for name in needed if name != "mask"}
    hole = _hole(visual.mask, clip) if visual.mask else None
    try:
        canvas, start, join = _canvas(visual, clip, read, hole, latents, patch)
    except ValueError as error:
        raise UserError(f"{error}, {visual.second or visual.file}. Change sampler.frames, visual.frames or the file") from error
    if visual.kind == "extend" and 0 < round(visual.seconds * fps) <= len(read["file"]):
        raise UserError(f"{visual.file} lasts {len(read['file']) / fps:g} s, visual.seconds is {visual.seconds:g}. Give more")
    known = known_mask(canvas.given[None], latents, patch)
    if canvas.given.any() and (known.all() or not known.any()):
        side = f"{latents.space_stride * patch[1]}x{latents.space_stride * patch[2]} pixels"
        share = "all" if known.all() else "none"
        raise UserError(f"{share} of the tokens ({side} each) is given, {visual.mask or visual.file}. Give something to keep and leave something to make")
    digest = hashlib.sha256(repr((visual.kind, visual.strength, visual.frames, visual.seconds)).encode())
    for name, part in {"given": canvas.given, "start": start, **read}.items():
        if part is not None:
            digest.update(repr((name, tuple(part.shape))).encode() + part.contiguous().numpy().tobytes())
    return Prepared(canvas, start, join, digest.hexdigest())


def _check_seconds(visual: Visual, clip: ClipShape, fps: float, stride: int) -> None:
    if not visual.seconds:
        return
    if visual.kind not in ("text", "image", "extend"):
        raise UserError(f"visual.seconds is given, visual.kind {visual.kind}. Only text, image and extend grow longer: leave it out")
    if clip.frames <= stride or round(visual.seconds * fps) < 1:
        asked = f"visual.seconds {visual.seconds:g} with clips of {clip.frames} frames at {fps:g} a second"
        raise UserError(f"{asked}. Give at least one frame, and sampler.frames of at least {1 + stride}")


def _canvas(
    visual: Visual, clip: ClipShape, read: dict[str, Tensor], hole: Tensor | None, latents: LatentSpec, patch: Patch
) -> tuple[Canvas, Tensor | None, Callable[[Tensor], Tensor]]:
    """Raises ValueError where what is given does not fit the clip."""
    whole: Callable[[Tensor], Tensor] = lambda made: made  # noqa: E731
    if visual.kind == "text":
        return blank(clip), None, whole
    source, stride = read["file"], latents.time_stride
    if visual.kind == "image":
        return give_frames(clip, {0: source[:1]}), None, whole
    if visual.kind == "edit":
        return blank(clip), _fitting(source, clip), whole
    if visual.kind == "extend":
        ahead = head_frames(visual.frames, len(source), clip.frames - stride, stride)
        return give_frames(clip, {0: source[-ahead:]}), None, lambda made: torch.cat([source, made[ahead:]])
    if visual.kind == "extend_back":
        behind = tail_frames(visual.frames, len(source), clip.frames - 1, stride)
        return give_frames(clip, {clip.frames - behind: source[:behind]}), None, lambda made: torch.cat([made[:-behind], source])
    if visual.kind in ("connect", "loop"):
        target = read.get("second", source)
        ahead = head_frames(visual.frames, len(source), clip.frames - 2 * stride, stride)
        behind = tail_frames(visual.frames, len(target), clip.frames - ahead - stride, stride)
        canvas = give_frames(clip, {0: source[-ahead:], clip.frames - behind: target[:behind]})
        tail = target if visual.kind == "connect" else target[:0]
        return canvas, None, lambda made: torch.cat([source, made[ahead : clip.frames - behind], tail])
    video = _fitting(source, clip)
    if visual.kind == "inpaint":
        assert hole is not None
        return Canvas(video, ~hole.expand(clip.frames, -1, -1)), None, whole
    return _in_the_middle(video, clip, latents.space_stride * patch[1]), None, whole


def head_frames(wanted: int, there: int, room: int, stride: int) -> int:
    """Frames to go on from: 1 + a multiple of `stride`, at most `wanted`, as many as there are and as the clip has room for; at least the last one."""
    return 1 + max(0, min(wanted, there, room) - 1) // stride * stride


def tail_frames(wanted: int, there: int, room: int, stride: int) -> int:
    """Frames to arrive at: a multiple of `stride`. Raises ValueError where there are too few, too few are wanted, or the clip has no room."""
    found = min(wanted, there, room) // stride * stride
    if found < stride:
        why = f"{there} frames are given" if there < stride else f"visual.frames is {wanted}" if wanted < stride else "the clip is too short"
        raise ValueError(f"{why}: a clip needs {stride} frames to arrive at, beside those it goes on from and {stride} to make")
    return found


def _fitting(source: Tensor, clip: ClipShape) -> Tensor:
    if len(source) < clip.frames:
        raise ValueError(f"{len(source)} frames are given, the clip has {clip.frames}")
    return source[: clip.frames]


def _in_the_middle(video: Tensor, clip: ClipShape, side: int) -> Canvas:
    """A smaller clip in the middle of the canvas, moved to where tokens of `side` pixels begin. Raises ValueError where it does not fit."""
    height, width = video.shape[-2:]
    if height > clip.height or width > clip.width or (height, width) == (clip.height, clip.width):
        raise ValueError(f"the given clip is {height}x{width}, there is nothing to add around it in {clip.height}x{clip.width}")
    top, left = ((clip.height - height) // 2 // side * side, (clip.width - width) // 2 // side * side)
    canvas = blank(clip)
    canvas.video[:, :, top : top + height, left : left + width] = video
    canvas.given[:, top : top + height, left : left + width] = True
    return canvas


# Files

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def _read(path: Path, visual: Visual, clip: ClipShape, fps: float) -> Tensor:
    """Frames [T,3,H,W] at `fps`, of the sampler's size (for `outpaint` of their own)."""

    def fit(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """[H,W,3] as it is decoded, so that no large clip lies in memory whole."""
        height, width = frame.shape[:2]
        if visual.kind == "outpaint" and height <= clip.height and width <= clip.width:
            return frame
        if visual.cover and visual.kind != "outpaint":
            return to_uint8(cover(from_uint8(frame[None]), clip.height, clip.width))[0]
        if (height, width) != (clip.height, clip.width):
            instead = "" if visual.kind == "outpaint" else ", or --visual.cover true to resize and crop"
            raise UserError(f"{path} is {height}x{width}, the clip {clip.height}x{clip.width}. Give other --sampler.height and --sampler.width{instead}")
        return frame

    if path.suffix.lower() in IMAGES:
        return from_uint8(fit(read_image(path, still=True))[None])
    video = read_video(path, shrink=fit, max_frames=1 if visual.kind == "image" else None)
    return resample_fps(from_uint8(video.frames), video.fps, fps) if visual.kind != "image" else from_uint8(video.frames)


def _hole(path: Path, clip: ClipShape) -> Tensor:
    """[H,W] bool, True where the mask is white. Raises UserError where it has another size, or leaves nothing to make or nothing given."""
    white = from_uint8(read_image(path, still=True)[None])[0].mean(0) > 0.5  # [H,W]
    if white.shape != (clip.height, clip.width):
        raise UserError(f"{path} is {white.shape[0]}x{white.shape[1]}, the clip {clip.height}x{clip.width}. Draw the mask in the size of the clip")
    if white.all() or not white.any():
        raise UserError(f"{path} is {'white' if white.all() else 'black'} all over: white is made anew, black is kept. Draw both")
    return white
