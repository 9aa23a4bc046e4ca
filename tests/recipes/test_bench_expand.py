"""The bench of prompts made long: what counts as shown, how arms are paired, what it says in words, and that all of it runs at toy size and goes on where it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from align.config import load
from base_model.errors import UserError
from recipes.bench import expand as bench
from recipes.bench.expand import GRPO, SFT, TYPED, Seen
from recipes.shapes.prompts import Thing
from recipes.shapes.short import Short
from recipes.statistics import bootstrap_crossed
from tests.recipes.small import save_small_network, save_small_reward_model
from tests.recipes.test_bench import assert_flat

NAMED, OPEN = (Short("red circle left", "a red circle moves left", Thing("circle", "red", "left"), named) for named in (True, False))


def judged(shape: bool = True, colour: bool = True, motion: bool = True, blobs: int = 1, extra: int = 0, seen: bool = True) -> Any:
    reading = SimpleNamespace(blobs=blobs) if seen else None
    return SimpleNamespace(shape_right=(shape,), colour_right=(colour,), motion_right=(motion,), readings=(reading,), extra=extra)


def test_a_clip_shows_a_prompt_where_all_that_it_names_is_right_and_nothing_else_is_there() -> None:
    assert bench.shows(NAMED, judged()) and bench.shows(OPEN, judged()) and bench.shows(OPEN, judged(motion=False))
    assert not bench.shows(NAMED, judged(motion=False))
    for wrong in ({"shape": False}, {"colour": False}, {"blobs": 2}, {"extra": 1}, {"seen": False}):
        assert not bench.shows(NAMED, judged(**wrong)) and not bench.shows(OPEN, judged(**wrong))  # type: ignore[arg-type]


def seen(right: np.ndarray[Any, Any]) -> Seen:
    same = np.ones_like(right)
    return Seen(right.tolist(), same.tolist(), (4 * same).tolist(), (0 * same).tolist(), (0 * same).tolist(), [["a text"] * right.shape[1]] * right.shape[0])


def test_arms_are_paired_over_seeds_and_prompts_and_told_by_kind() -> None:
    rng = np.random.default_rng(0)
    shorts = [NAMED, OPEN] * 4
    typed, sft, grpo = rng.integers(0, 2, (8, 3)), rng.integers(0, 2, (2, 8, 3)), rng.integers(0, 2, (2, 8, 3))
    arms = {TYPED: [seen(typed)] * 2, SFT: [seen(one) for one in sft], GRPO: [seen(one) for one in grpo]}
    rows = bench.difference_rows(arms, shorts)
    assert [row["prompts"] for row in rows[::3]] == ["all", "motion named", "motion open"]
    assert rows[0]["captions"] == "GRPO - SFT"
    assert [rows[0][f"right{end}"] for end in ("", "_low", "_high")] == pytest.approx(list(bootstrap_crossed((grpo - sft).mean(2))))
    assert rows[4]["right"] == pytest.approx((sft - typed).mean(2)[:, ::2].mean())
    told = bench.clip_rows(arms, shorts)
    assert told[8]["right"] == pytest.approx(grpo.mean(2)[:, 1::2].mean()) and told[0]["different"] == pytest.approx(1 / 24) and told[0]["words"] == 4


def test_what_cannot_be_told_is_said_so() -> None:
    gaps = {"prompts": "all", "right": 0.1, "right_low": 0.02, "right_high": 0.2}
    rows = [{**gaps, "captions": "GRPO - SFT", "is_better": True}, {**gaps, "captions": "SFT - as typed", "is_better": None}]
    language = [{"pairs": "real prompts", "sft_bits": 5.0, "ngram_bits": 4.0, "sft_is_better": False}]
    said = bench.verdicts({"difference": rows, "language": language})
    assert said[0].startswith("GRPO against SFT: raises") and "[+2.0, +20.0]" in said[0]
    assert "cannot be told to change" in said[1] and "worse than" in said[2] and "5.00 bits" in said[2]
    found = [{"bits": bits, "ngram_bits": 5.0, "ngram_order": 3, "unigram_bits": 8.0, "pairs": {"test": 9}} for bits in (4.0, 5.5)]
    words = dict.fromkeys(("words", "most_words", "likeness", "likeness_of_pairs", "kept_prompts", "unsafe"), 0.0)
    assert bench.language_row("x", [{**one, **words} for one in found])["sft_is_better"] is None
    assert bench.language_row("x", [{**found[0], **words}])["sft_is_better"] is True


def test_all_of_it_runs_at_toy_size_and_what_is_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, reward = save_small_network(tmp_path / "network.safetensors"), save_small_reward_model(tmp_path / "reward")
    words = ["--model", str(network), "--reward", str(reward), "--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--out", str(tmp_path / "out")]
    cfg = bench.shrunk(load(bench.Config, None, [*words, "--write", "--results", str(tmp_path)]))
    parts = bench.main(cfg)["rows"]
    assert isinstance(parts, list)
    assert_flat(parts)
    assert [row["captions"] for row in parts if row["part"] == "clips" and row["prompts"] == "all"] == [TYPED, SFT, GRPO]
    (training,) = [row for row in parts if row["part"] == "training"]
    assert training["reward_first"] is not None and training["missing_reward_share"] is not None
    assert "how to read" in next(tmp_path.glob("*_expand.md")).read_text()
    for place, name in ((bench, "look"), (bench.expand, "learn_captions"), (bench.expand, "climb")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("it was done again"))
    assert bench.main(cfg)["rows"] == parts
    with pytest.raises(UserError, match="one needs the other"):
        bench.run_all(load(bench.Config, None, words[:2]), tmp_path / "other")
