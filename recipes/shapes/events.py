"""Scenes in which something happens between things, or between things and the camera: what a model of a world should keep track of.

Occlusion: one passes behind another and comes out again. Collision: one hits another, rests where it hit, and the other is moved as far and stays there. Parallax: two things
rest at two depths before a panning camera, and the near one moves twice as far on screen. Each clip is drawn along the longer side of its frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from base_model.types import ClipShape
from recipes.shapes.prompts import COLORS, COMBINATIONS, SHAPES, Thing, motion_words, name
from recipes.shapes.render import EXTENT, Body, Scene, frame_extent, plain_scene, render

Event = Literal["occlusion", "collision", "parallax"]
EVENTS: tuple[Event, ...] = get_args(Event)
SHAPES_OF_EVENTS = (ClipShape(13, 32, 32), ClipShape(21, 32, 48), ClipShape(21, 48, 32))
NEARNESS = 2.0  # of the near thing under a pan; the far one moves with the background

_HALF = {"circle": (1.0, 1.0), "triangle": (1.1, 1.0), "bar": (1.1, 0.45), "pillar": (0.45, 1.1)}  # half width and height, in radii
_DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 1), "up": (1, -1)}  # axis and sign
_HIT = ("{a} hits {b}", "{a} bumps into {b}", "{a} knocks {b} away")
_PASS = ("{a} {v} behind {b}", "{a} {p} behind {b}", "a video of {a} {p} behind {b}")
_CAMERA = ("{a} and {b} seen by a moving camera", "the camera moves past {a} and {b}")


class EventScene(NamedTuple):
    """A scene, its caption, and its things: the one in front first."""

    text: str
    scene: Scene

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.scene.things


def sample_event(event: Event, rng: np.random.Generator, *, clip: ClipShape, split: str = "train") -> EventScene:
    """A scene of this kind with things of the split."""
    return _SAMPLERS[event](rng, clip, split)


def sample_event_pair(rng: np.random.Generator, clip: ClipShape | None = None) -> tuple[str, Tensor]:
    """Caption and clip [T,3,H,W] of a training event of any kind; without `clip` at one of `SHAPES_OF_EVENTS`."""
    event = EVENTS[int(rng.integers(len(EVENTS)))]
    clip = clip or SHAPES_OF_EVENTS[int(rng.integers(len(SHAPES_OF_EVENTS)))]
    found = sample_event(event, rng, clip=clip)
    return found.text, render(found.scene, clip)


def occlusion(rng: np.random.Generator, clip: ClipShape, split: str) -> EventScene:
    """A thing passes behind a large disc, which rests, and comes to rest on the other side; wholly beside it before and after where the frame is long enough."""
    axis, sign, motion = _direction(rng, clip)
    passing, resting = _two_things(rng, split, (motion, "still"), second_shape="circle")
    small, large, size = rng.uniform(0.15, 0.17), rng.uniform(0.23, 0.25), np.asarray(frame_extent(clip))
    middle = size / 2  # [2]
    middle[1 - axis] += rng.uniform(-1, 1) * max(0.0, middle[1 - axis] - EXTENT * large)
    reach = min(size[axis] / 2 - EXTENT * small, large + 1.2 * EXTENT * small)
    start, travel = middle.copy(), np.zeros(2)
    start[axis] -= sign * reach
    travel[axis] = 2 * sign * reach
    front = Body(resting, _pair(middle), (large, large))
    back = Body(passing, _pair(start), (small, small), travel=_pair(travel), span=(0.0, 0.85))
    v, p = motion_words(passing, rng, split == "eval")
    return EventScene(_pick(_PASS, rng).format(a=name(passing, rng), b=name(resting, rng), v=v, p=p), plain_scene((front, back), rng))


def collision(rng: np.random.Generator, clip: ClipShape, split: str) -> EventScene:
    """One moves until it hits another between 0.35 and 0.45 of the clip; that one is moved as far in the same time and rests."""
    axis, sign, motion = _direction(rng, clip)
    hitting, hit = _two_things(rng, split, (motion, motion))
    radii, size = rng.uniform(0.14, 0.16, 2), np.asarray(frame_extent(clip))
    halves = [_HALF[thing.shape][axis] * radius for thing, radius in zip((hitting, hit), radii, strict=True)]
    moment = rng.uniform(0.35, 0.45)
    room = size[axis] - 2 * sum(halves)
    distance = room / 2 * rng.uniform(0.85, 1.0)
    line = size / 2  # [2]
    margin = EXTENT * radii.max()
    line[1 - axis] = rng.uniform(margin, size[1 - axis] - margin)
    begin = halves[0] + rng.uniform(0, room - 2 * distance)  # from the side it comes from
    travel = np.zeros(2)
    travel[axis] = sign * distance

    def place(along: float) -> tuple[float, float]:
        where = line.copy()
        where[axis] = along if sign > 0 else size[axis] - along
        return _pair(where)

    first = Body(hitting, place(begin), (radii[0], radii[0]), travel=_pair(travel), span=(0.0, moment))
    second = Body(hit, place(begin + distance + sum(halves)), (radii[1], radii[1]), travel=_pair(travel), span=(moment, 2 * moment))
    return EventScene(_pick(_HIT, rng).format(a=name(hitting, rng), b=name(hit, rng)), plain_scene((first, second), rng))


def parallax(rng: np.random.Generator, clip: ClipShape, split: str) -> EventScene:
    """Two things at rest on either side of the middle line, and a camera that pans along it."""
    axis, sign, _ = _direction(rng, clip)
    near, far = _two_things(rng, split, ("still", "still"))
    radii, size = (rng.uniform(0.16, 0.18), rng.uniform(0.13, 0.15)), np.asarray(frame_extent(clip))
    pan = np.zeros(2)
    pan[axis] = sign * rng.uniform(0.15, 0.2) * size[axis]
    sides = rng.permutation([0.25, 0.75])
    bodies = []
    for thing, radius, nearness, side in zip((near, far), radii, (NEARNESS, 1.0), sides, strict=True):
        moved, margin = nearness * pan[axis], EXTENT * radius
        low, high = margin + max(0.0, -moved), size[axis] - margin - max(0.0, moved)
        where = np.zeros(2)
        where[axis], where[1 - axis] = rng.uniform(low, high), side * size[1 - axis]
        bodies.append(Body(thing, _pair(where), (radius, radius), nearness=nearness))
    return EventScene(_pick(_CAMERA, rng).format(a=name(near, rng), b=name(far, rng)), plain_scene(tuple(bodies), rng, _pair(pan)))


_SAMPLERS: dict[Event, Callable[[np.random.Generator, ClipShape, str], EventScene]] = {"occlusion": occlusion, "collision": collision, "parallax": parallax}


def _direction(rng: np.random.Generator, clip: ClipShape) -> tuple[int, int, str]:
    """Axis (0: x, 1: y), sign and word of a direction along the longer side of the frame."""
    words = [word for word, (axis, _) in _DIRECTIONS.items() if clip.width == clip.height or axis == int(clip.height > clip.width)]
    word = words[int(rng.integers(len(words)))]
    return *_DIRECTIONS[word], word


def _two_things(rng: np.random.Generator, split: str, motions: tuple[str, str], second_shape: str | None = None) -> tuple[Thing, Thing]:
    """Two combinations of the split with these motions and different colours."""
    allowed, colors = frozenset(COMBINATIONS[split]), list(COLORS)
    while True:
        first, second = (Thing(SHAPES[int(rng.integers(len(SHAPES)))], colors[int(rng.integers(len(colors)))], motion) for motion in motions)
        if second_shape is not None:
            second = Thing(second_shape, second.color, second.motion)
        if {first, second} <= allowed and first.color != second.color:
            return first, second


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _pair(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values[0]), float(values[1])
