"""What a model keeps track of in the built-in world (`rushes evaluate --world`): things out of sight, depth under a moving camera, what a collision did, a thing over many seconds.

The first frames of an unseen clip are given, the model makes the rest, and the judge reads what is on screen afterwards, in that and in the renderer's own clip. Once with the
caption and once without words, where only what was seen tells how it goes on. Two columns that are no model stand beside: the true clip through the codec is the most that a model
in its latents can reach, the last given frame held still is what one reaches that does not look at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.progress import Progress
from align.run import derived_seed
from base_model.prompts.conditions import give_frames
from base_model.tiny import LatentVideoModel
from base_model.types import ClipShape
from recipes.generate import Sampler, go_on, sample
from recipes.models import with_canvases
from recipes.shapes.dataset import by_shape
from recipes.shapes.events import EVENTS, NEARNESS, SHAPES_OF_EVENTS, Event, sample_event
from recipes.shapes.judge import Reading, read
from recipes.shapes.prompts import Thing, sample_prompt
from recipes.shapes.render import DEMO_CLIP, FPS, render, sample_scene
from recipes.statistics import bootstrap_mean

GIVEN = 9  # frames of an event that the model sees: what passes behind another is hidden by then
AHEAD = 5  # frames of a single thing that it sees, and goes on from
AFTER = 3  # last frames that are read
NEAR = 0.15  # short sides from where the renderer has it
LEAST_WAY = 0.5  # of the true way on screen, under a pan
RATIO = 4 / 3  # the near thing's way over the far one's may be off by this factor
SECONDS = (1, 5, 10)
LASTING = ("still", "orbit", "bounce")  # motions that a clip of any length can show
ORACLE, FROZEN = "codec alone", "held still"

MEASURES: Mapping[str, str] = {
    "permanence": "occlusion: what is hidden at the last given frame comes out on the other side, where it should be, in its colour",
    "identity": "the same, and with its shape",
    "state": "collision: both rest where it left them, in their colours",
    "state and shapes": "the same, and with their shapes",
    "parallax": f"panning camera: the near thing moves {NEARNESS:g} times as far as the far one, on the pan's way",
    **{f"lasts {s} s": f"going on from its own last frames: after {s} s the thing alone is there, its colour and shape unchanged" for s in SECONDS},
}


@dataclass(frozen=True)
class Case:
    """An event and how it really goes on."""

    event: Event
    text: str
    video: Tensor  # [T,3,H,W] in [0,1]
    things: tuple[Thing, ...]  # the one in front, or that hits, or that is near, first


class Life(NamedTuple):
    """One thing to go on with for many seconds, from its first frames."""

    text: str
    head: Tensor  # [AHEAD,3,H,W]
    thing: Thing


Scores = dict[str, list[float]]
"""Measure -> one value a case, nan where the judge cannot read the true clip itself."""
Row = dict[str, Any]
"""Measure, its meaning, whether the caption was told, and {model: {mean, low, high}}."""


def draw_cases(event: Event, number: int, *, seed: int) -> list[Case]:
    """Unseen events, half lying and half standing."""
    shapes, cases = SHAPES_OF_EVENTS[1:], []
    for index in range(number):
        clip = shapes[index % len(shapes)]
        found = sample_event(event, np.random.default_rng([seed, index, EVENTS.index(event)]), clip=clip, split="eval")
        cases.append(Case(event, found.text, render(found.scene, clip), found.things))
    return cases


def draw_lives(number: int, *, seed: int) -> list[Life]:
    lives: list[Life] = []
    rng = np.random.default_rng([seed, len(EVENTS)])
    while len(lives) < number:
        prompt = sample_prompt(rng, split="eval")
        if prompt.things[0].motion in LASTING:
            lives.append(Life(prompt.text, render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP)[:AHEAD], prompt.things[0]))
    return lives


# Reading


def score(case: Case, made: Tensor) -> dict[str, float]:
    """What the judge says of a clip [T,3,H,W] made from a case, by measure."""
    true, seen = _by_color(case.video[-AFTER:]), _by_color(made[-AFTER:])
    if case.event == "occlusion":
        return dict(zip(("permanence", "identity"), _kept(true, seen, case.things[1:], made), strict=True))
    if case.event == "collision":
        return dict(zip(("state", "state and shapes"), _kept(true, seen, case.things, made), strict=True))
    way, seen_way = _moved(case, case.video), _moved(case, made)
    return {"parallax": math.nan if way is None else float(seen_way is not None and _as_deep(seen_way, way))}


def _moved(case: Case, made: Tensor) -> tuple[float, float] | None:
    """How far the near and the far thing moved along the longer side, from the last given frame to the last one; None where one of them is not there."""
    before, after = _by_color(case.video[GIVEN - 1 : GIVEN]), _by_color(made[-1:])
    if not all(thing.color in before and thing.color in after for thing in case.things):
        return None
    axis = int(made.shape[-2] > made.shape[-1])
    near, far = (float((_place(after[thing.color], made) - _place(before[thing.color], made))[axis]) for thing in case.things)
    return near, far


def _as_deep(way: tuple[float, float], true: tuple[float, float]) -> bool:
    """Both moved the way they truly did, at least half as far, at the ratio of their depths."""
    if any(a / b < LEAST_WAY for a, b in zip(way, true, strict=True)):
        return False
    return abs(math.log(way[0] / way[1] / NEARNESS)) <= math.log(RATIO)


def lasting(life: Life, made: Tensor, seconds: int) -> float:
    """1 where the clip's second that ends then shows the thing alone, as it was given."""
    end = round(seconds * FPS)
    readings = read(made[end - round(FPS) : end])
    return float([(r.color, r.shape) for r in readings] == [(life.thing.color, life.thing.shape)])


def _by_color(clip: Tensor) -> dict[str, Reading]:
    return {reading.color: reading for reading in read(clip)}


def _same(seen: Mapping[str, Reading], thing: Thing) -> bool:
    return thing.color in seen and seen[thing.color].shape == thing.shape


def _place(reading: Reading, clip: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Centre in short sides, [2]."""
    height, width = clip.shape[-2:]
    return np.asarray(reading.start) * (width, height) / min(height, width)


def _distance(true: Mapping[str, Reading], seen: Mapping[str, Reading], thing: Thing, clip: Tensor) -> float:
    return float(np.linalg.norm(_place(true[thing.color], clip) - _place(seen[thing.color], clip)))


def _kept(true: Mapping[str, Reading], seen: Mapping[str, Reading], things: Sequence[Thing], clip: Tensor) -> tuple[float, float]:
    """Whether all things are where the true clip has them, and whether they have their shapes as well; nan where the judge cannot read the true clip."""
    if not all(_same(true, thing) for thing in things):
        return math.nan, math.nan
    there = all(thing.color in seen and _distance(true, seen, thing, clip) <= NEAR for thing in things)
    return float(there), float(there and all(_same(seen, thing) for thing in things))


# Making


def continue_cases(model: LatentVideoModel, cases: Sequence[Case], sampler: Sampler, *, words: bool, seed: int) -> list[Tensor]:
    """Each case from its first frames on, [T,3,H,W]."""
    made: dict[int, Tensor] = {}
    for shape, rows in by_shape([case.video for case in cases]).items():
        clip = ClipShape(shape[0], *shape[-2:])
        cond = model.encode_text([cases[i].text if words else "" for i in rows])
        told = with_canvases(model, cond, [give_frames(clip, {0: cases[i].video[:GIVEN]}) for i in rows])
        sized = sampler.model_copy(update={"frames": clip.frames, "height": clip.height, "width": clip.width})
        made |= zip(rows, torch.cat(list(sample(model, told, [derived_seed(seed, "world", i) % 2**31 for i in rows], sized))), strict=True)
    return [made[i] for i in range(len(cases))]


def continue_lives(model: LatentVideoModel, lives: Sequence[Life], sampler: Sampler, *, seed: int) -> Tensor:
    """N lives for the longest of `SECONDS`, [N,frames,3,H,W]."""
    cond, seeds = model.encode_text([life.text for life in lives]), [derived_seed(seed, "life", i) % 2**31 for i in range(len(lives))]
    sized = sampler.model_copy(update={"frames": DEMO_CLIP.frames, "height": DEMO_CLIP.height, "width": DEMO_CLIP.width})
    return go_on(model, cond, seeds, sized, torch.stack([life.head for life in lives]), frames=round(max(SECONDS) * FPS), ahead=AHEAD)


def gather(cases: Sequence[Case], made: Sequence[Tensor]) -> Scores:
    found: Scores = {}
    for case, clip in zip(cases, made, strict=True):
        for measure, value in score(case, clip).items():
            found.setdefault(measure, []).append(value)
    return found


@torch.no_grad()
def measure_model(model: LatentVideoModel, cases: Sequence[Case], lives: Sequence[Life], sampler: Sampler, *, seed: int) -> Scores:
    """All measures of one model; of the events also without words."""
    told = gather(cases, continue_cases(model, cases, sampler, words=True, seed=seed))
    untold = gather(cases, continue_cases(model, cases, sampler, words=False, seed=seed))
    long = continue_lives(model, lives, sampler, seed=seed)
    lasts = {f"lasts {s} s": [lasting(life, clip, s) for life, clip in zip(lives, long, strict=True)] for s in SECONDS}
    return told | {_key(measure, words=False): values for measure, values in untold.items()} | lasts


@torch.no_grad()
def measure_bounds(model: LatentVideoModel, cases: Sequence[Case]) -> dict[str, Scores]:
    """The two rows that are no model."""
    through = [model.decode(model.encode(case.video[None]))[0].cpu() for case in cases]
    still = [torch.cat([case.video[:GIVEN], case.video[GIVEN - 1].expand(len(case.video) - GIVEN, -1, -1, -1)]) for case in cases]
    return {ORACLE: gather(cases, through), FROZEN: gather(cases, still)}


def measure_world(models: Mapping[str, LatentVideoModel], sampler: Sampler, *, scenes: int, seed: int) -> list[Row]:
    """One row a measure, over `scenes` unseen scenes of each event and as many single things, the same for every model."""
    cases = [case for event in EVENTS for case in draw_cases(event, scenes, seed=seed)]
    lives = draw_lives(scenes, seed=seed)
    found = {}
    with Progress("world", total=len(models)) as progress:
        for name, model in models.items():
            found[name] = measure_model(model, cases, lives, sampler, seed=seed)
            progress.advance(name)
    found |= measure_bounds(next(iter(models.values())), cases)
    rows = [_row(measure, meaning, words, found) for measure, meaning in MEASURES.items() for words in (True, False)]
    return [row for row in rows if row["models"]]


def _row(measure: str, meaning: str, words: bool, found: Mapping[str, Scores]) -> Row:
    key = _key(measure, words)
    return {"measure": measure, "meaning": meaning, "words": words, "models": {name: bootstrap_mean(scores[key]).as_json() for name, scores in found.items() if key in scores}}


def _key(measure: str, words: bool) -> str:
    return measure if words else f"{measure}, no words"
