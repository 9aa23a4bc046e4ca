"""The judge of quality and the faults it learns from: signals with known answers, changes that do what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.checkpoint import save_weights
from base_model.errors import UserError
from recipes.quality import SHIPPED
from reward.planted import FAULTS, HARMLESS, at_another_rate, blurred, cut_short, frozen, gridded, held, noisy, oversaturated, shuffled
from reward.quality import FAULT_SIGNALS, Quality, fault_signals, load_quality, save_quality


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def disc(frames: int = 13, side: int = 32, step: float = 1.2) -> Tensor:
    """A red disc moves to the right before grey."""
    y, x = torch.meshgrid(torch.arange(side) * 1.0, torch.arange(side) * 1.0, indexing="ij")
    cover = torch.stack([(5.5 - torch.hypot(x - 8 - step * t, y - 16)).clamp(0, 1) for t in range(frames)])[:, None]  # [T,1,H,W]
    return 0.4 + cover * (torch.tensor([0.8, 0.3, 0.2])[:, None, None] - 0.4)


def signal(video: Tensor, name: str) -> float:
    return fault_signals(video[None])[0, list(FAULT_SIGNALS).index(name)].item()


def test_lines_over_the_whole_frame_are_all_of_the_detail_they_make_and_noise_makes_hardly_any() -> None:
    stripes = torch.zeros(5, 3, 32, 32)
    stripes[..., ::8] = 0.5
    assert signal(stripes, "lines") == pytest.approx(1, abs=0.02) and signal(stripes, "standing") == pytest.approx(1, abs=0.02)
    noise = 0.5 + 0.1 * torch.randn(13, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert signal(noise, "lines") < 0.1 and signal(noise, "standing") == pytest.approx(13**-0.5, rel=0.15)


def test_frames_in_order_go_twice_as_far_in_two_steps_and_frames_in_disorder_do_not() -> None:
    """A brightness that grows along x and slides: every lag moves a pixel by lag times as much."""
    ramp = torch.stack([(torch.arange(32) + t).float().expand(3, 32, 32) * torch.linspace(-1, 1, 32)[:, None] / 20 for t in range(13)])
    assert signal(ramp, "lag_two") == pytest.approx(np.log(2), abs=0.05) and signal(ramp, "lag_four") == pytest.approx(np.log(4), abs=0.1)
    assert signal(ramp, "jerk") < -1
    mixed = ramp[torch.from_numpy(rng().permutation(13))]
    assert signal(mixed, "lag_two") < np.log(2) - 0.3 and signal(mixed, "jerk") > 0


def test_signals_are_finite_for_every_size_and_have_gradients() -> None:
    for shape in ((1, 8, 8), (2, 16, 24), (25, 48, 24)):
        video = torch.rand(2, shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1)).requires_grad_()
        fault_signals(video).sum().backward()
        assert video.grad is not None and torch.isfinite(video.grad).all() and float(video.grad.abs().sum()) > 0
        assert torch.isfinite(fault_signals(torch.zeros_like(video))).all()


def test_signals_of_a_mirrored_clip_are_those_of_the_clip() -> None:
    """All but those of the strongest edges, which are looked for between the pixels of one side."""
    clip = disc()[None]
    same = [name not in ("edge_peak", "log_edge_peak", "softness") for name in FAULT_SIGNALS]
    torch.testing.assert_close(fault_signals(clip.flip(-1))[:, same], fault_signals(clip)[:, same], rtol=1e-4, atol=1e-5)


def test_each_fault_keeps_the_shape_stays_in_range_is_drawn_anew_and_repeats_with_its_seed() -> None:
    for name, fault in FAULTS.items():
        clip = disc()
        a, again, b = fault(clip, rng(1)), fault(clip, rng(1)), fault(clip, rng(2))
        assert a.shape == clip.shape and float(a.min()) >= 0 and float(a.max()) <= 1, name
        assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, clip), name
        assert torch.equal(clip, disc()), f"{name} changed the clip it was given"


def test_each_fault_is_what_its_name_says() -> None:
    clip = disc()
    for seed in range(20):
        assert blurred(clip, rng(seed)).diff(dim=-1).abs().amax() < clip.diff(dim=-1).abs().amax()
        assert signal(gridded(torch.full((3, 3, 32, 32), 0.5), rng(seed)), "standing") > 0.7
        assert signal(oversaturated(clip, rng(seed)), "saturation") > 1.5 * signal(clip, "saturation")
        assert 0.02 < float((noisy(clip, rng(seed)) - clip).std()) < 0.16
        assert sorted(shuffled(clip, rng(seed)).sum((1, 2, 3)).tolist()) == sorted(clip.sum((1, 2, 3)).tolist())
        assert float(frozen(clip, rng(seed)).diff(dim=0).abs().max()) == 0


def test_harmless_changes_lose_nothing_but_a_frame_at_an_end() -> None:
    clip = disc()
    for seed in range(10):
        assert len(cut_short(clip, rng(seed))) == 12 and len(held(clip, rng(seed))) == 14
        slower = at_another_rate(clip, rng(seed))
        assert len(slower) > 13 and all(any(torch.equal(frame, other) for other in slower) for frame in clip[:-1])
    assert len(cut_short(clip[:2], rng())) == 2
    for name, change in HARMLESS.items():
        assert change(clip[:, :, :31, :29], rng()).shape[1:] == (3, 31, 29), name


def test_quality_by_hand_and_far_from_what_was_seen() -> None:
    quality = Quality(hidden=4)
    quality.input_mean.fill_(0.5)
    quality.input_std.fill_(2.0)
    signals = torch.randn(3, len(FAULT_SIGNALS), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(quality.of_signals(signals), quality.net(3 * torch.asinh((signals - 0.5) / 6))[:, 0])
    clip = disc()[None]
    torch.testing.assert_close(quality(clip), quality.of_signals(fault_signals(clip)))
    assert torch.isfinite(quality.of_signals(torch.full((1, len(FAULT_SIGNALS)), 1e6))).all()


def test_saved_weights_come_back_and_others_are_refused(tmp_path: Path) -> None:
    quality = Quality(hidden=5)
    save_quality(tmp_path / "q.safetensors", quality)
    again = load_quality(tmp_path / "q.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), quality.state_dict().values(), strict=True))
    save_weights(tmp_path / "other.safetensors", quality.state_dict(), {"hidden": "5", "signals": '["lines"]'})
    with pytest.raises(UserError, match=r"other signals than this version computes.*other\.safetensors.*rushes quality"):
        load_quality(tmp_path / "other.safetensors")
    save_weights(tmp_path / "plain.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="not a judge of quality"):
        load_quality(tmp_path / "plain.safetensors")


@pytest.mark.parametrize("which", sorted(SHIPPED))
def test_the_shipped_judges_tell_planted_faults_from_a_clip_they_never_saw(which: str) -> None:
    quality = load_quality(SHIPPED[which])
    clip = disc()
    with torch.no_grad():
        whole = quality(clip[None])
        for name, fault in FAULTS.items():
            told = [float(quality(fault(clip, rng(seed))[None]) < whole) for seed in range(20)]
            assert np.mean(told) >= 0.9, name
