"""The captions' benchmark runs at toy size, trains both arms on the same clips, and its rows say what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from base_model.errors import UserError
from recipes import cli
from recipes.bench import caption
from recipes.bench._trained import LOOKS
from recipes.clip_folder import find_clips
from recipes.shapes.captions import read_caption


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?`:FutureWarning")
def test_the_quick_form_gives_flat_rows_of_both_arms(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tuned: dict[str, tuple[list[str], list[str], int]] = {}
    real = caption.tune

    def noting(cfg: caption.Config, out: Path, data: Path, name: str, seed: int) -> Path:
        clips, _ = find_clips(data)
        tuned[name] = [clip.name for clip in clips], [clip.text for clip in clips], cfg.fit.iterations
        assert not clips or all((data / clip.name).stat().st_nlink == 2 for clip in clips)
        return real(cfg, out, data, name, seed)

    monkeypatch.setattr(caption, "tune", noting)
    assert cli.main(["bench", "caption", "--quick", "--json", "--write", "--results", str(tmp_path), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({tuple(row) for row in rows}) == 1 and all(value is None or isinstance(value, str | int | float) for row in rows for value in row.values())
    assert [(row["clips"], row["attribute"]) for row in rows if row["part"] == "accuracy"] == [(kind, name) for kind in caption.SPLITS for name in caption.ATTRIBUTES]
    assert [(row["look"], row["model"]) for row in rows if row["part"] == "sft"] == [(look, model) for look in LOOKS[:4] for model in ("base", "SFT on tags", "SFT on captions")]
    (tags, words, steps), (captions, said, other_steps) = tuned["tags-0"], tuned["captions-0"]
    assert tags == captions and len(tags) == 12 and steps == other_steps == 2
    assert set(words) <= {"circle", "triangle", "bar", "pillar"} and all(read_caption(text).color and text.endswith(".") for text in said)
    (file,) = tmp_path.iterdir()
    assert "# Captions instead of tags" in file.read_text() and "rushes bench caption --quick" in file.read_text()


def test_tagged_clips_are_made_once_and_only_for_as_many(tmp_path: Path) -> None:
    few = caption.Config(pairs=3)
    folder = caption.tagged_clips(few, tmp_path, 0)
    made = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir())
    assert len(find_clips(folder)[0]) == 3 and caption.tagged_clips(few, tmp_path, 0) == folder
    assert sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir()) == made
    with pytest.raises(UserError, match=r"tags-0\.json was made with another pairs\."):
        caption.tagged_clips(caption.Config(pairs=9), tmp_path, 0)


def test_differences_are_paired_over_prompts_and_the_verdict_follows_their_interval() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)  # what a prompt asks for, the same in both arms

    def arm(skill: float) -> list[dict[str, list[float]]]:
        return [{look: (hard < skill).astype(float).tolist() for look in LOOKS} for _ in range(3)]

    rows = caption.sft_rows(arm(0.4)[0], {"tags": arm(0.3), "captions": arm(0.5)})
    last = next(row for row in rows if row["look"] == "all_right" and row["model"] == "SFT on captions")
    between = float(((hard >= 0.3) & (hard < 0.5)).mean())
    assert last["minus_tags"] == pytest.approx(between) and 0 < last["minus_tags_low"] < between < last["minus_tags_high"]
    assert last["minus_tags_high"] - last["minus_tags_low"] < 0.13, "unpaired it would be as wide as 0.2"
    accuracy = caption.accuracy_rows(caption.Config(), {kind: [{name: [1.0] * 95 + [0.0] * 5 for name in caption.ATTRIBUTES}] * 3 for kind in caption.SPLITS})
    assert accuracy[0]["right"] == 0.95 and accuracy[0]["of_seeds"] == "0.950, 0.950, 0.950"
    lines = caption.verdicts({"accuracy": accuracy, "sft": rows})
    assert len(lines) == 3 and "at equal steps: holds" in lines[2] and "(held-out combinations): " in lines[0]
    lost = caption.sft_rows(arm(0.4)[0], {"tags": arm(0.5), "captions": arm(0.3)})
    assert "does not hold" in caption.verdicts({"accuracy": accuracy, "sft": lost})[2]
    assert "cannot be told" in caption.verdicts({"accuracy": accuracy, "sft": caption.sft_rows(arm(0.4)[0], {"tags": arm(0.5), "captions": arm(0.5)})})[2]
