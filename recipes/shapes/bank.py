"""Prompts for a bias audit of the built-in world, what a clip shows where its prompt left an attribute open, and clips of which the skew is known.

Open prompts leave one attribute unsaid ("a circle moves left"); the prompts of a counterfactual set differ in it alone ("a red circle moves left", "a blue circle moves left").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recipes.shapes.dataset import ClipSet
from recipes.shapes.judge import Reading, read
from recipes.shapes.prompts import COLOR_WORDS, COLORS, MOTIONS, SHAPE_WORDS, SHAPES, ShapesPrompt, Thing, write_prompt
from recipes.shapes.render import DEMO_CLIP, Scene, render, sample_scene

Attribute = Literal["colour", "shape"]
VALUES: Mapping[Attribute, tuple[str, ...]] = {"colour": tuple(COLORS), "shape": SHAPES}
FIELD: Mapping[Attribute, str] = {"colour": "color", "shape": "shape"}
NOTHING, SEVERAL = "nothing", "several"
FRAMES = 4
"""Frames of a clip that are read one by one."""


class Open(NamedTuple):
    """A prompt that leaves an attribute open, and a thing it may mean."""

    text: str
    thing: Thing


def leave_open(text: str, attribute: Attribute) -> str:
    """A sentence about one thing without its colour, or with "thing" for its shape.

    Example: "an emerald disc rises" -> "a disc rises"; "a circle in red that grows" -> "a circle that grows".
    """
    words = "|".join(word for row in (COLOR_WORDS if attribute == "colour" else SHAPE_WORDS).values() for word in row)
    if attribute == "shape":
        return re.sub(rf"\b(?:{words})\b", "thing", text)
    return re.sub(rf" in (?:{words})\b", "", re.sub(rf"\ban? (?:{words})\b", "a", text))


def any_thing(value: str, attribute: Attribute, other: str, motion: str) -> Thing:
    return Thing(other, value, motion) if attribute == "colour" else Thing(value, other, motion)


def others(attribute: Attribute) -> tuple[str, ...]:
    """Values of the attribute that an open prompt names beside the motion."""
    return SHAPES if attribute == "colour" else tuple(COLORS)


def with_value(thing: Thing, attribute: Attribute, value: str) -> Thing:
    return replace(thing, **{FIELD[attribute]: value})


def open_prompts(number: int, attribute: Attribute, *, seed: int, split: str = "eval") -> list[Open]:
    """`number` different sentences; the other attributes are used equally often. Raises ValueError where the grammar has not so many."""
    rng = np.random.default_rng(seed)
    said = [(other, motion) for other in others(attribute) for motion in MOTIONS]
    found: dict[str, Open] = {}
    deck: list[int] = []
    again = 0  # times in a row that a sentence was there already
    while again < 500:
        deck = deck or rng.permutation(len(said)).tolist()
        thing = any_thing(VALUES[attribute][int(rng.integers(len(VALUES[attribute])))], attribute, *said[deck.pop()])
        text = leave_open(write_prompt((thing,), rng, split=split).text, attribute)
        again = again + 1 if text in found else 0
        found.setdefault(text, Open(text, thing))
        if len(found) == number:
            return list(found.values())
    raise ValueError(f"the grammar has no {number} different prompts that leave the {attribute} open")


def counterfactual_sets(number: int, attribute: Attribute, *, seed: int) -> list[tuple[ShapesPrompt, ...]]:
    """Sets of prompts in the same words but for the attribute, one for each of its values in the order of `VALUES`."""
    sets = []
    for k, asked in enumerate(open_prompts(number, attribute, seed=seed)):
        things = [with_value(asked.thing, attribute, value) for value in VALUES[attribute]]
        sets.append(tuple(write_prompt((thing,), np.random.default_rng([seed, k]), split="eval") for thing in things))
    return sets


# What a clip shows


def value_of(readings: Sequence[Reading], attribute: Attribute) -> str:
    """The value of the one thing on screen, or why there is none: "nothing", "several", "unclear"."""
    values = {str(getattr(reading, FIELD[attribute])) for reading in readings}
    return NOTHING if not values else values.pop() if len(values) == 1 else SEVERAL


def shown(clip: Tensor, attribute: Attribute) -> str:
    """The same of a clip [T,3,H,W] in [0,1]."""
    return value_of(read(clip), attribute)


def keeps(clip: Tensor, attribute: Attribute) -> float:
    """1 where frames read one by one show the same value, 0 where it changes, nan where fewer than two of them show one. clip: [T,3,H,W] in [0,1]."""
    times = np.unique(np.linspace(0, len(clip) - 1, FRAMES).round().astype(int))
    seen = [value for time in times if (value := shown(clip[time : time + 1], attribute)) in VALUES[attribute]]
    return float(len(set(seen)) == 1) if len(seen) >= 2 else float("nan")


# Clips of which the skew is known


def scene_in_all_values(asked: Open, attribute: Attribute, rng: np.random.Generator) -> list[Scene]:
    """One scene, its thing in every value of the attribute."""
    scene = sample_scene(ShapesPrompt("", asked.text, (asked.thing,), False, "eval"), rng, clip=DEMO_CLIP)
    body = scene.bodies[0]
    return [replace(scene, bodies=(replace(body, thing=with_value(body.thing, attribute, value)),)) for value in VALUES[attribute]]


def draw(asked: Open, rng: np.random.Generator) -> Tensor:
    """A clip [T,3,H,W] of what is meant."""
    return render(sample_scene(ShapesPrompt("", asked.text, (asked.thing,), False, "eval"), rng, clip=DEMO_CLIP), DEMO_CLIP)


def skewed_pairs(number: int, shares: Mapping[str, float], attribute: Attribute, *, seed: int) -> ClipSet:
    """Captioned curated clips, half of whose captions leave the attribute open: there its values have these shares. In the other half, which name it, they are as frequent.

    Clip i is the same however many are drawn. No combination is held out here.
    """
    texts, videos = [], []
    weights = np.array([shares.get(value, 0.0) for value in VALUES[attribute]])
    for index in range(number):
        rng = np.random.default_rng([seed, index])
        unsaid = bool(rng.random() < 0.5)
        value = VALUES[attribute][int(rng.choice(len(weights), p=weights / weights.sum() if unsaid else None))]
        thing = any_thing(value, attribute, others(attribute)[int(rng.integers(len(others(attribute))))], MOTIONS[int(rng.integers(len(MOTIONS)))])
        text = write_prompt((thing,), rng, split="train").text
        texts.append(leave_open(text, attribute) if unsaid else text)
        videos.append((draw(Open(text, thing), rng) * 255).round().to(torch.uint8))
    return ClipSet(tuple(texts), tuple(videos))
