"""Draws clips of the built-in world from scenes: anti-aliased signed-distance shapes, two depths, camera pan, strobing light.

Lengths are in units of the clip's short side S, x to the right in [0, W/S], y downwards in [0, H/S]. Time u runs from 0 (first frame) to 1 (last
frame). A motion fills the clip whatever its length; orbits and bounces repeat in longer clips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from base_model.types import ClipShape
from recipes.shapes.prompts import COLORS, ShapesPrompt, Thing, sample_prompt, swap_attribute, write_prompt

Array = NDArray[np.float32]
FPS = 12.0
DEMO_CLIP = ClipShape(13, 32, 32)
STROBES = ("light", "red")
EXTENT = 1.1  # half the longest side of any shape, in radii

_STRAIGHT = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "up_right": (1, -1), "down_left": (-1, 1)}
_MAX_TOKENS = 160
_TRIES = 30  # to keep two bodies apart
_SMALL_SIDE_WEIGHT = 0.25  # of shapes with a side below 24 pixels
_LAMP = {"light": (0.95, 0.95, 0.95), "red": (0.97, 0.04, 0.04)}
_LAMP_ON_THINGS = {"light": 0.25, "red": 0.0}  # share of lamp light mixed into an object: it stays readable


@dataclass(frozen=True)
class Body:
    """A thing with the attributes a prompt leaves free: where it starts, how big it is, how far and how often it moves."""

    thing: Thing
    start: tuple[float, float]  # centre of a straight path's first frame, of an orbit, or of a bounce's floor
    radius: tuple[float, float]  # at u = 0 and u = 1
    travel: tuple[float, float] = (0.0, 0.0)  # displacement from u = 0 to u = 1
    reach: float = 0.0  # radius of an orbit, height of a bounce
    turns: float = 0.0  # orbits (negative: counter-clockwise) or bounces in the clip
    phase: float = 0.0  # part of a turn at u = 0
    span: tuple[float, float] = (0.0, 1.0)  # when a straight path is travelled; before and after it the body rests
    nearness: float = 1.0  # how far a pan moves it, in displacements of the background


@dataclass(frozen=True)
class Scene:
    """All that is needed to draw a clip. The first body is in front of the second."""

    bodies: tuple[Body, ...]
    background: tuple[float, float, float]
    texture: tuple[float, float, float]  # angle, wavelength, offset in turns of the faint ripples that make a pan visible
    pan: tuple[float, float] = (0.0, 0.0)  # displacement of the background on screen from u = 0 to u = 1
    strobe: str | None = None  # one of STROBES
    strobe_phase: int = 0  # 0: lamp on in even frames, 1: in odd frames
    strobe_band: tuple[float, float] = (0.0, 1.0)  # rows lit by the lamp, as parts of the height

    @property
    def things(self) -> tuple[Thing, ...]:
        return tuple(body.thing for body in self.bodies)


class Facts(NamedTuple):
    """What is wrong with a messy pair: `prompt` is what the clip shows, the text may say something else."""

    prompt: ShapesPrompt
    wrong_caption: bool
    blurred: bool
    flashing: bool  # uninvited
    strobe: bool  # asked for


def sample_scene(prompt: ShapesPrompt, rng: np.random.Generator, *, clip: ClipShape, pan: float = 0.0, flashing: bool = False) -> Scene:
    """Draw everything the prompt leaves free.

    pan: probability that the camera moves. flashing: strobing light whether or not the prompt asks for it; a prompt that asks gets it anyway.
    """
    width, height = frame_extent(clip)
    shift = _sample_pan(rng) if rng.random() < pan else (0.0, 0.0)
    bodies = _place(prompt.things, rng, clip, shift)
    if bodies is None:
        shift = (0.0, 0.0)
        bodies = _place(prompt.things, rng, clip, shift)
    if bodies is None:
        raise ValueError(f"no room for {prompt.things} in a frame of {width:.2f} x {height:.2f} short sides")
    scene = plain_scene(bodies, rng, shift)
    return _strobing(scene, rng) if flashing or prompt.strobe else scene


def plain_scene(bodies: tuple[Body, ...], rng: np.random.Generator, pan: tuple[float, float] = (0.0, 0.0)) -> Scene:
    """These bodies before a dull background with ripples."""
    return Scene(bodies, _dull_color(rng), (rng.uniform(0, math.pi), rng.uniform(0.5, 0.8), rng.random()), pan)


def render(scene: Scene, clip: ClipShape) -> Tensor:
    """Draw a scene. Returns float32 [T,3,H,W] in [0,1]. Edges are one pixel wide (coverage of a pixel from its distance to the edge)."""
    side = min(clip.height, clip.width)
    u = _times(clip)
    x = (np.arange(clip.width, dtype=np.float32) + np.float32(0.5)) / np.float32(side)  # [W]
    y = (np.arange(clip.height, dtype=np.float32) + np.float32(0.5)) / np.float32(side)  # [H]
    video = _background(scene, u, x, y)  # [T,3,H,W]
    lit = _lamp(scene, clip) if scene.strobe else None  # [T,H,W]
    if scene.strobe and lit is not None:
        video += lit[:, None] * (_rgb(_LAMP[scene.strobe]) - video)
    for body in reversed(scene.bodies):
        centre, radius = path_on_screen(body, u, scene.pan)
        distance = _DISTANCE[body.thing.shape](x - centre[:, :1], y - centre[:, 1:], radius[:, None, None])  # [T,H,W]
        cover = np.clip(0.5 - distance * side, 0, 1)[:, None]  # [T,1,H,W]
        color = _rgb(COLORS[body.thing.color])  # [1,3,1,1]
        if scene.strobe and lit is not None:
            color = color + np.float32(_LAMP_ON_THINGS[scene.strobe]) * lit[:, None] * (_rgb(_LAMP[scene.strobe]) - color)
        video += cover * (color - video)
    return torch.from_numpy(np.clip(video, 0, 1, out=video))


def body_path(body: Body, u: Array) -> tuple[Array, Array]:
    """Centre [T,2] and radius [T] of a body at times u [T], before the camera pans."""
    radius = body.radius[0] * (body.radius[1] / body.radius[0]) ** u  # [T]
    angle = 2 * math.pi * (body.phase + body.turns * u)  # [T]
    if body.thing.motion == "orbit":
        offset = body.reach * np.stack([np.cos(angle), np.sin(angle)], 1)  # [T,2]
    elif body.thing.motion == "bounce":
        offset = np.stack([0 * u, -body.reach * np.abs(np.sin(angle / 2))], 1)  # [T,2]
    else:
        begin, end = body.span
        offset = np.clip((u - begin) / (end - begin), 0, 1)[:, None] * np.asarray(body.travel)  # [T,2]
    return (np.asarray(body.start) + offset).astype(np.float32), radius.astype(np.float32)


def path_on_screen(body: Body, u: Array, pan: tuple[float, float]) -> tuple[Array, Array]:
    """`body_path`, seen by a camera that pans."""
    centre, radius = body_path(body, u)
    return centre + u[:, None] * (body.nearness * np.asarray(pan, np.float32)), radius  # [T,2], [T]


def blur(video: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of every frame; sigma in pixels. [T,3,H,W] -> [T,3,H,W]."""
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(video.numpy(), (0, 0, sigma, sigma), mode="nearest"))


@lru_cache(maxsize=1)
def native_clips() -> tuple[tuple[ClipShape, ...], tuple[float, ...]]:
    """Every native clip shape of at most 160 latent tokens and at most 2:1, and the probability of each beside the demo's."""
    sides = range(16, 49, 8)
    clips = [ClipShape(t, h, w) for t in (1, 5, 9, 13, 17, 21, 25) for h in sides for w in sides if max(h, w) <= 2 * min(h, w)]
    clips = [c for c in clips if (1 + (c.frames - 1) // 4) * (c.height // 8) * (c.width // 8) <= _MAX_TOKENS]
    weights = np.array([1.0 if min(c.height, c.width) >= 24 else _SMALL_SIDE_WEIGHT for c in clips])
    return tuple(clips), tuple((weights / weights.sum()).cumsum().tolist())


def sample_clip_shape(rng: np.random.Generator) -> ClipShape:
    """The demo's 13x32x32 in 80 % of draws, else any native shape: images to 25 frames, square, landscape and portrait."""
    if rng.random() < 0.8:
        return DEMO_CLIP
    clips, cumulative = native_clips()
    return clips[min(int(np.searchsorted(cumulative, rng.random())), len(clips) - 1)]


def sample_curated_pair(rng: np.random.Generator, clip: ClipShape) -> tuple[str, Tensor]:
    """Caption and clip [T,3,H,W] as a careful curator keeps them: right, sharp, never flashing. A fifth shows two objects; the camera pans in one of ten."""
    prompt = sample_prompt(rng, two_objects=0.2)
    return prompt.text, render(sample_scene(prompt, rng, clip=clip, pan=0.1), clip)


def sample_messy_pair(rng: np.random.Generator, clip: ClipShape) -> tuple[str, Tensor, Facts]:
    """Caption and clip [T,3,H,W] as found: 20 % of captions have one wrong attribute, 10 % of clips are blurred, 10 % flash uninvited, 12 % ask for strobing and get it."""
    prompt = sample_prompt(rng, two_objects=0.2, strobe=0.12)
    wrong, blurred, flashing = (bool(rng.random() < share) for share in (0.20, 0.10, 0.10))
    video = render(sample_scene(prompt, rng, clip=clip, pan=0.1, flashing=flashing), clip)
    if blurred:
        video = blur(video, rng.uniform(0.8, 1.3))
    text = write_prompt(swap_attribute(prompt.things, rng), rng, split="train", strobe=prompt.strobe).text if wrong else prompt.text
    return text, video, Facts(prompt, wrong, blurred, flashing and not prompt.strobe, prompt.strobe)


def _times(clip: ClipShape) -> Array:
    return np.linspace(0, 1, clip.frames, dtype=np.float32) if clip.frames > 1 else np.full(1, 0.5, np.float32)


def frame_extent(clip: ClipShape) -> tuple[float, float]:
    """Width and height in short sides."""
    side = min(clip.height, clip.width)
    return clip.width / side, clip.height / side


def _rgb(color: tuple[float, float, float]) -> Array:
    return np.asarray(color, np.float32).reshape(1, 3, 1, 1)


def _circle(dx: Array, dy: Array, r: Array) -> Array:
    return np.sqrt(dx[:, None] ** 2 + dy[:, :, None] ** 2) - r  # [T,H,W]


def _triangle(dx: Array, dy: Array, r: Array) -> Array:
    """Pointing up; box 2.2 r wide and 2 r high, centred on the box."""
    half_width, half_height = np.float32(1.1), np.float32(1.0)
    norm = np.float32(math.hypot(2.0, 1.1))
    flank = (2 * half_height * np.abs(dx)[:, None] - half_width * dy[:, :, None] - half_width * half_height * r) / norm  # [T,H,W]
    return np.maximum(flank, dy[:, :, None] - half_height * r)


def _bar(dx: Array, dy: Array, r: Array) -> Array:
    """Lying: 2.2 r wide and 0.9 r high."""
    return np.maximum(np.abs(dx)[:, None] - np.float32(1.1) * r, np.abs(dy)[:, :, None] - np.float32(0.45) * r)  # [T,H,W]


def _pillar(dx: Array, dy: Array, r: Array) -> Array:
    """Standing: 0.9 r wide and 2.2 r high."""
    return np.maximum(np.abs(dx)[:, None] - np.float32(0.45) * r, np.abs(dy)[:, :, None] - np.float32(1.1) * r)  # [T,H,W]


_DISTANCE: dict[str, Callable[[Array, Array, Array], Array]] = {"circle": _circle, "triangle": _triangle, "bar": _bar, "pillar": _pillar}


def _background(scene: Scene, u: Array, x: Array, y: Array) -> Array:
    angle, wavelength, offset = scene.texture
    wx = x - u[:, None] * np.float32(scene.pan[0])  # [T,W] world coordinates
    wy = y - u[:, None] * np.float32(scene.pan[1])  # [T,H]
    k = 2 * math.pi / wavelength
    along = np.float32(k * math.cos(angle)) * wx[:, None] + np.float32(k * math.sin(angle)) * wy[:, :, None]  # [T,H,W]
    across = np.float32(-k * math.sin(angle)) * wx[:, None] + np.float32(k * math.cos(angle)) * wy[:, :, None]  # [T,H,W]
    ripple = np.float32(0.02) * (np.sin(along + np.float32(2 * math.pi * offset)) + np.sin(across))  # [T,H,W]
    return np.asarray(_rgb(scene.background) + ripple[:, None], np.float32)  # [T,3,H,W]


def _lamp(scene: Scene, clip: ClipShape) -> Array:
    on = (np.arange(clip.frames) + scene.strobe_phase) % 2 == 0  # [T]
    row = (np.arange(clip.height) + 0.5) / clip.height
    band = (row >= scene.strobe_band[0]) & (row <= scene.strobe_band[1])  # [H]
    return np.broadcast_to((on[:, None] & band)[:, :, None], (clip.frames, clip.height, clip.width)).astype(np.float32)


def _strobing(scene: Scene, rng: np.random.Generator) -> Scene:
    red_fits = all(thing.color != "red" for thing in scene.things)
    kind = "red" if red_fits and rng.random() < 0.4 else "light"
    span = 1.0 if rng.random() < 0.6 else rng.uniform(0.85, 1.0)
    low = rng.uniform(0, 1 - span)
    return replace(scene, strobe=kind, strobe_phase=int(rng.integers(2)), strobe_band=(low, low + span))


def _dull_color(rng: np.random.Generator) -> tuple[float, float, float]:
    """A colour of low saturation (at most 0.25), dark to mid grey."""
    value = rng.uniform(0.12, 0.5)
    r, g, b = (value * (1 - rng.uniform(0, 0.25) * tint) for tint in rng.random(3))
    return r, g, b


def _sample_pan(rng: np.random.Generator) -> tuple[float, float]:
    amount = rng.uniform(0.12, 0.2) * rng.choice((-1, 1))
    return (float(amount), 0.0) if rng.random() < 0.5 else (0.0, float(amount))


def _place(things: tuple[Thing, ...], rng: np.random.Generator, clip: ClipShape, pan: tuple[float, float]) -> tuple[Body, ...] | None:
    """Bodies that stay in frame. Two bodies are kept apart; in one scene in five they may meet, in less than half of the frames where that can be had."""
    u = np.linspace(0, 1, max(clip.frames, 5), dtype=np.float32)
    enough = 0.4 if rng.random() < 0.2 else 0.0
    best: tuple[float, tuple[Body, ...]] | None = None
    for _ in range(1 if len(things) == 1 else _TRIES):
        bodies = tuple(_sample_body(thing, rng, clip, pan, u, crowd=len(things)) for thing in things)
        found = tuple(body for body in bodies if body is not None)
        if len(found) < len(things):
            continue
        met = _share_met(found, u)
        if best is None or met < best[0]:
            best = met, found
        if met <= enough:
            break
    return None if best is None else best[1]


def _share_met(bodies: tuple[Body, ...], u: Array) -> float:
    """Share of frames in which two bodies touch; 0 for one body."""
    if len(bodies) == 1:
        return 0.0
    (a, ra), (b, rb) = body_path(bodies[0], u), body_path(bodies[1], u)
    return float((ra + rb >= np.hypot(*(a - b).T)).mean())


def _sample_body(thing: Thing, rng: np.random.Generator, clip: ClipShape, pan: tuple[float, float], u: Array, crowd: int) -> Body | None:
    """A body whose whole path fits into the frame, or None where a few tries found none (only a panning camera can cause that)."""
    for _ in range(8):
        body = _free_body(thing, rng, clip, crowd)
        centre, radius = path_on_screen(body, u, pan)
        margin = EXTENT * radius[:, None]  # [T,1]
        low = (margin - centre).max(0)
        high = (np.asarray(frame_extent(clip)) - margin - centre).min(0)
        if (low <= high).all():
            x, y = rng.uniform(low, high)
            return replace(body, start=(float(x), float(y)))
    return None


def _free_body(thing: Thing, rng: np.random.Generator, clip: ClipShape, crowd: int) -> Body:
    """Size, reach and speed of a body at the origin. Small frames get the larger radii, so that shapes stay readable."""
    side = min(clip.height, clip.width)
    least, most = (0.17, 0.25) if crowd == 1 else (0.155, 0.185)
    radius = rng.uniform(min(max(least, 4.5 / side), most), most)
    length = (clip.frames - 1) / 12  # in demo clips
    if thing.motion in ("grow", "shrink"):
        small = rng.uniform(0.14, 0.17) if crowd == 1 else rng.uniform(0.135, 0.15)
        large = small * (rng.uniform(1.8, 2.1) if crowd == 1 else rng.uniform(1.7, 1.9))
        return Body(thing, (0.0, 0.0), (small, large) if thing.motion == "grow" else (large, small))
    if thing.motion == "orbit":
        radius = min(radius, 0.21)
        turns = max(1.0, length) * rng.uniform(0.8, 0.95) * rng.choice((-1, 1))
        return Body(thing, (0.0, 0.0), (radius, radius), reach=rng.uniform(0.14, 0.18), turns=float(turns), phase=rng.random())
    if thing.motion == "bounce":
        turns = max(1.0, length) * rng.uniform(1.0, 1.2)
        return Body(thing, (0.0, 0.0), (radius, radius), reach=rng.uniform(0.25, 0.33), turns=turns, phase=rng.random())
    dx, dy = _STRAIGHT.get(thing.motion, (0, 0))
    room = 0.98 - 2 * EXTENT * radius
    step = rng.uniform(0.28, min(0.55 if crowd == 1 else 0.45, room)) if thing.motion != "still" else 0.0
    return Body(thing, (0.0, 0.0), (radius, radius), travel=(dx * step, dy * step))
