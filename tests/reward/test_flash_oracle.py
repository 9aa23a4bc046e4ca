"""The flash filter against the definition of flashing, on generated sequences at and around its limits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.bench._flash_oracle import CELLS, Clip, changes_in_a_second, general_changes, generate, grey, is_hazard, red_changes
from reward.safety.contract import Verdict
from reward.safety.policy import load_policy
from reward.safety.video import FlashFilter

FILTER = FlashFilter(load_policy())


def pixels(clip: Clip) -> Tensor:
    """[1,T,3,8,8]"""
    cells = np.concatenate([np.repeat(waveform[:, None], count, 1) for waveform, count in zip(clip.waveforms, clip.cells, strict=True)], 1)  # [T,P,3]
    assert cells.shape[1] == CELLS
    return torch.from_numpy(cells / 255).float().permute(0, 2, 1).reshape(1, len(cells), 3, 8, 8)


def blocked(clip: Clip) -> bool:
    ((ruling,),) = FILTER.check_videos(pixels(clip), [""], clip.fps)
    return ruling.verdict == Verdict.BLOCK


def near_the_limit(clip: Clip) -> bool:
    """Whether a ten-thousandth of luminance or of redness more would make it a hazard."""
    return is_hazard(clip, swing=0.999, dark=0.8001)


def compare(seeds: range, each: int) -> None:
    counts: Counter[str] = Counter()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for _ in range(each):
            clip = generate(rng)
            hazard, answer = is_hazard(clip), blocked(clip)
            close = is_hazard(clip, swing=0.97, dark=0.81) != hazard
            counts.update([f"{clip.kind}, {'hazard' if hazard else 'none'}", "same" if hazard == answer else "differs", "close" if close else "far"])
            assert answer or not hazard, (seed, clip)
            assert answer == hazard or near_the_limit(clip), (seed, clip)
    print(dict(counts))
    total = len(seeds) * each
    assert counts["differs"] <= 0.001 * total
    assert all(sum(number for name, number in counts.items() if name.endswith(end)) >= 0.1 * total for end in ("hazard", "none"))


def test_the_filter_agrees_with_the_definition() -> None:
    compare(range(1), 500)


@pytest.mark.slow
def test_the_filter_agrees_with_the_definition_on_the_rest_of_five_thousand() -> None:
    compare(range(1, 10), 500)


def test_the_oracle_knows_the_guideline() -> None:
    changes = changes_in_a_second(general_changes(grey([0.1, 0.5] * 7)), 12.0)
    assert changes[0] == 12 and changes[1] == 12 and changes[-2:].tolist() == [1, 0]
    assert changes_in_a_second(general_changes(grey([0.1, 0.5] * 40)), 23.976)[0] == 24 and changes_in_a_second(general_changes(grey([0.1, 0.5] * 40)), 24.0)[0] == 24
    assert not general_changes(grey([0.82, 1.0])).any() and general_changes(grey([0.7, 1.0])).tolist() == [[False, True], [False, False]]
    red, pale, dark = (np.array([[r, o, o]]) for r, o in ((255, 0), (255, 180), (60, 0)))
    assert red_changes(np.concatenate([pale, red]))[0, 1] and red_changes(np.concatenate([grey([0.2]), red]))[0, 1] and not red_changes(np.concatenate([grey([0.2]), pale])).any()
    assert not red_changes(np.concatenate([grey([0.0]), dark])).any()  # 0.045 of redness is below 20/320


def test_a_red_whose_dark_or_bright_ends_are_saturated_in_turn_is_followed_from_one_to_the_next() -> None:
    """Bright and pale, dark and saturated, then grey and saturated: no one end is saturated throughout, every change has one that is."""
    pale, deep, dim, grey_ = [255, 140, 140], [110, 0, 0], [190, 0, 0], [128, 128, 128]
    clip = Clip((np.array([pale, deep, pale, deep, pale, deep, dim, grey_, dim, grey_]),), (CELLS,), 12.0, "red")
    assert is_hazard(clip) and blocked(clip)


def test_parts_that_flash_red_in_different_ways_add_up_to_one_area() -> None:
    into, out_of = np.array([[110, 0, 0], [255, 140, 140]] * 7), np.array([[190, 0, 0], [128, 128, 128]] * 7)
    for cells, hazard in ((8, True), (7, False)):
        clip = Clip((into, out_of, grey([0.3] * 14)), (8, cells, CELLS - 8 - cells), 12.0, "red")
        assert is_hazard(clip) == blocked(clip) == hazard
