"""`rushes quality`: planted faults as data, a loss by hand, and a run that learns them and repeats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from align.progress import Progress
from base_model.tiny import load_tiny
from base_model.types import ClipShape
from recipes.quality import Config, Signals, drawn, loss_of, main, plant, stacked
from reward.planted import FAULTS, HARMLESS
from reward.quality import FAULT_SIGNALS, load_quality

SIZES = {"clips": 60, "iterations": 150, "evaluation_clips": 30, "batch": 16, "regenerated": 0.2}


def test_a_run_learns_faults_writes_weights_with_a_card_and_repeats_to_the_bit(tmp_path: Path) -> None:
    told = main(Config(out=tmp_path / "a", **SIZES))
    card = json.loads((tmp_path / "a" / "quality.json").read_text())
    assert card["command"].startswith("rushes quality --") and card["data_sha256"]
    for table in told["faults told apart, harmless changes"].values():
        assert set(table) == {*FAULTS, *HARMLESS}
        assert np.mean([table[name] for name in FAULTS]) > 0.85, table
        assert max(table[name] for name in HARMLESS) < 0.6, table
    main(Config(out=tmp_path / "b", **SIZES))
    a, b = (load_quality(tmp_path / run / "quality.safetensors").state_dict() for run in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_fault_that_changes_nothing_does_not_count() -> None:
    grey = torch.full((5, 3, 16, 16), 0.5)
    still = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(5, 3, 16, 16)
    with Progress("faults", total=2, quiet=True) as progress:
        data = stacked(plant([grey, still], np.random.default_rng(0), progress))
    counted = {name: row.tolist() for name, row in zip(FAULTS, data.counts, strict=True)}
    assert counted["over-saturated"] == [False, True] and counted["blurred"] == [False, True]
    assert counted["noisy"] == [True, True]
    assert data.faulty.shape == (len(FAULTS), 2, len(FAULT_SIGNALS)) and data.same.shape == (len(HARMLESS), 2, len(FAULT_SIGNALS))


def test_the_loss_on_one_clip_by_hand() -> None:
    """One signal is the log-odds: clean 2, encoded 1, one fault at -1 planted into the encoded clip, one that changed nothing, one harmless change to 1.5."""
    column = torch.tensor([[2.0]])
    data = Signals(column, column - 1, torch.tensor([[[-1.0]], [[5.0]]]), torch.tensor([True]), torch.tensor([[True], [False]]), torch.tensor([[[1.5]]]))

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    loss, told = loss_of(lambda signals: signals[..., 0], data, harmless=0.5)
    expected = softplus(-1 - 1) / 2 + 0.3 * (softplus(-1) + softplus(-1) / 2 + softplus(-1.5)) + 0.5 * 0.5
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(told["told_apart"]) == 1 and float(told["harmless_change"]) == pytest.approx(0.5)


def test_half_of_the_drawn_clips_are_denoised_again_and_the_rest_are_as_they_were() -> None:
    model, clip = load_tiny(None), ClipShape(5, 16, 24)
    plain = drawn(np.random.default_rng(3), clip, 12, model, 0.0)
    mixed = drawn(np.random.default_rng(3), clip, 12, model, 0.5)
    same = [torch.equal(a, b) for a, b in zip(plain, mixed, strict=True)]
    assert 0 < sum(same) < 12 and all(video.shape == (5, 3, 16, 24) for video in mixed)
