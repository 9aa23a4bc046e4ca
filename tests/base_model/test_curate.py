"""What is measured of a clip before it becomes training data: each measure is held against rendered clips whose answer is known, at several sizes and rates."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from base_model.errors import UserError
from base_model.video.curate import MEASURES, SENSIBLE, Measured, change, letterbox, measure, scene_cuts
from base_model.video.files import timed_frames, write_mp4
from base_model.video.flashes import FlashCounter, alike
from base_model.video.hashes import near_duplicates
from base_model.video.shots import likeness
from base_model.video.signals import luma_flicker
from tests.base_model.test_signals import gray, texture

Frames = NDArray[np.uint8]
CASES = [(64, 96, 8.0), (120, 90, 24.0), (200, 300, 30.0)]
"""Heights, widths and rates; the last size is shrunk before most is measured."""


def measured(clip: Frames, fps: float) -> Measured:
    return measure((frame, k / fps) for k, frame in enumerate(clip))


def scores(clip: Frames, fps: float) -> dict[str, float]:
    return measured(clip, fps).scores


def panned(height: int, width: int, step: float, frames: int, seed: int = 0) -> Frames:
    """The picture moves `step` pixels a frame to the right."""
    wide = texture(height, 3 * width, seed)
    columns = np.arange(3 * width)
    return gray(np.stack([np.stack([np.interp(np.arange(width) + 2 * width - step * t, columns, line) for line in wide]) for t in range(frames)]))


def still(height: int, width: int, frames: int, seed: int = 0) -> Frames:
    return gray(np.stack([texture(height, width, seed)] * frames))


def test_every_measure_is_there_a_plain_number_and_explained() -> None:
    found = scores(panned(64, 96, 1.0, 16), 8.0)
    assert list(found) == list(MEASURES)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert all(each.unit and each.what for each in MEASURES.values()) and set(SENSIBLE) <= set(MEASURES)
    assert all(least is None or most is None or least < most for least, most in SENSIBLE.values())


# Time


@pytest.mark.parametrize("seconds", [[0, 0.04, 0.14], [0, 0.033, 0.066, 0.166, 0.266], [0, 1 / 30, 0.1]])
def test_uneven_times_have_a_rate_too(seconds: list[float]) -> None:
    found = measure(zip(still(32, 32, len(seconds)), seconds, strict=True)).scores
    assert found["fps"] == pytest.approx(1 / min(b - a for a, b in pairwise(seconds)), rel=1e-6)


@pytest.mark.parametrize("fps", [8.0, 24000 / 1001, 30.0, 60.0])
def test_frames_rate_and_seconds_are_those_of_the_times(fps: float) -> None:
    found = scores(still(32, 32, 40), fps)
    assert found["frames"] == 40
    assert found["fps"] == pytest.approx(fps, rel=1e-9) and found["seconds"] == pytest.approx(40 / fps, rel=1e-9)
    assert found["fps_irregularity"] == pytest.approx(0, abs=1e-9)


def test_irregular_steps_are_told_by_how_far_they_are_from_the_usual_one() -> None:
    steps = np.array([0.1] * 6 + [0.2, 0.05] + [0.1] * 2)
    times = np.concatenate([[0.0], steps.cumsum()])
    found = measure(zip(still(32, 32, 11), times.tolist(), strict=True)).scores
    assert found["fps_irregularity"] == pytest.approx((1.0 + 0.5) / 10) and found["fps"] == pytest.approx(10)


@pytest.mark.parametrize("fps", [24.0, 30.0, 60.0])
def test_a_pause_does_not_change_the_rate_nor_do_times_in_whole_milliseconds(fps: float) -> None:
    times = [round(k / fps, 3) + (1.3 if k >= 7 else 0) for k in range(120)]
    found = measure(zip(still(32, 32, 120), times, strict=True)).scores
    assert found["fps"] == pytest.approx(fps, rel=1e-3) and found["seconds"] == pytest.approx(120 / fps + 1.3, abs=2e-3)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -5.0, 1e9])
def test_a_clock_that_is_wrong_is_irregular_and_breaks_nothing(wrong: float) -> None:
    clip = panned(48, 64, 1.0, 24)
    times = [k / 12 for k in range(24)]
    times[10] = wrong
    found = measure(zip(clip, times, strict=True))
    assert all(math.isfinite(value) for value in found.scores.values())
    assert found.scores["fps_irregularity"] == pytest.approx(1 / 23) and found.scores["seconds"] == pytest.approx(2) and len(found.hashes) == 24


def test_a_clip_that_begins_late_is_the_same_clip() -> None:
    clip = panned(48, 64, 1.0, 20)
    late = measure((frame, 100 + k / 8) for k, frame in enumerate(clip))
    for name, value in measured(clip, 8.0).scores.items():
        assert late.scores[name] == pytest.approx(value, abs=1e-6), name


# Shots


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
def test_cuts_are_counted_and_the_longest_shot_is_known(height: int, width: int, fps: float) -> None:
    lengths = (12, 25, 9)
    clip = np.concatenate([panned(height, width, 1.0, length, seed) for seed, length in enumerate(lengths)])
    assert scene_cuts(iter(clip)) == [12, 37]
    found = scores(clip, fps)
    assert found["cuts"] == 2 and found["dissolves"] == 0
    assert found["longest_shot"] == pytest.approx(25 / fps)
    assert scores(clip[:12], fps)["cuts"] == 0 and scores(clip[:12], fps)["longest_shot"] == pytest.approx(12 / fps)


@pytest.mark.parametrize("fps", [8.0, 24.0])
@pytest.mark.parametrize("step", [4.0, 12.0])
def test_a_fast_pan_has_no_cut(step: float, fps: float) -> None:
    found = scores(panned(64, 96, step, 16), fps)
    assert found["cuts"] == 0 and found["dissolves"] == 0


def test_light_that_flashes_or_is_switched_on_is_no_cut() -> None:
    clip = panned(64, 96, 1.0, 24).astype(np.float64)
    switched, flashed = clip.copy(), clip.copy()
    switched[12:] *= 0.4
    flashed[8:10] = 250
    assert scene_cuts(iter(switched.astype(np.uint8))) == [] == scene_cuts(iter(flashed.astype(np.uint8)))
    other = panned(64, 96, 1.0, 24, seed=5)
    inserted = clip.astype(np.uint8).copy()
    inserted[8:10] = other[8:10]
    assert scene_cuts(iter(inserted)) == [], "two frames of something else are a glitch: the scene goes on"


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.0])
def test_a_dissolve_and_a_fade_to_black_are_gradual_transitions(height: int, width: int, fps: float, seconds: float) -> None:
    length, around = round(seconds * fps), round(1.5 * fps)
    share = np.concatenate([np.zeros(around), np.linspace(0, 1, length + 1), np.ones(around)])[:, None, None, None]
    one, other = still(height, width, len(share)), still(height, width, len(share), seed=3)
    dissolved = scores(np.rint(one * (1 - share) + other * share).astype(np.uint8), fps)
    assert dissolved["dissolves"] == 1 and dissolved["cuts"] == 0
    assert dissolved["longest_shot"] == pytest.approx(len(share) / fps / 2, abs=max(0.35, seconds / 3))
    assert scores(np.rint(one * (1 - share)).astype(np.uint8), fps)["dissolves"] == 1


def test_light_that_falls_and_things_that_move_are_no_transitions() -> None:
    dimmed = panned(64, 96, 0.5, 36) * np.linspace(1, 0.3, 36)[:, None, None, None]
    assert scores(dimmed.astype(np.uint8), 12.0)["dissolves"] == 0
    for step in (0.5, 2.0, 6.0):
        assert scores(panned(64, 96, step, 24), 12.0)["dissolves"] == 0, step


# Motion


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_a_pan_is_the_cameras_in_diagonals_a_second(height: int, width: int, fps: float, share: float) -> None:
    step = share * math.hypot(height, width) / fps
    found = scores(panned(height, width, step, round(1.5 * fps)), fps)
    print(found["motion"], found["camera_motion"], found["object_motion"])
    assert found["motion"] == pytest.approx(share, rel=0.12) and found["camera_motion"] == pytest.approx(share, rel=0.12)
    assert found["object_motion"] < 0.25 * share


@pytest.mark.parametrize("fps", [8.0, 30.0])
def test_an_object_before_a_still_background_moves_without_the_camera(fps: float) -> None:
    clip, patch = still(96, 128, round(1.2 * fps)), gray(texture(24, 24, seed=1)[None])[0]
    speed = 0.3  # widths a second
    for t in range(len(clip)):
        x = 10 + round(speed * 128 * t / fps)
        clip[t, 36:60, x : x + 24] = patch
    found = scores(clip, fps)
    expected = speed * 128 / math.hypot(96, 128) * 24 * 24 / (96 * 128)
    print(found["object_motion"], expected)
    assert found["camera_motion"] < 0.2 * found["object_motion"]
    assert found["object_motion"] == pytest.approx(expected, rel=0.5)  # flow blurs its rim


def test_a_cut_is_no_motion() -> None:
    clip = np.concatenate([still(64, 96, 12), still(64, 96, 12, seed=2)])
    found = scores(clip, 12.0)
    assert found["cuts"] == 1 and found["motion"] == 0 and found["camera_motion"] == 0


# Stills


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
def test_what_stands_still_is_told_in_shares_and_seconds(height: int, width: int, fps: float) -> None:
    moving, standing = round(1.0 * fps), round(2.0 * fps)
    clip = panned(height, width, 0.3 * width / fps, moving + 1)
    clip = np.concatenate([clip, np.repeat(clip[-1:], standing, axis=0)])
    found = scores(clip, fps)
    assert found["static_share"] == pytest.approx(standing / (moving + standing), abs=0.04)
    assert found["longest_still"] == pytest.approx(standing / fps, abs=1.1 / 12)
    assert scores(np.repeat(clip[:1], 24, axis=0), fps)["static_share"] == 1 and scores(clip[:moving], fps)["static_share"] == 0


def test_a_slow_pan_at_a_high_rate_does_not_stand_still() -> None:
    found = scores(panned(96, 128, 0.06 * 128 / 60, 90), 60.0)  # 6 % of the width a second, an eighth of a pixel a frame
    assert found["static_share"] < 0.05 and found["repeated_share"] == 0


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("fps", [12.0, 30.0])
def test_a_clip_slowed_by_repeating_frames_is_known(times: int, fps: float) -> None:
    clip = panned(64, 96, 2.0, 18)
    assert scores(clip, fps)["repeated_share"] == 0
    found = scores(clip.repeat(times, axis=0), fps)["repeated_share"]
    print(found)
    assert found == pytest.approx((times - 1) / times, abs=0.08)


def test_a_clip_that_freezes_is_not_one_of_repeated_frames() -> None:
    clip = panned(64, 96, 2.0, 12)
    assert scores(np.concatenate([clip, np.repeat(clip[-1:], 24, axis=0)]), 12.0)["repeated_share"] < 0.1


def test_what_changes_is_the_cell_that_changes_most() -> None:
    one = np.zeros((64, 64), np.uint8)
    other = one.copy()
    other[8:12, 8:12] = 80  # a whole cell of sixteen a side
    assert change(one, other) == 80 and change(one, one) == 0
    other[8:12, 10:12] = 0
    assert change(one, other) == 40


# Light


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_flashes_are_counted_by_the_second(height: int, width: int, fps: float, rate: int) -> None:
    frames = round(2.5 * fps)
    lit = np.floor(np.arange(frames) / fps * 2 * rate + 1e-9) % 2 == 0
    clip = np.repeat(np.where(lit, 200, 40).astype(np.uint8)[:, None, None, None], 3, axis=3) * np.ones((1, height, width, 1), np.uint8)
    assert scores(clip, fps)["flashes"] == rate
    part = np.full_like(clip, 40)
    part[:, : height // 20] = clip[:, : height // 20]
    assert scores(part, fps)["flashes"] == 0, "that hardly changes the light of a quarter of the frame"


def test_red_flashes_count_where_luminance_hardly_changes() -> None:
    clip = np.full((36, 48, 64, 3), (0, 60, 60), np.uint8)
    clip[::3] = (140, 0, 0)
    grey = np.repeat(clip.mean(-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    assert scores(clip, 12.0)["flashes"] == 4 and scores(grey, 12.0)["flashes"] == 0


def test_bright_windows_that_pass_by_are_no_flashes_however_the_light_of_a_quarter_swings() -> None:
    """A dark train with windows, five a second, before the same light switched on and off over as much of the frame."""
    frames, fps = 36, 24.0
    passing = np.full((frames, 48, 64, 3), 25, np.uint8)
    switched = passing.copy()
    for t in range(frames):
        for window in range(-20, 5):
            left = 60 * window + 12 * t  # one every five frames
            passing[t, 12:36, max(0, left) : max(0, left + 24)] = 240
        switched[t, 12:36, 16:48] = 240 if t % 5 < 2 else 25
    means = passing[:, 12:36, 16:48].mean((1, 2, 3))
    assert np.ptp(means) > 80, "the light of a quarter of the frame does swing"
    assert scores(passing, fps)["flashes"] <= 1 and scores(switched, fps)["flashes"] == 5


def test_a_flash_over_half_of_a_quarter_counts_and_what_goes_up_beside_what_goes_down_does_not() -> None:
    change = np.array([[0.8, 0.8, 0.0, 0.0], [-0.6, -0.6, -0.7, 0.1], [0.9, 0.0, 0.0, 0.0], [0.4, 0.5, -0.4, -0.5], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(alike(change), [0.4, -0.45, 0, 0, 0], atol=1e-6)


def test_counting_keeps_two_seconds_and_forgets_no_flash_between_them() -> None:
    counter = FlashCounter()
    for t in range(600):
        lit = 300 <= t < 360 and t // 5 % 2
        counter.add(np.full((8, 8, 3), 220 if lit else 30, np.uint8), t / 60)
        assert len(counter._times) <= 122
    assert counter.flashes() == 6


@pytest.mark.parametrize("level", [(255, 255, 255), (255, 0, 0)])
def test_a_strobe_counts_after_light_that_was_taken_away_part_by_part(level: tuple[int, int, int]) -> None:
    """Full light goes on at once, which is alike, and off a third of the cells at a time, which is not: again and again in the same direction."""
    full, parts = np.full((96, 96, 3), level, np.uint8), np.arange(96) // 2 % 3
    going = [full, full * (parts >= 1)[:, None].astype(np.uint8), full * (parts >= 2)[:, None].astype(np.uint8)]
    black = np.zeros_like(full)
    strobe = [full, full, black, black] * 8  # 6 a second
    assert scores(np.stack([black, *strobe]), 24.0)["flashes"] == 6
    for times in (1, 2, 5):
        assert scores(np.stack([black, *[*going, black] * times, *strobe]), 24.0)["flashes"] == 6, times


def test_flicker_is_that_of_the_frames_within_shots() -> None:
    rng = np.random.default_rng(0)
    clip = panned(64, 96, 1.0, 20).astype(np.float64) + rng.normal(0, 6, (20, 1, 1, 1))
    clip = clip.clip(0, 255).astype(np.uint8)
    mean = clip[..., 0].mean((1, 2)).tolist()  # R = G = B is luma
    padded = [2 * mean[0] - mean[2], 2 * mean[0] - mean[1], *mean, 2 * mean[-1] - mean[-2], 2 * mean[-1] - mean[-3]]  # turned about its ends
    assert scores(clip, 12.0)["flicker"] == pytest.approx(np.std([mean[t] - sum(padded[t : t + 5]) / 5 for t in range(20)]), rel=1e-9)
    darker = (panned(64, 96, 1.0, 20, seed=7) * 0.3).astype(np.uint8)
    both = scores(np.concatenate([clip, darker]), 12.0)
    levels = [luma_flicker(part.mean((1, 2, 3))) for part in (clip, darker)]
    assert both["cuts"] == 1 and both["flicker"] == pytest.approx(math.sqrt((levels[0] ** 2 + levels[1] ** 2) / 2), rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (200, 300)])
def test_exposure_and_contrast_by_hand(height: int, width: int) -> None:
    clip = np.full((9, height, width, 3), 100, np.uint8)
    clip[:, : height // 4] = 0
    clip[:, : height // 8, : width // 2] = 255
    found = scores(clip, 8.0)
    assert found["crushed_share"] == pytest.approx(3 / 16, abs=0.01) and found["blown_share"] == pytest.approx(1 / 16, abs=0.01)
    assert found["brightness"] == pytest.approx((0.75 * 100 + 255 / 16) / 255, rel=0.02)
    assert found["contrast"] == pytest.approx(clip[0, ..., 0].std() / 255, rel=1e-6)


def test_black_frames_are_counted_and_a_dark_scene_with_lights_is_not_black() -> None:
    clip = panned(64, 96, 1.0, 20)
    clip[5:10] = 7
    assert scores(clip, 12.0)["black_share"] == 0.25
    assert scores((clip[:5] * 0.25).astype(np.uint8), 12.0)["black_share"] == 0


# Detail


@pytest.mark.parametrize(("height", "width"), [(64, 96), (300, 400)])
def test_sharpness_noise_and_blocks_are_measured_at_full_size(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    clip = panned(height, width, 0.0, 3)
    grain = (clip + rng.normal(0, 12, clip.shape[:3])[..., None]).clip(0, 255).astype(np.uint8)
    plain, grainy = scores(clip, 8.0), scores(grain, 8.0)
    assert grainy["noise"] == pytest.approx(12, rel=0.1) and plain["noise"] < 2
    assert grainy["sharpness"] == pytest.approx(20 * 12**2, rel=0.15)  # white noise through the Laplacian: 4^2 + 4
    dotted = clip.copy()
    dotted[:, ::8] += 20
    dotted[:, :, ::8] += 20
    assert scores(dotted, 8.0)["blockiness"] > 3 * plain["blockiness"]
    first = grain[0, ..., 0].astype(np.float64)  # the only one that is looked at
    around = np.pad(first, 1, mode="reflect")
    assert grainy["sharpness"] == pytest.approx((around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:] - 4 * first).var(), rel=1e-6)
    diagonal = (first[::2, ::2] - first[1::2, ::2] - first[::2, 1::2] + first[1::2, 1::2]) / 2
    assert grainy["noise"] == pytest.approx(np.median(np.abs(diagonal)) / 0.6745, rel=1e-6)


# Borders


@pytest.mark.parametrize(("height", "width", "fps"), CASES)
@pytest.mark.parametrize("level", [0, 16, 235])
@pytest.mark.parametrize("sides", [(0.125, 0.125, 0, 0), (0, 0, 0.2, 0.2), (0.25, 0, 0, 0), (0.1, 0.1, 0.1, 0.1)])
def test_borders_are_told_as_a_share_of_the_frame(height: int, width: int, fps: float, level: int, sides: tuple[float, float, float, float]) -> None:
    clip = panned(height, width, 1.0, 12)
    top, bottom, left, right = round(sides[0] * height), round(sides[1] * height), round(sides[2] * width), round(sides[3] * width)
    clip[:, :top], clip[:, height - bottom :], clip[:, :, :left], clip[:, :, width - right :] = level, level, level, level
    inside = (height - top - bottom) * (width - left - right) / (height * width)
    assert scores(clip, fps)["letterbox"] == pytest.approx(1 - inside, abs=0.01)


def test_even_skies_words_on_a_card_and_one_level_are_no_borders() -> None:
    plain = panned(96, 128, 1.0, 9)[..., 0]
    assert letterbox(plain) == 0
    assert letterbox(np.full_like(plain, 3)) == 0, "black_share says it"
    words = np.full_like(plain, 10)
    for k in range(9):
        words[:, 30:60, 20 + 10 * k : 26 + 10 * k] = 240
    assert letterbox(words) == 0
    hill = np.full_like(plain, 180)
    for x in range(128):
        hill[:, 40 + round(12 * math.sin(x / 15)) :, x] = plain[:, 40 + round(12 * math.sin(x / 15)) :, x] // 2
    assert letterbox(hill) == 0
    passing = np.full_like(plain, 20)
    for k in range(9):
        passing[k, 30:50, 12 * k : 12 * k + 30] = 200
    assert letterbox(passing) == 0, "something that passes by leaves no edge behind"


def test_a_border_is_one_only_if_it_stays() -> None:
    clip = panned(96, 128, 1.0, 24)
    clip[:12, :12] = 0
    assert scores(clip, 12.0)["letterbox"] == 0


# What else is kept


@pytest.mark.parametrize("count", [1, 2, 3, 50, 700])
def test_thumbnails_are_three_small_frames_from_all_over_the_clip(count: int) -> None:
    clip = (np.full((24, 320, 3), min(255, k * 255 // count), np.uint8) for k in range(count))
    thumbnails = measure((frame, k / 24) for k, frame in enumerate(clip)).thumbnails
    assert len(thumbnails) == min(3, count) and all(each.shape == (12, 160, 3) and each.dtype == np.uint8 for each in thumbnails)
    if count >= 50:
        at = [int(each[0, 0, 0]) / 255 for each in thumbnails]
        assert at == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.13)


def test_a_single_frame_has_no_motion_rather_than_none() -> None:
    found = measured(panned(64, 96, 1.0, 1), 8.0)
    unknown = {name for name, value in found.scores.items() if math.isnan(value)}
    expected = {"seconds", "fps", "fps_irregularity", "motion", "camera_motion", "object_motion", "flicker", "flashes", "static_share", "longest_still", "repeated_share"}
    assert unknown == {*expected, "longest_shot"} and len(found.hashes) == 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (8, 8), (15, 40), (5, 900)])
def test_the_smallest_and_the_longest_pictures_are_measured(height: int, width: int) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (7, height, width, 3), dtype=np.uint8)
    assert list(scores(clip, 8.0)) == list(MEASURES)


def test_measuring_twice_gives_the_same() -> None:
    clip = panned(64, 96, 1.0, 12)
    one, other = measured(clip, 12.0), measured(clip, 12.0)
    assert one.scores == other.scores and one.hashes == other.hashes


@pytest.mark.parametrize("bad", ["dtype", "channels", "empty", "another size", "none"])
def test_anything_but_frames_of_one_size_is_refused_in_one_line(bad: str) -> None:
    good = np.zeros((8, 8, 3), np.uint8)
    frames = {
        "dtype": [good.astype(np.float32)], "channels": [good[..., :1]], "empty": [good[:0]], "another size": [good, good[:4]], "none": [],
    }[bad]  # fmt: skip
    with pytest.raises(UserError) as refused:
        measure((frame, 0.1 * k) for k, frame in enumerate(frames))
    assert "\n" not in str(refused.value)


def test_memory_does_not_grow_with_the_clip() -> None:
    def endless(count: int) -> Iterator[tuple[Frames, float]]:
        rng = np.random.default_rng(0)
        for k in range(count):
            yield rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), k / 6

    measure(endless(20))  # what is kept for good
    peaks = []
    for count in (50, 200):  # both keep 17 looks at borders
        tracemalloc.start()
        measure(endless(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(peaks)
    assert peaks[1] - peaks[0] < 150 * 600  # a frame of these is 12 kB


def test_likeness_is_correlation_and_knows_even_pictures() -> None:
    one = texture(40, 40) / 255
    assert likeness(one, one) == pytest.approx(1) and likeness(one, 1 - one) == pytest.approx(-1) and likeness(one, 0.5 * one + 0.1) == pytest.approx(1)
    even = np.full_like(one, 0.3)
    assert likeness(even, even + 0.2) == 1 and likeness(one, even) == 0


# Files and documents


def test_the_readme_tells_every_measure() -> None:
    text = (Path(__file__).parents[2] / "base_model" / "README.md").read_text(encoding="utf-8")
    for name, each in MEASURES.items():
        least, most = SENSIBLE.get(name, (None, None))
        said = f"at most {most:g}" if most is not None else f"at least {least:g}" if least is not None else ""
        assert f"| `{name}` | {each.unit} | {each.what} | {said} |" in text, name


def test_measures_of_a_file_are_nearly_those_of_its_frames(tmp_path: Path) -> None:
    clip = panned(96, 128, 2.0, 24)
    write_mp4(tmp_path / "clip.mp4", clip, 12.0, upscale=False)
    file, frames = measure(timed_frames(tmp_path / "clip.mp4")), measured(clip, 12.0)
    for name in ("frames", "seconds", "fps", "cuts", "static_share", "letterbox", "flashes", "black_share"):
        assert file.scores[name] == pytest.approx(frames.scores[name]), name
    assert file.scores["motion"] == pytest.approx(frames.scores["motion"], rel=0.05)
    assert near_duplicates([frames.hashes, file.hashes])[0][:2] == (1, 0)


def test_real_clips_raise_no_alarm(real_data: Path) -> None:
    files = sorted((real_data / "clips").glob("*.mp4"))
    assert len(files) >= 5
    found = [measure(timed_frames(file)) for file in files]
    for file, each in zip(files, found, strict=True):
        print(file.stem, {name: round(value, 3) for name, value in each.scores.items()})
        wrong = [name for name, (least, most) in SENSIBLE.items() if (least is not None and each.scores[name] < least) or (most is not None and each.scores[name] > most)]
        assert not wrong, (file.name, wrong)
        assert each.scores["frames"] == 49 and each.scores["fps"] == pytest.approx(8, rel=0.01)
    assert near_duplicates([each.hashes for each in found]) == []
