"""Weight-free measures: each is held against a clip whose answer is known."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from base_model.errors import UserError
from base_model.video.files import read_video
from base_model.video.signals import SIGNALS, camera_flow, cuts, grid, luma_flicker, motions, signals

Frames = NDArray[np.uint8]
FPS = 8.0


def texture(height: int, width: int, seed: int = 0) -> NDArray[np.float64]:
    """A smooth random picture in [40,215], [H,W]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    turns, rise, offset = rng.uniform(-4, 4, (24, 1, 1)), rng.uniform(-4, 4, (24, 1, 1)), rng.random((24, 1, 1))
    waves = np.sin(2 * np.pi * (turns * x / width + rise * y / height + offset)).sum(0)
    waves = (waves - waves.min()) / (waves.max() - waves.min())
    picture: NDArray[np.float64] = 40 + 175 * waves
    return picture


def gray(clip: NDArray[np.float64]) -> Frames:
    return np.repeat(np.rint(clip).astype(np.uint8)[..., None], 3, axis=-1)


def panned(step: float, frames: int = 9, side: int = 64) -> Frames:
    """A camera that moves `step` pixels a frame to the left: the picture moves to the right."""
    wide = texture(side, 4 * side)
    columns = np.arange(4 * side)
    rows = [np.stack([np.interp(np.arange(side) + 2 * side - step * t, columns, line) for line in wide]) for t in range(frames)]
    return gray(np.stack(rows))


def with_square(step: int, frames: int = 9, side: int = 64) -> Frames:
    """A textured square of 16 pixels that moves `step` pixels a frame before a still background."""
    clip, patch = np.stack([texture(side, side)] * frames), texture(16, 16, seed=1)
    for t in range(frames):
        clip[t, 24:40, 4 + step * t : 20 + step * t] = patch
    return gray(clip)


def test_every_measure_is_there_and_a_plain_number() -> None:
    found = signals(panned(1.0), FPS)
    assert list(found) == list(SIGNALS)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_temporal_flickering_is_what_vbench_computes() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (7, 24, 40, 3), dtype=np.uint8)
    maes = [np.mean(np.abs(clip[t].astype(np.float64) - clip[t + 1])) for t in range(6)]
    assert signals(clip, FPS)["temporal_flickering"] == pytest.approx((255.0 - np.mean(maes)) / 255.0, abs=1e-12)


@pytest.mark.parametrize("step", [0.5, 1.0, 2.0])
def test_a_pan_is_the_cameras_and_nothing_is_left_for_objects(step: float) -> None:
    found = signals(panned(step), FPS)
    assert found["camera_motion"] == pytest.approx(step * FPS / 64, rel=0.1)
    assert found["object_motion"] < 0.15 * found["camera_motion"]
    assert found["warp_residual"] < 1.0 < signals(panned(step), FPS)["dynamic_degree"] * 255


def test_an_object_before_a_still_background_moves_without_the_camera() -> None:
    found = signals(with_square(3), FPS)
    assert found["camera_motion"] < 0.1 * FPS / 64
    assert found["object_motion"] == pytest.approx(3 * FPS / 64 / 16, rel=0.5)  # the square covers a sixteenth; flow blurs its rim


def test_the_speed_of_the_fastest_twentieth_is_in_thresholds_of_vbench() -> None:
    found = signals(with_square(3), FPS)
    assert found["dynamic_degree"] == pytest.approx(3 / (6 * 64 / 256), rel=0.15)
    assert found["dynamic"] == 1
    assert signals(panned(0.5), FPS)["dynamic"] == 0  # a third of the threshold


def test_the_rate_scales_speeds_and_nothing_else() -> None:
    slow, fast = signals(panned(1.0), FPS), signals(panned(1.0), 2 * FPS)
    per_second = {"dynamic_degree", "camera_motion", "object_motion"}
    for name in set(SIGNALS) - {"dynamic"}:
        assert fast[name] == pytest.approx((2 if name in per_second else 1) * slow[name], rel=1e-9), name


def test_a_camera_that_zooms_and_turns_is_one_similarity() -> None:
    y, x = np.mgrid[0:48, 0:64].astype(np.float32)
    angle, zoom = 0.03, 1.02
    dx, dy = x - 32, y - 24
    flow = np.stack([zoom * (np.cos(angle) * dx - np.sin(angle) * dy) - dx, zoom * (np.sin(angle) * dx + np.cos(angle) * dy) - dy], axis=-1).astype(np.float32)
    with_object = flow.copy()
    with_object[10:20, 10:25] += 6.0
    np.testing.assert_allclose(camera_flow(with_object), flow, atol=0.02)


def test_melting_leaves_a_residual_that_motion_does_not_explain() -> None:
    rng = np.random.default_rng(0)
    still = gray(np.stack([texture(64, 64)] * 9))
    popping = still.copy()
    for t in range(1, 9, 2):
        popping[t, 20:36, 20:36] = rng.integers(0, 256, (16, 16, 1))
    assert signals(still, FPS)["warp_residual"] == 0
    assert signals(popping, FPS)["warp_residual_peak"] > 10 > 2 > signals(panned(2.0), FPS)["warp_residual"]


def test_warping_back_along_a_pan_restores_the_frame_where_it_can() -> None:
    luma = panned(2.0)[..., 0]
    for motion in motions(luma):
        assert np.isnan(motion.residual).any(), "part of the picture has left"
        assert np.nanmean(motion.residual) < 1.0


def test_a_scene_cut_is_found_and_named_by_its_first_frame() -> None:
    rng = np.random.default_rng(1)
    first, second = (np.broadcast_to(rng.integers(0, 256, (1, 1, 3)), (5, 32, 32, 3)) for _ in range(2))
    clip = np.concatenate([first, second]).astype(np.uint8)
    assert cuts(clip) == [5]
    assert cuts(clip[:5]) == []
    assert cuts(clip[:1]) == []


def test_strobing_light_is_flicker_and_no_scene_cut() -> None:
    clip = gray(np.stack([np.full((32, 32), 40.0 + 160 * (t % 2)) for t in range(10)]))
    found = signals(clip, FPS)
    assert found["cuts"] == 0
    assert found["luma_flicker"] > 60
    assert found["temporal_flickering"] == pytest.approx((255 - 160) / 255)


def test_a_steady_fade_does_not_flicker() -> None:
    assert luma_flicker(np.linspace(20, 200, 13)) == pytest.approx(0, abs=1e-9)
    assert luma_flicker(np.array([10.0, 12.0, 10.0])) > 0
    assert math.isnan(luma_flicker(np.array([10.0, 12.0])))


def test_frozen_and_black_frames_are_counted() -> None:
    clip = panned(1.0)
    clip[4] = clip[3]
    clip[5] = clip[3]
    clip[7:] = 3
    found = signals(clip, FPS)
    assert found["frozen_share"] == pytest.approx(3 / 8)  # 3-4, 4-5, 7-8
    assert found["black_share"] == pytest.approx(2 / 9)


def test_one_pixel_that_blinks_does_not_make_a_frozen_clip_move() -> None:
    clip = gray(np.stack([texture(64, 64)] * 4))
    clip[1, 5, 5] = 255
    assert signals(clip, FPS)["frozen_share"] == 1


@pytest.mark.parametrize("period", [4, 8, 16])
def test_a_grid_of_any_usual_period_stands_out(period: int) -> None:
    picture = texture(128, 128)
    dotted = picture.copy()
    dotted[::period] += 30
    dotted[:, ::period] += 30
    plain, with_grid = grid(picture.astype(np.uint8)), grid(dotted.clip(0, 255).astype(np.uint8))
    assert with_grid > 5 * plain
    assert with_grid > 8


def test_a_grid_is_unknown_where_the_picture_is_too_small() -> None:
    assert math.isnan(grid(np.zeros((8, 8), np.uint8)))


def test_blur_lowers_sharpness_and_grain_raises_noise() -> None:
    rng = np.random.default_rng(0)
    clip = panned(0.0)
    grain = (clip + rng.normal(0, 12, clip.shape[:3])[..., None]).clip(0, 255).astype(np.uint8)
    assert signals(grain, FPS)["noise"] == pytest.approx(12, rel=0.1)
    assert signals(clip, FPS)["noise"] < 2
    boxed = np.stack([np.roll(grain, k, axis=2) for k in range(-1, 2)]).mean(0).astype(np.uint8)
    assert signals(boxed, FPS)["sharpness"] < 0.5 * signals(grain, FPS)["sharpness"]


def test_saturation_and_clipping_by_hand() -> None:
    clip = np.zeros((2, 16, 16, 3), np.uint8)
    clip[..., 0], clip[..., 1], clip[..., 2] = 255, 100, 51
    found = signals(clip, FPS)
    assert found["saturation"] == pytest.approx((255 - 51) / 255)
    assert found["clipped_share"] == pytest.approx(1 / 3)


def test_a_single_frame_has_no_motion_rather_than_none() -> None:
    found = signals(panned(1.0)[:1], FPS)
    unknown = {name for name, value in found.items() if math.isnan(value)}
    assert unknown == {
        "temporal_flickering", "luma_flicker", "warp_residual", "warp_residual_peak", "dynamic_degree", "dynamic", "camera_motion", "object_motion", "frozen_share",
    }  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (8, 8), (15, 40), (17, 9)])
def test_the_smallest_pictures_are_measured(height: int, width: int) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    assert list(signals(clip, FPS)) == list(SIGNALS)


@pytest.mark.parametrize(("shape", "dtype"), [((0, 8, 8, 3), "uint8"), ((3, 0, 8, 3), "uint8"), ((3, 8, 8), "uint8"), ((3, 8, 8, 3), "float32"), ((3, 8, 8, 4), "uint8")])
def test_anything_but_a_decoded_clip_is_refused_in_one_line(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(UserError) as refused:
        signals(np.zeros(shape, dtype), FPS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_cannot_be_is_refused(fps: float) -> None:
    with pytest.raises(UserError, match="frames a second"):
        signals(panned(1.0), fps)


def test_measuring_twice_gives_the_same_numbers() -> None:
    clip = with_square(2)
    assert signals(clip, FPS) == signals(clip, FPS)


@pytest.mark.skipif("RUSHES_REAL_DATA" not in os.environ, reason="RUSHES_REAL_DATA is unset: no real clips")
def test_real_clips_are_dynamic_uncut_and_not_frozen() -> None:
    files = sorted((Path(os.environ["RUSHES_REAL_DATA"]) / "clips").glob("*.mp4"))
    assert files
    for file in files:
        video = read_video(file)
        found = signals(video.frames[:24], video.fps)
        assert found["cuts"] == 0 and found["black_share"] == 0 and found["frozen_share"] < 1, (file.name, found)
        assert 0 < found["warp_residual"] < 20 and 0.5 < found["temporal_flickering"] < 1, (file.name, found)
