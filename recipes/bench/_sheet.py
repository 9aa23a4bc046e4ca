"""The contact sheet of visual prompts: one line a kind, what is given at the left, what became of it at the right, given pixels framed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from base_model.video.files import to_uint8

SCALE, SEAM, EDGE = 2, 2, 2  # screen pixels a side of one clip pixel; between frames; of the line around what is given
MARGIN, GAP, CAPTION, LABEL, LEFT = 12, 14, 20, 16, 18  # screen pixels
PROMPT_FRAMES, FRAMES, USUAL = 3, 9, 32  # frames shown of what is given; of the clip, where frames are as wide as usual
INK, GOOD, BAD, GIVEN, NOTHING = "#1a1c20", "#1d7a43", "#b3261e", (1.0, 0.5, 0.0), 0.88


class Line(NamedTuple):
    """One clip beside the visual prompt it was made from."""

    title: str
    prompt: str
    wrong: str  # what the judge finds wrong, empty where nothing is
    start: Tensor  # [T,3,H,W] in [0,1] what is given
    start_given: Tensor  # [T,H,W] bool, where
    clip: Tensor  # [T',3,H,W] the finished clip
    clip_given: Tensor  # [T',H,W] bool, which of it was given


def outlined(frames: Tensor, given: Tensor) -> Tensor:
    """Frames [K,3,H,W] with a line of `EDGE` pixels along the inner side of what is given [K,H,W]."""
    outside = pad((~given).float(), (EDGE,) * 4, value=1.0)  # [K,H+2e,W+2e]
    line = given & (max_pool2d(outside, 2 * EDGE + 1, stride=1) > 0)  # [K,H,W]
    return torch.where(line[:, None], torch.tensor(GIVEN)[:, None, None], frames)


def film(clip: Tensor, given: Tensor, number: int) -> Image.Image:
    """`number` frames of a clip [T,3,H,W], first and last included, side by side, enlarged with pixels repeated; given pixels [T,H,W] framed."""
    chosen = torch.linspace(0, len(clip) - 1, min(number, len(clip))).round().long()
    large = [x[chosen].repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2) for x in (clip, given)]
    row = torch.cat(list(pad(outlined(*large), (0, SEAM), value=1.0)), dim=-1)[..., :-SEAM]  # [3,h,K (w + SEAM) - SEAM]
    return Image.fromarray(to_uint8(row[None])[0])


def prompt_film(line: Line) -> Image.Image | None:
    """What is given, the rest left grey; None where text is all there is."""
    if not line.start_given.any():
        return None
    return film(torch.where(line.start_given[:, None], line.start, NOTHING), line.start_given, PROMPT_FRAMES)


def draw(lines: Sequence[Line]) -> Image.Image:
    """One line below the other."""
    films = [(prompt_film(line), film(line.clip, line.clip_given, FRAMES * USUAL // line.clip.shape[-1])) for line in lines]
    column = max([given.width for given, _ in films if given is not None], default=0)
    left = MARGIN + column + LEFT
    heights = [CAPTION + LABEL + clip.height + GAP for _, clip in films]
    canvas = Image.new("RGB", (left + max(clip.width for _, clip in films) + MARGIN, MARGIN + sum(heights)), "white")
    pen, top = ImageDraw.Draw(canvas), MARGIN
    for line, (given, clip), height in zip(lines, films, heights, strict=True):
        pen.text((MARGIN, top), line.title, fill=INK, font=ImageFont.load_default(14))
        pen.text((left, top), line.prompt, fill=INK, font=ImageFont.load_default(14))
        pen.text((left, top + CAPTION), f"wrong: {line.wrong}" if line.wrong else "right", fill=BAD if line.wrong else GOOD, font=ImageFont.load_default(12))
        if given is not None:
            pen.text((MARGIN, top + CAPTION), "given", fill=INK, font=ImageFont.load_default(12))
            canvas.paste(given, (MARGIN, top + CAPTION + LABEL))
        canvas.paste(clip, (left, top + CAPTION + LABEL))
        top += height
    return canvas
