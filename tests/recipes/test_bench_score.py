"""The bench of scoring: flat rows at toy size; every way sees the same clips and says nearly the same scores; other checkpoints are the user's error."""

from pathlib import Path

import pytest
import torch

from align.config import load
from base_model.errors import UserError
from recipes.bench import score
from tests.recipes.test_bench import assert_flat
from tests.reward import tiny_encoders


def test_the_score_bench_measures_ours_and_its_peers_in_flat_rows(tmp_path: Path) -> None:
    cfg = load(score.Config, None, ["--quick", "--clips", "3", "--group-size", "2", "--frames", "5", "--repeats", "2", "--write", "--results", str(tmp_path)])
    rows = score.main(cfg)["rows"]
    assert isinstance(rows, list)
    assert_flat(rows)
    assert [(row["scorer"], row["name"]) for row in rows] == [
        ("encoder", "ours"),
        ("encoder", "transformers, one clip at a time"),
        ("encoder", "transformers, one batch"),
        ("reward model", "ours"),
        ("reward model", "one clip at a time"),
    ]
    for row in rows:
        assert row["clips"] == 3 and row["prompts"] == 2 and row["clip"] == "5x32x32" and row["clips_per_second"] == pytest.approx(3 / row["seconds"])
        assert (row["times_slower_than_ours"] is None) == (row["name"] == "ours")
    assert rows[1]["times_slower_low"] <= rows[1]["times_slower_than_ours"] <= rows[1]["times_slower_high"]
    assert "Clips a second" in next(tmp_path.iterdir()).read_text()


def test_both_sides_say_the_same_scores_up_to_the_processors_rounding(tmp_path: Path) -> None:
    task = score.draw_task(load(score.Config, None, ["--clips", "4", "--group-size", "2", "--frames", "5"]))
    with torch.no_grad():
        ours, alone, batch = (way.score(task) for way in score.encoder_ways(score.save_small_clip(tmp_path, task.prompts)))
        together, one_by_one = (way.score(task) for way in score.reward_ways())
    assert torch.allclose(alone, batch, atol=1e-6) and torch.allclose(together, one_by_one, atol=1e-5)
    assert (ours - batch).abs().max() < 1e-3 < (ours[:, None] - ours).abs().max(), "rounding is less than what tells clips apart"


def test_a_checkpoint_that_is_no_clip_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="family 'videomae' is not measured"):
        score.encoder_ways(tiny_encoders.save("videomae", tmp_path))
