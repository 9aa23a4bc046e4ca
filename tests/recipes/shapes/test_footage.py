"""Made-up footage: sizes, range, seeds, and the statistics that filmed pictures have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from base_model.types import ClipShape
from recipes.shapes.footage import sample_footage
from recipes.shapes.render import DEMO_CLIP


@pytest.mark.parametrize("clip", [ClipShape(1, 16, 16), ClipShape(5, 24, 40), ClipShape(13, 40, 24)])
def test_every_size_is_in_range_and_repeats_with_its_seed(clip: ClipShape) -> None:
    a, again, b = (sample_footage(np.random.default_rng(seed), clip) for seed in (1, 1, 2))
    assert a.shape == (clip.frames, 3, clip.height, clip.width)
    assert float(a.min()) >= 0 and float(a.max()) <= 1 and torch.equal(a, again) and not torch.equal(a, b)


def test_most_clips_move_smoothly_and_some_are_black_and_white() -> None:
    videos = [sample_footage(np.random.default_rng(seed), DEMO_CLIP) for seed in range(60)]
    one, two = ([float((v[lag:] - v[:-lag]).abs().mean()) for v in videos] for lag in (1, 2))
    assert np.mean([a > 1e-4 for a in one]) == 1
    assert np.median(np.array(two) / np.array(one)) > 1.3
    grey = [float((v.amax(1) - v.amin(1)).max()) < 1e-5 for v in videos if float(v.std()) > 0.02]
    assert 0.1 < np.mean(grey) < 0.45


def test_the_spectrum_falls_about_as_one_over_f_squared() -> None:
    """Power of a photograph's rows falls as f^-2 (Field 1987); here on average over clips, between a half and twice that slope."""
    videos = torch.stack([sample_footage(np.random.default_rng(seed), DEMO_CLIP)[0].mean(0) for seed in range(80)])  # [N,H,W]
    power = (torch.fft.rfft((videos - videos.mean((1, 2), keepdim=True)) * torch.hann_window(32), dim=-1).abs().square()).mean((0, 1))  # [17]
    f = np.arange(2, 16)
    slope = np.polyfit(np.log(f), np.log(power[2:16].numpy()), 1)[0]
    assert -4 < slope < -1
