"""Before and after in one picture: the first held-out prompts of a finished demo, the same noise for base, SFT and RL (`rushes bench strip --run runs/demo`).

Nobody picks: prompts are the report's, in its order, and of each the first clip, made again from the same prompt, noise and sampler. Frames are spread evenly over the
clip. What the judge says stands above every clip.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import pad

from align.config import Config as BaseConfig
from align.config import Count
from base_model.errors import UserError
from base_model.video.files import to_uint8, write_atomic
from recipes import evaluate
from recipes.demo import NAMES
from recipes.shapes.measure import measure
from recipes.shapes.prompts import ShapesPrompt, make_prompts

RESULTS = Path(__file__).parent / "results"
MARGIN, GAP, CAPTION, LABEL, HEADER = 12, 18, 20, 16, 26  # pixels
INK, GOOD, BAD = "#1a1c20", "#1d7a43", "#b3261e"


class Config(BaseConfig):
    run: Path = Path("runs/demo")
    """Folder of a finished `rushes demo` on the built-in world."""
    out: Path = RESULTS / "before_after.png"
    """The picture."""
    prompts: Count = 8
    """Prompts shown, the first ones of the report."""
    frames: Count = 5
    """Frames shown of each clip, first and last included."""
    scale: Count = 2
    """Screen pixels a side of one clip pixel."""
    quick: bool = False
    """Two prompts only."""


class Shown(NamedTuple):
    """One clip of the picture and what the judge says of it."""

    video: Tensor  # [T,3,H,W] in [0,1]
    right: bool
    remark: str  # what is wrong; whether it flashes


def evaluation_of(run: Path) -> evaluate.Config:
    """The settings of the report in a demo's folder. Raises UserError where there is none, or where it is about real clips."""
    file = run / "report" / "report.json"
    try:
        cfg = evaluate.Config.model_validate(json.loads(file.read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"no report of a finished demo, {file}. Run `rushes demo --out {run}` first") from error
    if cfg.captions:
        raise UserError(f"a demo on real clips, {run}: the strip shows prompts of the built-in world. Give a demo without --clips")
    return cfg


def first_clips(run: Path, number: int) -> tuple[list[ShapesPrompt], dict[str, list[Shown]]]:
    """The first `number` prompts of the report and, of each model, one clip a prompt."""
    cfg = evaluation_of(run)
    seed = cfg.seed + evaluate.EVALUATION_SEED
    prompts = make_prompts(cfg.prompts, seed=seed, split="eval", two_objects=cfg.two_objects, strobe=cfg.strobe)
    seeds = evaluate.clip_seeds(seed, cfg.prompts * cfg.clips_per_prompt)[:: cfg.clips_per_prompt][:number]
    prompts = prompts[:number]
    generate = evaluate.generator({"base": Path("base"), "sft": run / "sft", "rl": run / "rl" / "constrained"}, cfg.sampler)
    return prompts, {name: judged(generate(name, [p.text for p in prompts], seeds), prompts) for name in ("base", "sft", "rl")}


def judged(clips: Tensor, prompts: Sequence[ShapesPrompt]) -> list[Shown]:
    """clips [N,T,3,H,W], one a prompt."""
    takes = measure(clips, prompts, 1).takes
    remarks = [", ".join([*take.wrong[0], *(["flashes"] if take.flashing[0] else [])]) for take in takes]
    return [Shown(clip, bool(take.right[0]), remark) for clip, take, remark in zip(clips, takes, remarks, strict=True)]


def film(video: Tensor, frames: int, scale: int) -> Image.Image:
    """`frames` frames of a clip [T,3,H,W] side by side with a white seam, pixels repeated."""
    chosen = torch.linspace(0, len(video) - 1, frames).round().long()
    row = torch.cat(list(pad(video[chosen], (0, 1), value=1.0)), dim=-1)[..., :-1]  # [3,H,frames (W+1) - 1]
    picture = Image.fromarray(to_uint8(row[None])[0])
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def draw(prompts: Sequence[str], models: Mapping[str, Sequence[Shown]], frames: int, scale: int, *, words: tuple[str, str] = ("right", "wrong")) -> Image.Image:
    """Rows are prompts, columns are models; above each clip what is said of it. words: for a clip that is right, and for another."""
    films = {name: [film(shown.video, frames, scale) for shown in row] for name, row in models.items()}
    width, height = next(iter(films.values()))[0].size
    line = CAPTION + LABEL + height + GAP
    canvas = Image.new("RGB", (2 * MARGIN + len(films) * width + (len(films) - 1) * GAP, MARGIN + HEADER + len(prompts) * line), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (name, row) in enumerate(films.items()):
        left = MARGIN + column * (width + GAP)
        pen.text((left, MARGIN), NAMES.get(name, name), fill=INK, font=ImageFont.load_default(18))
        for n, (picture, shown) in enumerate(zip(row, models[name], strict=True)):
            top = MARGIN + HEADER + n * line
            if column == 0:
                pen.text((left, top), prompts[n], fill=INK, font=ImageFont.load_default(14))
            verdict = words[0] if shown.right else words[1]
            pen.text((left, top + CAPTION), verdict + (f": {shown.remark}" if shown.remark else ""), fill=GOOD if shown.right else BAD, font=ImageFont.load_default(12))
            canvas.paste(picture, (left, top + CAPTION + LABEL))
    return canvas


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing. One row a clip of the picture."""
    prompts, models = first_clips(cfg.run, 2 if cfg.quick else cfg.prompts)
    buffer = io.BytesIO()
    draw([prompt.text for prompt in prompts], models, cfg.frames, cfg.scale).save(buffer, "PNG", optimize=True)
    write_atomic(cfg.out, buffer.getvalue())
    print(f"wrote {cfg.out}", file=sys.stderr)
    rows = [
        {"prompt": prompt.text, "model": name, "right": shown.right, "remark": shown.remark, "strobing_prompt": prompt.strobe}
        for name, clips in models.items()
        for prompt, shown in zip(prompts, clips, strict=True)
    ]
    return {"rows": rows}
