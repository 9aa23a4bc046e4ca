"""Our patches against transformers' own image processor, against a loop over patches, and the frames that are looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.prompts.vision import CLIP_MEAN, CLIP_STD, HALF, PatchFormat, fitted_size, patchify
from reward.vlm.frames import FrameSampler, frame_indices, read_clip

FORMS = {"qwen2": PatchFormat(14, 2, 2, CLIP_MEAN, CLIP_STD), "qwen3": PatchFormat(16, 2, 2, HALF, HALF)}
UNSCALED = FrameSampler(fps=2.0, min_frames=2, min_pixels=1, max_pixels=10**7)


def by_transformers(image: np.ndarray, form: PatchFormat, min_pixels: int, max_pixels: int) -> tuple[Tensor, list[int]]:
    """uint8 [H,W,3] through the processor without torchvision: an image is a video of two equal frames to it."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=form.patch,
        temporal_patch_size=form.frames,
        merge_size=form.merge,
        image_mean=list(form.mean),
        image_std=list(form.std),
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
    )
    out = processor([image], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"][0].tolist()


def clip_of(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255).repeat(2, 1, 1, 1)  # [2,3,H,W]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [(1, 1), (2, 5), (4, 3)])
def test_two_equal_frames_give_the_patches_of_transformers_image_processor(name: str, tokens: tuple[int, int]) -> None:
    form = FORMS[name]
    side = form.patch * form.merge
    image = np.random.default_rng(0).integers(0, 256, (tokens[0] * side, tokens[1] * side, 3), dtype=np.uint8)
    expected, grid = by_transformers(image, form, 1, 10**7)
    found = read_clip(clip_of(image), 2.0, UNSCALED, form)
    assert list(found.grid) == grid == [1, 2 * tokens[0], 2 * tokens[1]]
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [(100, 150), (37, 211), (480, 832), (30, 30)])
def test_resized_frames_agree_with_transformers_to_one_grey_level(name: str, size: tuple[int, int]) -> None:
    form, limits = FORMS[name], (56 * 56, 200 * 300)
    y, x = np.mgrid[: size[0], : size[1]] / 9.0
    image = np.stack([127 + 120 * np.sin(x), 127 + 120 * np.cos(y), 127 + 60 * np.sin(x + y)], -1).astype(np.uint8)
    expected, grid = by_transformers(image, form, *limits)
    found = read_clip(clip_of(image), 2.0, FrameSampler(2.0, 2, 8, *limits), form)
    assert list(found.grid) == grid
    levels = (found.values - expected).abs() * 255 * max(form.std)
    print(f"{name} {size} -> {grid}: {float(levels.amax()):.2f} grey levels, {float(levels.mean()):.2f} on average")
    assert levels.amax() < 1.1 and levels.mean() < 0.5  # theirs is rounded to 8 bits after rows and after columns, ours is not


def test_patches_of_a_moving_clip_come_in_order_frame_by_frame_token_by_token() -> None:
    form = PatchFormat(2, 2, 2, HALF, HALF)
    video = torch.randn(6, 3, 8, 12)
    values, grid = patchify(video, form)
    assert grid == (3, 4, 6) and values.shape == (72, 24)
    row = 0
    for t in range(3):
        for token_y in range(2):
            for token_x in range(3):
                for y in (2 * token_y, 2 * token_y + 1):
                    for x in (2 * token_x, 2 * token_x + 1):
                        patch = video[2 * t : 2 * t + 2, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]  # [P,3,p,p]
                        assert torch.equal(values[row], patch.transpose(0, 1).flatten())
                        row += 1


@pytest.mark.parametrize("factor", [28, 32, 8])
def test_sizes_follow_the_smart_resize_of_transformers(factor: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    sides = [factor, factor + 1, 45, 64, 100, 333, 480, 720, 1280]
    for height in sides:
        for width in sides:
            for limits in ((factor**2, 200_704), (100_352, 200_704), (3136, 1_003_520)):
                if max(height, width) <= 200 * min(height, width) and min(height, width) >= factor:
                    assert fitted_size(height, width, factor, *limits) == smart_resize(height, width, factor, *limits), (height, width, limits)
    with pytest.raises(UserError, match="too long and thin"):
        fitted_size(2, 402, factor, 1, 10**6)


def test_frames_are_spread_over_the_clip_at_the_samplers_rate() -> None:
    sampler = FrameSampler(fps=2.0, min_frames=4, max_frames=64)
    assert frame_indices(17, 24.0, sampler, 2) == [0, 5, 11, 16]  # VideoAlign's own numbers for this clip
    ten_seconds = frame_indices(240, 24.0, sampler, 2)
    assert len(ten_seconds) == 20 and ten_seconds[0] == 0 and ten_seconds[-1] == 239
    steps = np.diff(ten_seconds)
    assert steps.min() >= 12 and steps.max() <= 13
    for frames in range(1, 200):
        index = frame_indices(frames, 12.0, sampler, 2)
        assert len(index) % 2 == 0 and index == sorted(index) and index[0] == 0 and index[-1] == frames - 1
        assert len(index) <= max(2, frames)
    assert frame_indices(1, 2.0, sampler, 2) == [0, 0] and frame_indices(3, 3.0, sampler, 2) == [0, 2] and frame_indices(2, 2.0, sampler, 4) == [0, 1, 1, 1]


@pytest.mark.parametrize(("least", "most"), [(5, 7), (2, 7), (7, 7), (4, 8), (1, 3)])
@pytest.mark.parametrize("multiple", [1, 2])
def test_no_fewer_frames_than_the_least_and_no_more_than_the_largest_are_seen(least: int, most: int, multiple: int) -> None:
    sampler = FrameSampler(fps=2.0, min_frames=least, max_frames=most)
    for frames in range(1, 60):
        for fps in (15.0, 16.0, 60.0):
            wanted = frames / fps * 2
            if wanted <= most:
                seen = frame_indices(frames, fps, sampler, multiple)
                low, high = -(-least // multiple) * multiple, min(most, max(frames, multiple)) // multiple * multiple
                assert (len(seen) == min(max(round(wanted / multiple) * multiple, low), high) and seen == sorted(set(seen))) or frames < multiple


def test_a_rate_the_sampler_cannot_have_is_refused() -> None:
    sampler = FrameSampler(fps=2.0, max_frames=8)
    with pytest.raises(UserError, match=r"1 frames a second, and the reward model looks at 2\.") as slow:
        frame_indices(10, 1.0, sampler, 2)
    with pytest.raises(UserError, match="10 seconds long and needs 20 frames at 2 a second; the reward model looks at 8 at most") as long:
        frame_indices(240, 24.0, sampler, 2)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="positive number"):
            frame_indices(10, wrong, sampler, 2)
    assert "\n" not in f"{slow.value}{long.value}"
    with pytest.raises(UserError, match="not a frame sampler"):
        FrameSampler(fps=0)
    with pytest.raises(UserError, match="not a frame sampler"):
        FrameSampler(min_pixels=10, max_pixels=9)


def test_times_are_those_transformers_writes_before_the_frames_of_qwen3() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    sampler, form = FrameSampler(2.0, 4, 64, 1, 10**6), FORMS["qwen3"]
    for frames, fps in ((97, 24.0), (30, 12.0), (9, 8.0)):
        index = frame_indices(frames, fps, sampler, 2)
        expected = Qwen3VLProcessor._calculate_timestamps(None, list(index), fps, 2)
        found = read_clip(torch.rand(frames, 3, 32, 32), fps, sampler, form)
        assert found.times == pytest.approx(expected)
        assert found.seconds == pytest.approx(2 * np.diff(index).mean() / fps)


def test_the_gradient_passes_and_no_level_is_rounded() -> None:
    video = torch.full((4, 3, 20, 30), 100.4 / 255).requires_grad_()
    values = read_clip(video, 4.0, FrameSampler(4.0, 4, 8, 64, 10**6), PatchFormat(4, 2, 2, HALF, HALF)).values
    torch.testing.assert_close(values, torch.full_like(values, (100.4 / 255 - 0.5) / 0.5), rtol=0, atol=1e-5)
    values.sum().backward()
    assert video.grad is not None and (video.grad.flatten(1).sum(1) > 0).all()


def test_what_is_no_clip_is_refused() -> None:
    for wrong in (torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), torch.rand(0, 3, 8, 8)):
        with pytest.raises(ValueError, match="a clip is"):
            read_clip(wrong, 8.0, UNSCALED, FORMS["qwen2"])
