"""The judge against rendered clips whose contents are known, and its flash counter against sequences made by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.tiny import WEIGHTS, load_codec
from base_model.types import ClipShape
from recipes.shapes.judge import Judgement, confusion, confusions, flashes, in_frame, is_flashing, judge, read
from recipes.shapes.prompts import COLORS, MOTIONS, SHAPES, ShapesPrompt, Thing, make_prompts, swap_attribute
from recipes.shapes.render import DEMO_CLIP, FPS, Body, Scene, blur, render, sample_clip_shape, sample_scene


def draw(prompts: list[ShapesPrompt], seed: int, clip: ClipShape = DEMO_CLIP, pan: float = 0.0, flashing: bool = False) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.stack([render(sample_scene(prompt, rng, clip=clip, pan=pan, flashing=flashing), clip) for prompt in prompts])


def degrade(videos: Tensor, seed: int) -> Tensor:
    """What a decoder does at least: blur of 0.6 pixels and noise of 0.02."""
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(seed))
    return (torch.stack([blur(video, 0.6) for video in videos]) + 0.02 * noise).clamp(0, 1)


def share(judgements: list[Judgement], attribute: str) -> float:
    return float(np.mean([flag for judged in judgements for flag in getattr(judged, attribute)]))


@pytest.fixture(scope="module")
def prompts() -> list[ShapesPrompt]:
    return make_prompts(260, seed=11, split="train") + make_prompts(240, seed=11, split="eval")


@pytest.fixture(scope="module")
def clips(prompts: list[ShapesPrompt]) -> Tensor:
    return draw(prompts, 12)


@pytest.fixture(scope="module")
def judged(prompts: list[ShapesPrompt], clips: Tensor) -> list[Judgement]:
    return judge(clips, prompts)


def one(shape: str = "circle", color: str = "red", motion: str = "still") -> ShapesPrompt:
    return ShapesPrompt("id", "text", (Thing(shape, color, motion),), False, "train")


@pytest.mark.parametrize("attribute", ["shape_right", "colour_right", "motion_right"])
def test_five_hundred_fresh_clips_are_read_right_in_99_of_100_per_attribute(judged: list[Judgement], attribute: str) -> None:
    assert share(judged, attribute) >= 0.99


def test_every_value_of_every_attribute_is_read_right(prompts: list[ShapesPrompt], judged: list[Judgement]) -> None:
    tables = confusions(prompts, judged)
    for attribute, values in (("shape", SHAPES), ("color", tuple(COLORS)), ("motion", MOTIONS)):
        assert set(tables[attribute]) == set(values)
        for value in values:
            assert tables[attribute][value].get(value, 0) >= 0.96 * sum(tables[attribute][value].values()), (attribute, value)


def test_mild_blur_and_noise_change_no_more_than_one_reading_in_a_hundred(prompts: list[ShapesPrompt], clips: Tensor) -> None:
    some = slice(100, 300)
    readings = judge(degrade(clips[some], 0), prompts[some])
    assert min(share(readings, name) for name in ("shape_right", "colour_right", "motion_right")) >= 0.99


def test_two_objects_are_read_right_though_they_may_hide_each_other() -> None:
    both = make_prompts(120, seed=3, split="train", two_objects=1)
    readings = judge(draw(both, 4), both)
    assert min(share(readings, name) for name in ("shape_right", "colour_right", "motion_right")) >= 0.97
    assert np.mean([r.all_right for r in readings]) >= 0.94


@pytest.mark.parametrize(("pan", "flashing"), [(1.0, False), (0.0, True)])
def test_a_panning_camera_and_strobing_light_do_not_mislead_it(pan: float, flashing: bool) -> None:
    some = make_prompts(80, seed=5, split="train")
    readings = judge(draw(some, 6, pan=pan, flashing=flashing), some)
    assert min(share(readings, name) for name in ("shape_right", "colour_right", "motion_right")) >= 0.97


def test_native_sizes_are_read_right_and_an_image_shows_every_motion() -> None:
    rng = np.random.default_rng(7)
    some = make_prompts(80, seed=8, split="train")
    readings: list[Judgement] = []
    for prompt in some:
        clip = sample_clip_shape(rng)
        while clip == DEMO_CLIP:
            clip = sample_clip_shape(rng)
        readings += judge(render(sample_scene(prompt, rng, clip=clip), clip)[None], [prompt])
    assert np.mean([r.all_right for r in readings]) >= 0.96
    image = ClipShape(1, 32, 32)
    assert all(r.all_right for r in judge(draw(some[:20], 9, image), some[:20]))


def test_a_wrong_attribute_is_wrong_and_the_others_stay_right(prompts: list[ShapesPrompt], clips: Tensor) -> None:
    rng = np.random.default_rng(0)
    for prompt, clip in zip(prompts[:120], clips[:120], strict=True):
        asked = swap_attribute(prompt.things, rng)
        (seen,) = judge(clip[None], [replace(prompt, things=asked)])
        for flags, name in ((seen.shape_right, "shape"), (seen.colour_right, "color"), (seen.motion_right, "motion")):
            assert flags[0] == (getattr(asked[0], name) == getattr(prompt.things[0], name)), (prompt.text, asked)
        assert not seen.all_right


def test_an_object_too_many_and_an_object_too_few_are_not_right() -> None:
    both = make_prompts(30, seed=3, split="train", two_objects=1)
    videos = draw(both, 4)
    single = [replace(prompt, things=prompt.things[:1]) for prompt in both]
    extra = judge(videos, single)
    assert not any(r.all_right for r in extra)
    assert all(r.extra == 1 for r in extra)
    missing = judge(draw(single, 4), both)
    assert not any(r.all_right for r in missing)
    assert all(r.readings[1] is None for r in missing)


def test_two_blobs_of_one_colour_are_not_one_object() -> None:
    thing = Thing("circle", "red", "still")
    scene = Scene((Body(thing, (0.25, 0.5), (0.15, 0.15)), Body(thing, (0.75, 0.5), (0.15, 0.15))), (0.3, 0.3, 0.3), (0.0, 0.6, 0.0))
    assert not judge(render(scene, DEMO_CLIP)[None], [one()])[0].all_right
    assert judge(render(replace(scene, bodies=scene.bodies[:1]), DEMO_CLIP)[None], [one()])[0].all_right


def test_a_shape_that_turns_into_another_is_not_right() -> None:
    thing = Thing("circle", "red", "still")
    scene = Scene((Body(thing, (0.5, 0.5), (0.2, 0.2)),), (0.3, 0.3, 0.3), (0.0, 0.6, 0.0))
    for shape in ("triangle", "bar", "pillar"):
        other = replace(scene, bodies=(replace(scene.bodies[0], thing=Thing(shape, "red", "still")),))
        morph = torch.cat([render(scene, DEMO_CLIP)[:6], render(other, DEMO_CLIP)[6:]])
        assert not any(judge(morph[None], [one(s)])[0].all_right for s in SHAPES)


@pytest.mark.parametrize("garbage", ["noise", "blank", "one colour", "grey noise", "stripes"])
def test_garbage_is_never_right(garbage: str) -> None:
    generator = torch.Generator().manual_seed(0)
    red = torch.tensor(COLORS["red"])[:, None, None].expand(13, 3, 32, 32)
    video = {
        "noise": torch.rand(13, 3, 32, 32, generator=generator),
        "blank": torch.zeros(13, 3, 32, 32),
        "one colour": red,
        "grey noise": torch.rand(13, 1, 32, 32, generator=generator).expand(13, 3, 32, 32),
        "stripes": torch.where((torch.arange(32) // 4 % 2 == 0), red, torch.full_like(red, 0.3)),
    }[garbage]
    asked = [one(shape, color, motion) for shape in SHAPES for color in ("red", "cyan") for motion in ("still", "left")]
    assert not any(r.all_right for r in judge(video[None].expand(len(asked), -1, -1, -1, -1), asked))


def test_what_the_prompt_leaves_free_is_measured() -> None:
    body = Body(Thing("bar", "green", "right"), (0.25, 0.6), (0.18, 0.18), travel=(0.4, 0.0))
    scene = Scene((body,), (0.4, 0.3, 0.2), (0.0, 0.6, 0.0))
    prompt = one("bar", "green", "right")
    free = judge(render(scene, DEMO_CLIP)[None], [prompt])[0].free
    np.testing.assert_allclose(free[:3], (0.4, 0.3, 0.2), atol=0.03)
    size = 0.18 * np.sqrt(2.2 * 0.9 / np.pi)  # radius of the disc of the same area
    np.testing.assert_allclose(free[3:], (size, 0.25, 0.6, 0.4), atol=0.015)
    nothing = judge(torch.zeros(1, 13, 3, 32, 32), [prompt])[0]
    assert np.isnan(nothing.free[3:]).all()
    assert not any(nothing.shape_right + nothing.colour_right + nothing.motion_right)


def test_reading_needs_no_prompt_and_lists_the_largest_first() -> None:
    bodies = (Body(Thing("pillar", "blue", "still"), (0.2, 0.25), (0.14, 0.14)), Body(Thing("circle", "yellow", "left"), (0.75, 0.7), (0.2, 0.2), (-0.4, 0.0)))
    first, second = read(render(Scene(bodies, (0.2, 0.2, 0.25), (0.0, 0.6, 0.0)), DEMO_CLIP))
    assert (first.shape, first.color, first.motion) == ("circle", "yellow", "left")
    assert (second.shape, second.color, second.motion) == ("pillar", "blue", "still")


def test_a_confusion_table_counts_pairs() -> None:
    assert confusion([("a", "a"), ("a", "b"), ("a", "a"), ("b", "b")]) == {"a": {"a": 2, "b": 1}, "b": {"b": 1}}


def test_clips_and_prompts_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 clips for 1 prompts"):
        judge(torch.zeros(2, 1, 3, 16, 16), [one()])


@pytest.mark.timed
def test_judging_a_clip_takes_a_few_milliseconds(prompts: list[ShapesPrompt], clips: Tensor) -> None:
    def once(i: int) -> float:
        start = time.process_time()
        judge(clips[i : i + 1], prompts[i : i + 1])
        return time.process_time() - start

    assert float(np.quantile([once(i) for i in range(20)], 0.25)) <= 0.03


# --- flashes ---------------------------------------------------------------------------------------------------------


def grey(luminances: list[float], area: float = 1.0, side: int = 20) -> Tensor:
    """A clip whose upper part (`area` of the frame) shows these relative luminances, the rest staying black. [T,3,side,side]"""
    linear = torch.tensor(luminances)
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    video = torch.zeros(len(luminances), 3, side, side)
    video[:, :, : round(area * side)] = srgb[:, None, None, None]
    return video


def square_wave(frames: int, period: int, on: int, low: float = 0.05, high: float = 0.6) -> list[float]:
    return [high if t % period < on else low for t in range(frames)]


def test_three_flashes_a_second_are_allowed_and_four_are_not() -> None:
    three, four = grey(square_wave(36, 4, 2)), grey(square_wave(36, 3, 1))
    assert flashes(three, 12).per_second_max == 3
    assert not is_flashing(three, 12)
    assert flashes(four, 12).per_second_max == 4
    assert is_flashing(four, 12)


def test_a_longer_clip_at_a_higher_rate_is_counted_by_the_second() -> None:
    assert not is_flashing(grey(square_wave(72, 8, 4)), 24)
    assert is_flashing(grey(square_wave(72, 6, 3)), 24)
    assert not is_flashing(grey(square_wave(36, 3, 1)), 9)  # the same frames shown more slowly: three a second


def test_alternating_every_frame_counts_a_flash_for_two_transitions() -> None:
    assert flashes(grey(square_wave(13, 2, 1)), 12) == (6, 0, 6)
    assert flashes(grey(square_wave(2, 2, 1)), 12) == (0, 0, 0)
    assert flashes(grey([0.1]), 12) == (0, 0, 0)


def test_a_fifth_of_the_frame_is_not_enough_and_three_tenths_are() -> None:
    assert flashes(grey(square_wave(13, 2, 1), area=0.2), 12) == (0, 0, 0)
    assert is_flashing(grey(square_wave(13, 2, 1), area=0.3), 12)


def test_the_darker_state_must_be_below_four_fifths() -> None:
    assert flashes(grey(square_wave(13, 2, 1, low=0.82, high=1.0)), 12).general == 0
    assert flashes(grey(square_wave(13, 2, 1, low=0.78, high=1.0)), 12).general == 6


def test_a_change_of_less_than_a_tenth_of_full_luminance_is_no_flash() -> None:
    assert flashes(grey(square_wave(13, 2, 1, low=0.3, high=0.39)), 12).general == 0
    assert flashes(grey(square_wave(13, 2, 1, low=0.3, high=0.41)), 12).general == 6


def test_a_change_spread_over_frames_counts_once_and_a_fade_never() -> None:
    triangle = [0.0, 0.06, 0.12, 0.18, 0.12, 0.06] * 4
    assert flashes(grey(triangle), 12).general == 4
    assert flashes(grey(list(np.linspace(0, 0.75, 24))), 12) == (0, 0, 0)
    assert flashes(grey([0.1] * 6 + [0.6] * 7), 12) == (0, 0, 0)


def test_halves_that_take_turns_flash_once_a_frame_not_twice() -> None:
    a, b = square_wave(13, 2, 1), square_wave(14, 2, 1)[1:]
    video = torch.cat([grey(a)[:, :, :10], grey(b)[:, :, :10]], dim=2)
    assert flashes(video, 12).general == 6


def two_colors(first: tuple[float, float, float], second: tuple[float, float, float]) -> Tensor:
    linear = torch.tensor([first if t % 2 else second for t in range(13)])
    srgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return srgb[:, :, None, None].expand(13, 3, 16, 16)


def test_saturated_red_flashes_even_at_equal_luminance() -> None:
    grey_of_the_same_luminance = (0.2126,) * 3
    assert flashes(two_colors((1.0, 0.0, 0.0), grey_of_the_same_luminance), 12) == (0, 6, 6)
    pale, dull = (0.6, 0.3, 0.3), (0.3629, 0.3629, 0.3629)
    assert flashes(two_colors(pale, dull), 12) == (0, 0, 0)
    assert flashes(two_colors((0.05, 0.0, 0.0), (0.0, 0.0, 0.0)), 12) == (0, 0, 0)  # a change of 16, not more than 20
    assert flashes(two_colors((0.0, 0.0, 1.0), (0.0722,) * 3), 12) == (0, 0, 0)


@pytest.mark.parametrize("change", [lambda v: v, lambda v: torch.stack([blur(c, 0.6) for c in v])], ids=["sharp", "blurred"])
def test_every_strobing_clip_is_found_and_no_calm_one_is_accused(change: Callable[[Tensor], Tensor], prompts: list[ShapesPrompt], clips: Tensor) -> None:
    strobing = change(draw(prompts[:80] + make_prompts(40, seed=1, split="train", two_objects=1), 13, flashing=True))
    assert all(is_flashing(video, FPS) for video in strobing)
    two = make_prompts(60, seed=2, split="train", two_objects=1)
    calm = change(torch.cat([clips[:200], draw(two, 14, pan=0.3)]))
    assert not any(is_flashing(video, FPS) for video in calm)


# In the frame


def red(shape: str, start: tuple[float, float], travel: tuple[float, float] = (0.0, 0.0)) -> Scene:
    return Scene((Body(Thing(shape, "red", "left"), start, (0.2, 0.2), travel=travel),), (0.3, 0.3, 0.32), (0.0, 0.6, 0.1))


@pytest.mark.parametrize(("shape", "half"), [("circle", 6.4), ("triangle", 7.04), ("bar", 7.04), ("pillar", 2.88)])
def test_an_object_is_in_the_frame_until_it_is_shifted_over_the_rim(shape: str, half: float) -> None:
    """half: pixels from its centre to its left end."""
    for beyond, whole in ((-3.0, True), (-0.5, True), (1.5, False), (half, False)):
        clip = render(red(shape, ((half - beyond) / 32, 0.5)), DEMO_CLIP)
        assert in_frame(clip) is whole, beyond
    for edge in (clip.flip(-1), clip.transpose(-1, -2), clip.transpose(-1, -2).flip(-2)):
        assert in_frame(edge) is False, "half of it is out at any of the four sides"


def test_one_frame_in_which_it_leaves_is_enough_and_nothing_on_screen_is_unknown() -> None:
    assert in_frame(render(red("circle", (0.7, 0.5), travel=(-0.4, 0.0)), DEMO_CLIP)) is True
    leaving = render(red("circle", (0.7, 0.5), travel=(-0.6, 0.0)), DEMO_CLIP)
    assert in_frame(leaving) is False and in_frame(leaving[:8]) is True
    assert in_frame(render(replace(red("circle", (0.5, 0.5)), bodies=()), DEMO_CLIP)) is None


def test_what_is_cut_is_called_cut_after_the_autoencoder_too_and_what_is_whole_is_not() -> None:
    codec = load_codec(WEIGHTS / "vae.safetensors")

    def after(videos: Tensor) -> list[bool | None]:
        return [in_frame(clip) for clip in codec.decode(codec.encode(videos))]

    half = {"circle": 0.2, "triangle": 0.22, "bar": 0.22, "pillar": 0.09}
    for out in (0.25, 0.5):  # of its width
        resting = [Body(Thing(shape, color, "still"), (length * (1 - 2 * out), 0.5), (0.2, 0.2)) for shape, length in half.items() for color in COLORS]
        cut = after(torch.stack([render(Scene((body,), (0.3, 0.3, 0.32), (0.0, 0.6, 0.1)), DEMO_CLIP) for body in resting]))
        assert np.mean([each is False for each in cut]) >= 0.95, out
    whole = [each for clip in (DEMO_CLIP, ClipShape(13, 24, 48)) for each in after(draw(make_prompts(60, seed=6, split="eval"), 6, clip))]
    assert np.mean([each is True for each in whole]) >= 0.9


def test_specks_of_noise_have_no_colour_that_is_nothing() -> None:
    noise = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert all(np.isfinite(reading.rgb).all() for frame in noise for reading in read(frame[None])), "a colour of which only specks are there is no object, and no warning"
