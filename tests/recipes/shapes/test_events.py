"""Scenes in which something happens: what they show, frame by frame, is what they are called."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from base_model.types import ClipShape
from recipes.shapes.dataset import draw_clips
from recipes.shapes.events import EVENTS, NEARNESS, SHAPES_OF_EVENTS, Event, EventScene, sample_event, sample_event_pair
from recipes.shapes.judge import read
from recipes.shapes.prompts import is_held_out
from recipes.shapes.render import body_path, path_on_screen, render

LYING = ClipShape(21, 32, 48)
HALF_WIDTH = {"circle": 1.0, "triangle": 1.1, "bar": 1.1, "pillar": 0.45}
HALF_HEIGHT = {"circle": 1.0, "triangle": 1.0, "bar": 0.45, "pillar": 1.1}
U = np.linspace(0, 1, LYING.frames, dtype=np.float32)


def draw(event: Event, seed: int, clip: ClipShape = LYING, split: str = "train") -> EventScene:
    return sample_event(event, np.random.default_rng([seed, EVENTS.index(event)]), clip=clip, split=split)


@pytest.mark.parametrize("seed", range(12))
def test_what_passes_behind_a_disc_is_seen_then_hidden_then_seen_unchanged_on_the_other_side(seed: int) -> None:
    found = draw("occlusion", seed)
    front, back = found.things
    clip = render(found.scene, LYING)
    first, last = ({r.color: r for r in read(clip[part])} for part in (slice(0, 2), slice(-3, None)))
    assert first[back.color].shape == last[back.color].shape == back.shape and front.shape == "circle"
    assert abs(first[back.color].size / last[back.color].size - 1) < 0.1
    centre = last[front.color].start[0]
    assert (first[back.color].start[0] - centre) * (last[back.color].start[0] - centre) < 0
    without = render(replace(found.scene, bodies=found.scene.bodies[:1]), LYING)
    visible = (clip - without).abs().amax(1).gt(0.1).flatten(1).sum(1)  # [T] pixels
    assert visible.min() < 0.25 * visible[0] and visible[-1] > 0.9 * visible[0]


@pytest.mark.parametrize("seed", range(12))
def test_a_hit_thing_moves_only_from_the_moment_the_other_one_rests_at_its_side(seed: int) -> None:
    found = draw("collision", seed)
    (a, _), (b, _) = (body_path(body, U) for body in found.scene.bodies)
    moves_a, moves_b = (np.abs(np.diff(path[:, 0])) > 1e-5 for path in (a, b))
    last, first = int(np.flatnonzero(moves_a)[-1]), int(np.flatnonzero(moves_b)[0])
    assert 0 <= first - last <= 1 and moves_a[: last + 1].all() and not moves_a[last + 1 :].any()
    assert not moves_b[-1]
    assert np.linalg.norm(a[-1] - a[0]) > 0.1 and np.abs((a[-1] - a[0]) - (b[-1] - b[0])).max() < 1e-5
    assert (np.diff(a[:, 0])[0] > 0) == (np.diff(b[:, 0]).sum() > 0)
    clip = render(found.scene, LYING)
    seen = {r.color: r for r in read(clip[-2:])}
    assert all(seen[thing.color].shape == thing.shape for thing in found.things)


def test_things_that_collide_touch_and_never_overlap() -> None:
    u = np.linspace(0, 1, 2001, dtype=np.float32)
    for seed in range(40):
        (a, ra), (b, rb) = (body_path(body, u) for body in draw("collision", seed).scene.bodies)
        half_a, half_b = (HALF_WIDTH[thing.shape] * float(r[0]) for thing, r in zip(draw("collision", seed).things, (ra, rb), strict=True))
        gap = np.abs(a[:, 0] - b[:, 0]) - half_a - half_b  # [u]
        assert gap.min() >= -1e-5 and gap.min() < 2e-3


@pytest.mark.parametrize("seed", range(12))
def test_under_a_pan_the_near_thing_moves_twice_as_far_as_the_far_one_and_the_background(seed: int) -> None:
    found = draw("parallax", seed)
    near, far = (path_on_screen(body, U, found.scene.pan)[0] for body in found.scene.bodies)
    pan = np.asarray(found.scene.pan)
    assert np.linalg.norm(pan) > 0.2
    assert np.abs(near[-1] - near[0] - NEARNESS * pan).max() < 1e-5 and np.abs(far[-1] - far[0] - pan).max() < 1e-5
    readings = {r.color: r for r in read(render(found.scene, LYING))}
    assert {thing.color for thing in found.things} == set(readings)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("clip", SHAPES_OF_EVENTS, ids=str)
def test_events_stay_in_frame_at_every_size_they_are_drawn_at(event: Event, clip: ClipShape) -> None:
    high = np.asarray([clip.width, clip.height]) / min(clip.width, clip.height)
    u = np.linspace(0, 1, clip.frames, dtype=np.float32)
    for seed in range(30):
        scene = draw(event, seed, clip).scene
        for body in scene.bodies:
            centre, radius = path_on_screen(body, u, scene.pan)
            reach = radius[:, None] * (HALF_WIDTH[body.thing.shape], HALF_HEIGHT[body.thing.shape])  # [T,2]
            assert (centre - reach >= -1e-5).all() and (centre + reach <= high + 1e-5).all()


def test_training_events_never_show_held_out_things_and_evaluation_ones_always() -> None:
    for event in EVENTS:
        assert not any(is_held_out(thing) for seed in range(30) for thing in draw(event, seed).things)
        assert all(is_held_out(thing) for seed in range(30) for thing in draw(event, seed, split="eval").things)


def test_captions_name_both_things_and_a_seed_gives_one_clip() -> None:
    texts = {sample_event_pair(np.random.default_rng(seed))[0] for seed in range(60)}
    assert any("behind" in text for text in texts) and any("hits" in text for text in texts) and any("moving camera" in text for text in texts)
    first, second = (sample_event_pair(np.random.default_rng(3)) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_events_are_as_frequent_as_asked() -> None:
    shown = sum(any(word in text for word in ("behind", "hits", "bumps", "knocks", "camera")) for text in draw_clips("messy", 300, seed=0, events=0.25).texts)
    assert 45 <= shown <= 105


def test_without_events_messy_clips_are_what_they_were_before_there_were_events() -> None:
    clips = draw_clips("messy", 200, seed=0)
    told = repr([(text, tuple(video.shape)) for text, video in zip(clips.texts, clips.videos, strict=True)])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "9ba67b7883e21cb3"
    assert [float(video.double().mean()) for video in clips.videos[-3:]] == pytest.approx([96.5897, 71.6745, 80.7275], abs=0.01)
