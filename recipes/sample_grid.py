"""What a model makes of the same prompts and the same noise, on the way: a contact sheet to look at and a film of the whole grid. Shared by recipes, no command.

    cond = encode_prompts(model, prompts)                       # once, before the text encoder goes
    with average.swap(), run.looking():
        samples = sample_grid(model, cond, sampler, seed=cfg.seed, sheet=run.out / "samples" / f"{run.iteration:06d}.png")

A clip that flashes stands still in the film, and is told so; in the sheet all stand still anyway.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from align.run import derived_seed
from base_model.checkpoint import atomic_write
from base_model.types import Conditioning, TrainableModel
from base_model.video.files import mp4_bytes, to_uint8
from recipes.generate import Sampler, sample
from recipes.shapes.judge import is_flashing
from recipes.shapes.measure import measure
from recipes.shapes.prompts import ShapesPrompt

FRAMES = 6  # of each clip in the sheet, first and last included
SMALLEST, LARGEST = 96, 240  # pixels of a cell's longer side: small clips grow by whole factors, large ones shrink
MARGIN, GAP, SEAM, LINE = 12, 16, 2, 17  # pixels
FONT = 13
INK, GOOD, BAD = "#1a1c20", "#1d7a43", "#b3261e"
PROMPTS = "Prompts"  # where a sheet holds its prompts as text, one a line


class Said(NamedTuple):
    """What stands under a clip beside its prompt."""

    remark: str  # empty where nobody judged
    good: bool


class Samples(NamedTuple):
    """What was written, and what the judge says of it."""

    sheet: Path
    film: Path
    right: float | None  # share of the clips with every attribute right; None where no judge knows the prompts


def sample_grid(model: TrainableModel, cond: Conditioning, sampler: Sampler, *, seed: int, sheet: Path, asked: Sequence[ShapesPrompt] = ()) -> Samples:
    """Makes a clip of each of the N prompts in `cond`, and writes `sheet`, a PNG, and a film of the same name, .mp4; each file whole or not at all.

    asked: what the prompts ask for in the built-in world, where they are of it. Raises UserError for a size that the model does not make, and for a full disk.
    """
    return write_samples(draw_samples(model, cond, sampler, seed=seed), cond.prompts, sampler.fps, sheet=sheet, asked=asked)


def draw_samples(model: TrainableModel, cond: Conditioning, sampler: Sampler, *, seed: int) -> Tensor:
    """[N,T,3,H,W] in [0,1]; the noise depends on the seed and the place of the prompt only. Where weights are sharded, every process must call it."""
    seeds = [derived_seed(seed, "sample", k) % 2**31 for k in range(len(cond))]
    return torch.cat(list(sample(model, cond, seeds, sampler)))


def write_samples(clips: Tensor, prompts: Sequence[str], fps: float, *, sheet: Path, asked: Sequence[ShapesPrompt] = ()) -> Samples:
    """clips [N,T,3,H,W] in [0,1]."""
    takes = measure(clips, asked, 1, fps=fps).takes if asked else ()
    said = [Said("right" if take.right[0] else f"wrong: {', '.join(take.wrong[0])}", bool(take.right[0])) for take in takes] or [Said("", True)] * len(clips)
    still = [is_flashing(clip, fps) for clip in clips]
    film = sheet.with_suffix(".mp4")
    atomic_write(sheet, _png(draw_sheet(clips, prompts, said), prompts))
    atomic_write(film, mp4_bytes(draw_film(clips, prompts, said, still), fps, upscale=False))
    return Samples(sheet, film, sum(map(float, (take.right[0] for take in takes))) / len(takes) if takes else None)


def _png(picture: Image.Image, prompts: Sequence[str]) -> bytes:
    told = PngImagePlugin.PngInfo()
    told.add_itxt(PROMPTS, "\n".join(" ".join(prompt.split()) for prompt in prompts))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, pnginfo=told)
    return buffer.getvalue()


def draw_sheet(clips: Tensor, prompts: Sequence[str], said: Sequence[Said]) -> Image.Image:
    """One row a clip [T,3,H,W]: some of its frames side by side, its prompt and what is said of it underneath."""
    chosen = torch.linspace(0, clips.shape[1] - 1, min(FRAMES, clips.shape[1])).round().long()
    frames = [[_cell(frame) for frame in to_uint8(clip[chosen])] for clip in clips]
    width, height = frames[0][0].size
    row = len(chosen) * (width + SEAM) - SEAM
    line = height + 2 * LINE + GAP
    canvas = Image.new("RGB", (2 * MARGIN + max(row, 320), 2 * MARGIN + len(clips) * line - GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for n, pictures in enumerate(frames):
        top = MARGIN + n * line
        for column, picture in enumerate(pictures):
            canvas.paste(picture, (MARGIN + column * (width + SEAM), top))
        _write_under(pen, (MARGIN, top + height + 2), canvas.width - 2 * MARGIN, prompts[n], said[n])
    return canvas


def draw_film(clips: Tensor, prompts: Sequence[str], said: Sequence[Said], still: Sequence[bool]) -> NDArray[np.uint8]:
    """uint8 [T,H',W',3]: all clips [T,3,H,W] in a grid, playing at once; where `still`, the first frame stays."""
    columns = math.ceil(math.sqrt(len(clips)))
    width, height = _cell(to_uint8(clips[0, :1])[0]).size
    wide, high = width + GAP, height + 2 * LINE + GAP
    page = Image.new("RGB", (2 * MARGIN + columns * wide - GAP, 2 * MARGIN + -(-len(clips) // columns) * high - GAP), "white")
    pen = ImageDraw.Draw(page)
    places = [(MARGIN + n % columns * wide, MARGIN + n // columns * high) for n in range(len(clips))]
    for (left, top), prompt, remark, stays in zip(places, prompts, said, still, strict=True):
        _write_under(pen, (left, top + height + 2), width, prompt, Said("flashes: held still", False) if stays else remark)
    film = []
    for t in range(clips.shape[1]):
        for (left, top), clip, stays in zip(places, clips, still, strict=True):
            frame = 0 if stays else t
            page.paste(_cell(to_uint8(clip[frame : frame + 1])[0]), (left, top))
        film.append(np.array(page))
    return np.stack(film)


def _cell(frame: NDArray[np.uint8]) -> Image.Image:
    """[H,W,3], its longer side between `SMALLEST` and `LARGEST` pixels."""
    picture, longest = Image.fromarray(frame), max(frame.shape[:2])
    if longest > LARGEST:
        return picture.resize((max(1, round(picture.width * LARGEST / longest)), max(1, round(picture.height * LARGEST / longest))), Image.Resampling.LANCZOS)
    factor = max(1, -(-SMALLEST // longest))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _write_under(pen: ImageDraw.ImageDraw, place: tuple[int, int], width: int, prompt: str, said: Said) -> None:
    """Two lines: the prompt, cut off where there is no room, and what is said."""
    font = ImageFont.load_default(FONT)
    text = prompt = " ".join(prompt.split())
    while text and pen.textlength(text if text == prompt else text + "…", font=font) > width:
        text = text[:-1]
    pen.text(place, text if text == prompt else text + "…", fill=INK, font=font)
    pen.text((place[0], place[1] + LINE), said.remark, fill=GOOD if said.good else BAD, font=font)


def prompts_of(sheet: Path) -> list[str]:
    """The prompts of a sheet of `sample_grid`; none where it is another picture."""
    with Image.open(sheet) as picture:
        told = getattr(picture, "text", {}).get(PROMPTS, "")
    return str(told).split("\n") if told else []
