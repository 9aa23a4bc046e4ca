"""Visual prompts, kind by kind: is what is given kept, does the clip still show its prompt, can joints be seen?

Clips of the built-in world are drawn to held-out captions, one object each, as long as what is to come out; parts of them are written to files and given to `rushes generate`'s
own functions. So the whole truth is known: the frames that the model makes can be laid beside those that were left out. What is given is compared in the model's own decoded
clip, before given frames are put back in their places, and beside what the autoencoder alone makes of the same pixels: the ceiling.
"""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from align.config import Count, Seed
from align.progress import Progress
from base_model.errors import UserError
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import ClipShape
from base_model.video.files import from_uint8, to_uint8, write_atomic, write_lossless
from recipes.bench._results import Bench, Row, check_can_end, columns, here, write
from recipes.bench._sheet import Line, draw
from recipes.generate import Sampler, best_device, visual_sampling
from recipes.shapes.judge import judge
from recipes.shapes.measure import measure as measure_takes
from recipes.shapes.prompts import COMBINATIONS, MOTIONS, ShapesPrompt, write_prompt
from recipes.shapes.render import Scene, blur, render, sample_scene
from recipes.statistics import clopper_pearson
from recipes.visual import Prepared, Visual, head_frames, prepare, tail_frames

ENDLESS = ("bounce", "orbit", "still")
"""Motions that can go on for ever, and come back to where they began."""
WIDE = {"height": 24, "width": 48}
SKETCH = 2.5  # pixels of blur
CELL = 8  # pixels a side of a token


class Config(Bench):
    model: Path | None = None
    """Network to sample; none means the shipped base."""
    clips: Count = 32
    """Clips of each kind. `quick` takes at most 2."""
    kinds: tuple[str, ...] = ()
    """Only these, named as in the rows; none means all."""
    seed: Seed = 0
    """Seed of prompts, clips and noise."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""
    given: Annotated[int, Field(ge=5, le=61)] = 5
    """Frames of a clip that is extended, led to or connected. The more, the less of the finished clip is the model's own, and the slower is what moves."""
    strength: Annotated[float, Field(ge=0.001, le=1)] = 0.6
    """Noise level an edit starts from."""
    seconds: Annotated[float, Field(ge=0.1, le=60)] = 4.0
    """Length of the clip that goes on and on."""
    sheet: Path | None = None
    """Also draws one clip of every kind into this PNG: of the k-th kind the k-th clip."""


@dataclass(frozen=True)
class Plan:
    """How the clips of one kind are made, and where in the finished clip the model's own one lies."""

    title: str
    visual: Visual  # without its files
    sampler: Sampler
    frames: int  # of the finished clip
    window: Sequence[int]  # the frames of the finished clip that the model's own clip shows
    joints: Sequence[int] = ()  # frames in front of which something is joined; `frames` stands for the way back to the first
    motions: Sequence[str] = MOTIONS  # of the prompts

    @property
    def clip(self) -> ClipShape:
        return replace(self.sampler.clip, frames=self.frames)


def plans(cfg: Config, stride: int) -> dict[str, Plan]:
    """Every kind a user can give. Raises UserError where a clip is too short to connect two."""
    sampler, n, there, seen = cfg.sampler, cfg.sampler.frames, cfg.given, Visual().frames
    if n < 1 + 2 * stride:
        raise UserError(f"sampler.frames: {n} are too few to connect two clips. Give --sampler.frames {1 + 2 * stride} or more")
    own = range(n)
    ahead, behind = head_frames(seen, there, n - stride, stride), tail_frames(seen, there, n - 1, stride)
    head = head_frames(seen, there, n - 2 * stride, stride)
    tail = tail_frames(seen, there, n - head - stride, stride)
    other_side = there + n - head - tail  # where the second of two connected clips begins
    long = max(n, round(cfg.seconds * sampler.fps))
    return {
        "text": Plan("text alone", Visual(), sampler, n, own),
        "image": Plan("from an image", Visual(kind="image"), sampler, n, own),
        "edit": Plan("an edit of a sketch", Visual(kind="edit", strength=cfg.strength), sampler, n, own),
        "extend": Plan("going on from a clip", Visual(kind="extend"), sampler, there + n - ahead, range(there - ahead, there - ahead + n), (there,)),
        "extend_back": Plan("leading to a clip", Visual(kind="extend_back"), sampler, n - behind + there, own, (n - behind,)),
        "connect": Plan("connecting two clips", Visual(kind="connect"), sampler, other_side + there, range(there - head, there - head + n), (there, other_side)),
        "loop": Plan("back to its own beginning", Visual(kind="loop"), sampler, n, [(tail + k) % n for k in own], (head + tail, n), ENDLESS),
        "inpaint": Plan("filling a hole", Visual(kind="inpaint"), sampler, n, own),
        "outpaint": Plan("wider than it was", Visual(kind="outpaint"), sampler, n, own),
        "one frame": Plan("a single image", Visual(), sampler.model_copy(update={"frames": 1}), 1, range(1)),
        "another size": Plan("another size", Visual(), sampler.model_copy(update=WIDE), n, own),
        "long": Plan(f"{long / sampler.fps:g} seconds, part by part", Visual(seconds=long / sampler.fps), sampler, long, own, range(n, long, n - ahead), ENDLESS),
    }


def chosen(kinds: dict[str, Plan], names: Sequence[str]) -> dict[str, Plan]:
    """Those named, or all. Raises UserError for a name that is none."""
    if unknown := [name for name in names if name not in kinds]:
        raise UserError(f"kinds: there is no {unknown[0]}. Give some of {', '.join(kinds)}")
    return {kind: plan for kind, plan in kinds.items() if not names or kind in names}


# What is given


def held_out_prompts(number: int, motions: Sequence[str], seed: int) -> list[ShapesPrompt]:
    """One object each: combinations that no training caption has, in sentences that some have and in sentences that none has."""
    rng = np.random.default_rng([seed, 0])
    things = [thing for thing in COMBINATIONS["eval"] if thing.motion in motions]
    return [write_prompt((things[k],), rng, split="eval") for k in islice(cycle(rng.permutation(len(things)).tolist()), number)]


class Truth(NamedTuple):
    """What the finished clip should show [T',3,H,W], and a blurred sketch of it, which is given for an edit; both exact in a file."""

    clip: Tensor
    sketch: Tensor


def draw_truth(plan: Plan, prompt: ShapesPrompt, rng: np.random.Generator) -> Truth:
    scene = sample_scene(prompt, rng, clip=plan.clip)
    if plan.visual.kind == "loop":
        scene = closed(scene, plan.frames)
    clip = render(scene, plan.clip)
    return Truth(*(from_uint8(to_uint8(each)) for each in (clip, blur(clip, SKETCH))))


def closed(scene: Scene, frames: int) -> Scene:
    """The same with one turn in `frames` steps, so that the first frame follows the last one."""
    return replace(scene, bodies=tuple(replace(body, turns=math.copysign((frames - 1) / frames, body.turns)) for body in scene.bodies))


def give(plan: Plan, truth: Truth, folder: Path) -> Visual:
    """Writes into `folder` what a user would give of the clip, and names the files."""
    kind, fps = plan.visual.kind, plan.sampler.fps
    if kind == "text":
        return plan.visual
    file, second, mask = folder / ("given.png" if kind == "image" else "given.mkv"), None, None
    if kind == "image":
        save_image(file, truth.clip[0])
    elif kind == "edit":
        write_lossless(file, truth.sketch, fps)
    elif kind == "outpaint":
        write_lossless(file, truth.clip[..., middle(plan.sampler.width)], fps)
    else:
        joint = plan.joints[0] if plan.joints else plan.frames
        write_lossless(file, truth.clip[joint:] if kind == "extend_back" else truth.clip[:joint], fps)
    if kind == "connect":
        second = folder / "second.mkv"
        write_lossless(second, truth.clip[plan.joints[-1] :], fps)
    if kind == "inpaint":
        mask = folder / "mask.png"
        hole = torch.zeros_like(truth.clip[0])  # [3,H,W]
        hole[:, middle(plan.sampler.height), middle(plan.sampler.width)] = 1
        save_image(mask, hole)
    return plan.visual.model_copy(update={"file": file, "second": second, "mask": mask})


def middle(side: int) -> slice:
    """About half of a side, on the grid of tokens."""
    size = max(CELL, side // 2 // CELL * CELL)
    start = (side - size) // 2 // CELL * CELL
    return slice(start, start + size)


def save_image(path: Path, pixels: Tensor) -> None:
    """[3,H,W]."""
    Image.fromarray(to_uint8(pixels[None])[0]).save(path)


# What becomes of it


class Made(NamedTuple):
    """One clip of a kind, all it was made from, and what it should have been."""

    prompt: ShapesPrompt
    truth: Truth
    prepared: Prepared
    own: Tensor  # [T,3,H,W] the model's own decoded clip; of a long one, its first
    clip: Tensor  # [T',3,H,W] as it is saved: with the given frames in their places
    window: Tensor  # [T,3,H,W] the truth of `own`
    through_codec: Tensor  # [T,3,H,W] what the autoencoder alone makes of it


@torch.no_grad()
def make(model: LatentVideoModel, plan: Plan, prompt: ShapesPrompt, seed: int, rng: np.random.Generator) -> Made:
    truth, own = draw_truth(plan, prompt, rng), list[Tensor]()
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        visual = give(plan, truth, Path(folder))
        prepared = prepare(visual, plan.sampler.clip, plan.sampler.fps, model.latents, model.config.patch)

    def join(made: Tensor) -> Tensor:
        own.append(made)
        return prepared.join(made)

    sampling = visual_sampling(visual, replace(prepared, join=join))
    (clip,) = torch.cat(list(sampling(model, model.encode_text([prompt.text]), [seed], plan.sampler)))
    assert clip.shape == truth.clip.shape, (clip.shape, truth.clip.shape)
    window = truth.clip[list(plan.window)]  # [T,3,H,W]
    return Made(prompt, truth, prepared, own[0], clip, window, model.decode(model.encode(window[None]))[0].cpu())


def psnr(clip: Tensor, truth: Tensor, where: Tensor) -> float:
    """dB between two clips [T,3,H,W] at the pixels `where` [T,H,W]."""
    return float(-10 * (clip - truth).square().mean(1)[where].mean().log10())


def jump(clip: Tensor, truth: Tensor, joints: Sequence[int]) -> float | None:
    """Mean absolute difference across the joints over that of neighbouring frames of the truth, both [T',3,H,W]; None where there are no joints or nothing moves."""
    steady = float((truth[1:] - truth[:-1]).abs().mean())
    across = [float((clip[k % len(clip)] - clip[k - 1]).abs().mean()) for k in joints]
    return fmean(across) / steady if across and steady else None


def row(kind: str, plan: Plan, made: Sequence[Made]) -> Row:
    """What the clips of one kind say together."""
    prompts = [each.prompt for each in made]
    right, ceiling = ([judged.all_right for judged in judge(torch.stack(clips), prompts)] for clips in ([each.clip for each in made], [each.truth.clip for each in made]))
    share = clopper_pearson(sum(right), len(right))
    given = bool(made[0].prepared.canvas.given.any())
    jumps = [found for each in made if (found := jump(each.clip, each.truth.clip, plan.joints)) is not None]
    codec = [found for each in made if given and (found := jump(each.prepared.join(each.through_codec), each.truth.clip, plan.joints)) is not None]
    return {
        "kind": kind,
        "clip": str(plan.clip),
        "clips": len(made),
        "psnr_of_given": fmean(psnr(each.own, each.window, each.prepared.canvas.given) for each in made) if given else None,
        "psnr_codec": fmean(psnr(each.through_codec, each.window, each.prepared.canvas.given) for each in made) if given else None,
        "psnr_of_rest": fmean(psnr(each.own, each.window, ~each.prepared.canvas.given) for each in made) if given else None,
        **columns("judge", share),
        "judge_of_source": fmean(ceiling),
        "jumps": len(jumps) if plan.joints else None,
        "jump": median(jumps) if jumps else None,
        "jump_codec": median(codec) if codec else None,
    }


def make_all(cfg: Config) -> dict[str, tuple[Plan, list[Made]]]:
    """The clips of every kind, from the same prompts where they may have any motion, and from the same noise."""
    model = load_tiny(cfg.model).to(best_device())
    found = {}
    kinds = chosen(plans(cfg, model.latents.time_stride), cfg.kinds)
    with Progress("visual", total=len(kinds) * cfg.clips) as progress:
        for kind, plan in kinds.items():
            made = []
            for k, prompt in enumerate(held_out_prompts(cfg.clips, plan.motions, cfg.seed)):
                made.append(make(model, plan, prompt, cfg.seed + k, np.random.default_rng([cfg.seed, 1, k])))
                progress.advance(kind)
            found[kind] = plan, made
    return found


def shown(plan: Plan, made: Made) -> Line:
    """One clip as a line of the sheet."""
    canvas, start = made.prepared.canvas, made.prepared.start
    joined = bool(plan.joints) and plan.visual.seconds == 0
    given = torch.full((len(made.clip), *made.clip.shape[-2:]), joined)  # [T',H,W]
    given[list(plan.window)] = canvas.given
    take = measure_takes(made.clip[None], [made.prompt], 1).takes[0]
    prompt = (canvas.video, canvas.given) if start is None else (start, torch.ones_like(canvas.given))
    return Line(plan.title, made.prompt.text, ", ".join(take.wrong[0]), *prompt, made.clip, given)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg, sheet=cfg.sheet)
    found = make_all(cfg.model_copy(update={"clips": min(2, cfg.clips)}) if cfg.quick else cfg)
    rows = [row(kind, plan, made) for kind, (plan, made) in found.items()]
    if cfg.sheet is not None:
        buffer = io.BytesIO()
        draw([shown(plan, made[k % len(made)]) for k, (plan, made) in enumerate(found.values())]).save(buffer, "PNG", optimize=True)
        write_atomic(cfg.sheet, buffer.getvalue())
        print(f"wrote {cfg.sheet}", file=sys.stderr)
    if cfg.write:
        write(cfg, "visual", here("visual", cfg), "Visual prompts", {"Kind by kind": rows})
    return {"rows": rows}
