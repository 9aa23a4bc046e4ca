"""What measures of clips share: each is held against a picture whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from base_model.video.signals import camera_flow, grid, luma_flicker

Frames = NDArray[np.uint8]


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


def test_a_camera_that_zooms_and_turns_is_one_similarity() -> None:
    y, x = np.mgrid[0:48, 0:64].astype(np.float32)
    angle, zoom = 0.03, 1.02
    dx, dy = x - 32, y - 24
    flow = np.stack([zoom * (np.cos(angle) * dx - np.sin(angle) * dy) - dx, zoom * (np.sin(angle) * dx + np.cos(angle) * dy) - dy], axis=-1).astype(np.float32)
    with_object = flow.copy()
    with_object[10:20, 10:25] += 6.0
    np.testing.assert_allclose(camera_flow(with_object), flow, atol=0.02)


def test_a_steady_fade_does_not_flicker() -> None:
    assert luma_flicker(np.linspace(20, 200, 13)) == pytest.approx(0, abs=1e-9)
    assert luma_flicker(np.array([10.0, 12.0, 10.0])) > 0
    assert math.isnan(luma_flicker(np.array([10.0, 12.0])))


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
