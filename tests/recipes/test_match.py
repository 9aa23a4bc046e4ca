"""The matcher's recipe: changed captions change one attribute, augmentation is gentle, a run leaves weights and a card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from base_model.tiny import load_tiny
from base_model.types import ClipShape
from recipes.match import ATTRIBUTES, Config, augment, blur, candidates, captioned_clips, change, main, regenerate
from recipes.shapes.judge import judge
from recipes.shapes.prompts import is_held_out, sample_prompt
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.matcher import load_matcher


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_change_touches_one_attribute_of_one_thing_and_keeps_combinations_in_training(attribute: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(100):
        things = sample_prompt(rng, two_objects=0.5).things
        changed = change(things, attribute, rng)  # type: ignore[arg-type]
        different = [(a, b) for a, b in zip(things, changed, strict=True) if a != b]
        assert len(different) == 1, i
        a, b = different[0]
        assert {name for name in ATTRIBUTES if getattr(a, name) != getattr(b, name)} == {attribute}
        assert not is_held_out(b) and len({thing.color for thing in changed}) == len(changed)


def test_messy_pairs_come_with_three_changed_captions_and_repeat_with_the_seed() -> None:
    model = load_tiny(None)
    video, captions = captioned_clips(np.random.default_rng(1), ClipShape(5, 16, 24), 12, model=model, regenerated=0.5, morphed=0.5)
    again, same = captioned_clips(np.random.default_rng(1), ClipShape(5, 16, 24), 12, model=model, regenerated=0.5, morphed=0.5)
    assert video.shape == (12, 5, 3, 16, 24) and torch.equal(video, again) and captions == same
    assert all(len(group) == 4 and group[0] not in group[1:] for group in captions if group[0])


def test_a_regenerated_clip_still_shows_what_its_caption_says() -> None:
    rng, model = np.random.default_rng(5), load_tiny(None)
    prompts = [sample_prompt(rng, two_objects=0.0) for _ in range(24)]
    video = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in prompts])
    with torch.no_grad():
        made = regenerate(model, video, [prompt.text for prompt in prompts], torch.full((24,), 0.5), torch.Generator().manual_seed(0))
        barely = regenerate(model, video, [prompt.text for prompt in prompts], torch.full((24,), 1e-4), torch.Generator().manual_seed(0))
        torch.testing.assert_close(barely, model.decode(model.encode(video)), atol=2e-3, rtol=0)
    assert (made - video).abs().mean() > 0.01
    assert np.mean([reading.all_right for reading in judge(made, prompts)]) >= 0.9


def test_blur_is_gaussian() -> None:
    video = torch.rand(2, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.6, 1.0], dtype=torch.float64)
    inner = (..., slice(5, -5), slice(5, -5))
    for clip, s, found in zip(video, sigma.tolist(), blur(video, sigma), strict=True):
        np.testing.assert_allclose(found[inner], gaussian_filter(clip.numpy(), (0, 0, s, s), truncate=8)[inner], atol=1e-6)
    flat = torch.full((1, 1, 3, 8, 8), 0.3)
    torch.testing.assert_close(blur(flat, torch.tensor([0.9])), flat)


def test_augmentation_keeps_size_and_range_and_depends_on_the_generator_only() -> None:
    video = torch.rand(6, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    first, second = (augment(video, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == video.shape
    assert first.min() >= 0 and first.max() <= 1 and not torch.equal(first, augment(video, torch.Generator().manual_seed(4)))


def test_candidates_are_the_own_the_changed_and_those_of_other_clips() -> None:
    caption = torch.arange(24).view(6, 4)
    caption[3, 0] = caption[0, 0]  # two clips with one caption: neither is the other's wrong answer
    rows, same = candidates(caption, 5, torch.Generator().manual_seed(0))
    assert torch.equal(rows[:, :4], caption) and rows.shape == (6, 9)
    assert all(set(rows[i, 4:].tolist()) <= set(caption[:, 0].tolist()) for i in range(6))
    assert same.sum() == 2 and same[0].any() and same[3].any() and not same[:, 0].any()


def test_a_short_run_leaves_weights_and_a_card(tmp_path: Path) -> None:
    result = main(Config(out=tmp_path, clips=40, iterations=3, batch=8, others=3, evaluation_clips=6))
    card = json.loads((tmp_path / "matcher.json").read_text())
    weights = tmp_path / "matcher.safetensors"
    assert card["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest() and card["command"].startswith("rushes match --clips 40")
    assert weights.stat().st_size <= 3_000_000 and sum(p.numel() for p in load_matcher(weights).parameters()) == result["parameters"]
    table = result["right caption above one with one attribute changed"]["training combinations, fresh clips"]
    assert set(table) == {"shape", "color", "motion", "all"} and all(0 <= share <= 1 for share in table.values())
