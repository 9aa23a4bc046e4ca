"""The renderer against geometry that is known without it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from base_model.types import ClipShape, LatentSpec
from recipes.shapes.prompts import MOTIONS, SHAPES, Thing, is_held_out, make_prompts, write_prompt
from recipes.shapes.render import (
    DEMO_CLIP,
    FPS,
    Body,
    Scene,
    body_path,
    native_clips,
    render,
    sample_clip_shape,
    sample_curated_pair,
    sample_messy_pair,
    sample_scene,
)

AREA = {"circle": math.pi, "triangle": 2.2, "bar": 2.2 * 0.9, "pillar": 0.9 * 2.2}  # in squared radii
GREY = (0.3, 0.3, 0.3)
PLAIN = Scene((), GREY, (0.3, 0.6, 0.2))


def scenes(motion: str, n: int, clip: ClipShape = DEMO_CLIP, pan: float = 0.0) -> list[Scene]:
    rng = np.random.default_rng(MOTIONS.index(motion))
    prompts = [write_prompt((Thing(SHAPES[i % 4], "yellow", motion),), rng, split="train") for i in range(n)]
    return [sample_scene(prompt, rng, clip=clip, pan=pan) for prompt in prompts]


def cover(scene: Scene, clip: ClipShape) -> torch.Tensor:
    """Cover [T,H,W] of the only object: drawn white over black without ripples by differencing the scene with and without it."""
    empty, full = render(replace(scene, bodies=()), clip), render(scene, clip)
    return (full[:, 0] - empty[:, 0]) / (0.95 - empty[:, 0])


def luminance(video: torch.Tensor) -> torch.Tensor:
    linear = torch.where(video <= 0.04045, video / 12.92, ((video + 0.055) / 1.055) ** 2.4)
    return (linear * torch.tensor([0.2126, 0.7152, 0.0722])[:, None, None]).sum(1)


def test_the_same_seed_gives_the_same_clip() -> None:
    for flashing in (False, True):
        prompt = make_prompts(1, seed=0, split="train", two_objects=1)[0]
        a, b = (sample_scene(prompt, np.random.default_rng(5), clip=DEMO_CLIP, pan=0.5, flashing=flashing) for _ in range(2))
        assert a == b
        assert torch.equal(render(a, DEMO_CLIP), render(b, DEMO_CLIP))


def test_a_clip_is_float32_in_the_unit_interval() -> None:
    video = render(scenes("left", 1)[0], DEMO_CLIP)
    assert video.shape == (13, 3, 32, 32)
    assert video.dtype == torch.float32
    assert video.min() >= 0
    assert video.max() <= 1


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("pan", [0.0, 1.0])
def test_a_single_object_keeps_its_whole_area_in_frame(motion: str, pan: float) -> None:
    for clip in (DEMO_CLIP, ClipShape(25, 32, 24), ClipShape(5, 24, 48)):
        for scene in scenes(motion, 8, clip, pan):
            body = scene.bodies[0]
            side = min(clip.height, clip.width)
            radius = np.geomspace(*body.radius, clip.frames) * side
            expected = AREA[body.thing.shape] * radius**2
            np.testing.assert_allclose(cover(scene, clip).sum((1, 2)).numpy(), expected, rtol=0.07)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_motion_is_large_enough_to_be_read(motion: str) -> None:
    for scene in scenes(motion, 30):
        body = scene.bodies[0]
        centre, radius = body_path(body, np.linspace(0, 1, 13, dtype=np.float32))
        (dx, dy), (wide, high) = centre[-1] - centre[0], np.ptp(centre, axis=0)
        ratio = radius[-1] / radius[0]
        signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "up_right": (1, -1), "down_left": (-1, 1)}
        if motion in signs:
            assert math.hypot(dx, dy) >= 0.25
            assert (np.sign(round(float(dx), 5)), np.sign(round(float(dy), 5))) == signs[motion]
        elif motion == "bounce":
            assert high >= 0.2
            assert wide < 1e-6
        elif motion == "orbit":
            assert min(wide, high) >= 0.25
            np.testing.assert_allclose(np.hypot(*(centre - body.start).T), body.reach, rtol=1e-5)
        else:
            assert max(wide, high) < 1e-6
            assert ratio == pytest.approx(1) if motion == "still" else max(ratio, 1 / ratio) >= 1.7
            assert (ratio > 1) == (motion == "grow") or motion == "still"
        assert radius.max() <= 0.36
        assert radius.min() >= 0.13


def test_edges_are_smooth() -> None:
    body = Body(Thing("circle", "yellow", "still"), (0.5, 0.5), (0.25, 0.25))
    part = cover(replace(PLAIN, bodies=(body,)), ClipShape(1, 32, 32))[0]
    rim = ((part > 0.02) & (part < 0.98)).sum()
    assert 2 * math.pi * 8 * 0.7 <= rim <= 2 * math.pi * 8 * 1.6


def test_an_object_that_passes_behind_another_comes_out_the_same() -> None:
    front = Body(Thing("circle", "red", "still"), (0.8, 0.5), (0.2, 0.2))
    behind = Body(Thing("circle", "yellow", "right"), (0.2, 0.5), (0.12, 0.12), travel=(1.2, 0.0))
    clip = ClipShape(13, 32, 52)
    together, alone, only_front = (render(replace(PLAIN, bodies=bodies), clip) for bodies in ((front, behind), (behind,), (front,)))
    for t, columns in ((0, slice(1, 12)), (12, slice(40, 51))):
        assert torch.equal(together[t, :, :, columns], alone[t, :, :, columns])
        assert not torch.equal(together[t, :, :, columns], only_front[t, :, :, columns])
    torch.testing.assert_close(together[6], only_front[6], atol=1e-6, rtol=0)
    area = cover(replace(PLAIN, bodies=(behind,)), clip).sum((1, 2))
    np.testing.assert_allclose(area[12], area[0], rtol=0.01)


def test_two_objects_are_apart_in_most_scenes_and_meet_in_some() -> None:
    rng = np.random.default_rng(0)
    u = np.linspace(0, 1, 13, dtype=np.float32)
    shares = []
    for prompt in make_prompts(120, seed=2, split="train", two_objects=1):
        (a, ra), (b, rb) = (body_path(body, u) for body in sample_scene(prompt, rng, clip=DEMO_CLIP).bodies)
        shares.append(float((np.hypot(*(a - b).T) < ra + rb).mean()))
    assert 0.1 <= np.mean(np.array(shares) > 0) <= 0.6
    assert np.mean(np.array(shares) > 0.5) <= 0.1


def test_a_pan_shifts_the_background_and_the_objects_together() -> None:
    scene = replace(PLAIN, pan=(12 / 32, 0.0))  # one pixel a frame
    video = render(scene, DEMO_CLIP)
    for t in range(1, 13):
        torch.testing.assert_close(video[t, :, :, t:], video[0, :, :, :-t], atol=1e-5, rtol=0)
    assert video[0].std(dim=(1, 2)).min() > 0.01
    moving = replace(scene, bodies=(Body(Thing("bar", "cyan", "still"), (0.3, 0.5), (0.15, 0.15)),))
    drawn = render(moving, DEMO_CLIP)
    torch.testing.assert_close(drawn[12, :, :, 12:], drawn[0, :, :, :-12], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["light", "red"])
def test_a_strobing_scene_alternates_over_two_fifths_of_the_frame(kind: str) -> None:
    rng = np.random.default_rng(0)
    prompts = make_prompts(60, seed=4, split="train", two_objects=0.3)
    found = [s for p in prompts if (s := sample_scene(p, rng, clip=DEMO_CLIP, flashing=True)).strobe == kind]
    assert len(found) >= 8
    for scene in found:
        video = render(scene, DEMO_CLIP)
        for a, b in pairwise(video):
            light = (luminance(a[None]) - luminance(b[None])).abs()[0] >= 0.1
            red = ((a[0] - a[1]) - (b[0] - b[1])).abs() > 0.5
            assert (light if kind == "light" else red).float().mean() >= 0.4
    assert FPS / 2 > 3  # alternating every frame is more than three flashes a second


def test_a_prompt_that_asks_for_strobing_gets_it_and_no_other_does() -> None:
    rng = np.random.default_rng(0)
    for prompt in make_prompts(40, seed=4, split="eval", strobe=0.5):
        assert (sample_scene(prompt, rng, clip=DEMO_CLIP).strobe is not None) == prompt.strobe


def test_native_sizes_fit_the_latent_grid_and_the_token_budget() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_clip_shape(rng) for _ in range(2000)]
    assert 0.75 <= np.mean([clip == DEMO_CLIP for clip in drawn]) <= 0.85
    others = set(drawn) - {DEMO_CLIP}
    latents = LatentSpec(8, 4, 4)
    for clip in others:
        _, frames, height, width = latents.shape(clip)
        assert frames * (height // 2) * (width // 2) <= 160
    assert {clip.frames for clip in others} == {1, 5, 9, 13, 17, 21, 25}
    assert {side for clip in others for side in (clip.height, clip.width)} == {16, 24, 32, 40, 48}
    assert any(clip.height > clip.width for clip in others)
    assert any(clip.height < clip.width for clip in others)
    assert np.mean([min(clip.height, clip.width) < 24 for clip in drawn]) < 0.1


@pytest.mark.parametrize("clip", native_clips()[0][::7], ids=str)
def test_every_native_size_can_be_drawn_with_two_objects_and_a_pan(clip: ClipShape) -> None:
    rng = np.random.default_rng(0)
    for prompt in make_prompts(6, seed=0, split="train", two_objects=0.7):
        assert render(sample_scene(prompt, rng, clip=clip, pan=0.5, flashing=True), clip).shape == (clip.frames, 3, clip.height, clip.width)


def test_messy_pairs_are_wrong_as_often_as_said_and_never_show_held_out_things() -> None:
    rng = np.random.default_rng(0)
    clip = ClipShape(1, 24, 24)
    facts = [sample_messy_pair(rng, clip)[2] for _ in range(800)]
    for name, share in (("wrong_caption", 0.20), ("blurred", 0.10), ("flashing", 0.088), ("strobe", 0.12)):
        assert np.mean([getattr(fact, name) for fact in facts]) == pytest.approx(share, abs=0.035), name
    assert np.mean([len(fact.prompt.things) == 2 for fact in facts]) == pytest.approx(0.20, abs=0.05)
    assert not any(is_held_out(thing) for fact in facts for thing in fact.prompt.things)
    assert not any(fact.flashing and fact.strobe for fact in facts)


def test_a_wrong_caption_differs_from_the_right_one_and_a_right_one_does_not() -> None:
    rng = np.random.default_rng(1)
    pairs = [sample_messy_pair(rng, ClipShape(1, 24, 24)) for _ in range(300)]
    for text, _, facts in pairs:
        assert facts.wrong_caption or text == facts.prompt.text
    assert all(text != facts.prompt.text for text, _, facts in pairs if facts.wrong_caption)


def test_curated_pairs_are_sharp_and_steady() -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        text, video = sample_curated_pair(rng, DEMO_CLIP)
        level = luminance(video).mean((1, 2))
        assert (level[1:] - level[:-1]).abs().max() < 0.06
        assert "light" not in text


@pytest.mark.timed
def test_drawing_a_demo_clip_takes_at_most_four_milliseconds() -> None:
    rng = np.random.default_rng(0)
    prompt = make_prompts(1, seed=0, split="train")[0]

    def once() -> float:
        start = time.process_time()
        render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP)
        return time.process_time() - start

    assert min(once() for _ in range(20)) <= 0.004
