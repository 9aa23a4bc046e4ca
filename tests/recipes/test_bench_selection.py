"""Which clips to rank next: one pool for all, the same beginning for all, the floor counted, and ratios that are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import load
from base_model.errors import UserError
from recipes import cli
from recipes.bench import _pool, selection
from recipes.bench._people import panel_worth
from recipes.shapes.labelers import REWARD_PANEL, utility
from reward.asking import Given
from reward.model import INPUTS
from reward.selection import METHODS

TOY = ["--prompts", "6", "--held_out", "5", "--clips", "4", "--sizes", "[2]", "--rankings", "[24, 24]", "--candidates", "20", "--seeds", "[0, 1]"]


def config(*more: str) -> selection.Config:
    return load(selection.Config, None, [*TOY, *more])


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> selection.Pool:
    return selection.the_pool(config(), tmp_path_factory.mktemp("pool"))


def test_the_quick_form_gives_flat_rows_of_every_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "selection", "--quick", "--prompts", "5", "--held_out", "4", "--json", "--write", "--results", str(tmp_path), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len({tuple(row) for row in rows}) == 1 and all(value is None or isinstance(value, str | int | float) for row in rows for value in row.values())
    found = {(row["part"], row["clips_a_task"], row["method"]) for row in rows}
    assert found == {(part, k, m) for part, methods in (("ratios", METHODS[1:]), ("accuracy", (None,)), ("pool", (None,))) for k in (2, 4) for m in methods}
    assert all(0.5 <= row[method] <= 1 for row in rows if row["part"] == "accuracy" for method in METHODS)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "# Which clips to rank next" in text and "the random floor of 25% counted" in text and "rushes bench selection --quick" in text
    assert "\n2 seeds. `ratio`" in text, "as many as it took"


# The pool


def test_the_pool_is_fixed_and_its_held_out_prompts_are_never_ranked(pool: selection.Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = selection.the_pool(config("--seeds", "[7]", "--methods", "[random]"), tmp_path)
    assert torch.equal(again.inputs, pool.inputs) and np.array_equal(*(panel_worth(REWARD_PANEL, each.perception) for each in (again, pool)))
    monkeypatch.setattr(_pool, "make_pool", lambda *_: pytest.fail("it is kept"))
    assert torch.equal(selection.the_pool(config(), tmp_path).inputs, pool.inputs)
    assert pool.inputs.shape == (44, len(INPUTS)) and torch.isfinite(pool.inputs).all() and pool.inputs.abs().max() <= 3
    tasks, (pairs, truth) = pool.tasks(2), pool.held_out_pairs()
    assert len(tasks) == 6 * 6 and tasks.max() < 24 <= pairs.min() and (tasks[:, 0] // 4 == tasks[:, 1] // 4).all() and (pairs[:, 0] // 4 == pairs[:, 1] // 4).all()
    assert len(pool.tasks(4)) == 6 and set(truth.tolist()) <= {-1.0, 1.0} and len(truth) == len(pairs) > 10
    worth = np.mean([utility(person, pool.perception) for person in REWARD_PANEL], axis=0)
    assert ((worth[pairs[:, 0]] - worth[pairs[:, 1]]) * truth >= selection.CLOSE).all()


def test_clips_of_a_prompt_are_right_or_wrong_and_differ() -> None:
    prompt = _pool.asked(1)[0]
    clips = [_pool.draw_clip(prompt, np.random.default_rng(i)) for i in range(6)]
    assert all(clip.shape == (13, 3, 32, 32) for clip in clips) and not torch.equal(clips[0], clips[1])
    assert torch.equal(clips[0], _pool.draw_clip(prompt, np.random.default_rng(0)))


# Curves


def test_all_methods_begin_alike_count_the_floor_and_end_at_the_budget(pool: selection.Pool) -> None:
    cfg = config()
    found = {method: selection.curve(cfg, pool, 2, 24, method, 0) for method in METHODS}
    assert len({each["accuracy"][0] for each in found.values()}) == 1
    for method, each in found.items():
        assert each["numbers"] == [6, 12, 18, 24] and len(each["accuracy"]) == 4
        assert each["random"] == 24 if method == "random" else 6 + 18 * 0.25 - 3 <= each["random"] <= 6 + 18 * 0.25 + 3
    assert found["bald"]["accuracy"] != found["random"]["accuracy"]
    assert selection.curve(cfg, pool, 2, 24, "bald", 0) == found["bald"]
    assert selection.curve(cfg, pool, 2, 24, "bald", 1)["accuracy"] != found["bald"]["accuracy"]


def test_a_pool_that_is_used_up_ends_the_curve(pool: selection.Pool) -> None:
    assert selection.curve(config(), pool, 4, 60, "d_optimal", 0)["numbers"] == [6]


def test_an_answer_depends_on_the_seed_the_person_and_the_clips_alone(pool: selection.Pool) -> None:
    def answer(person: int, seed: int, kind: str = "active") -> list[int]:
        answers = selection.Answers([], [])
        selection.ask(pool, Given(REWARD_PANEL[person].annotator_id, "0", ("0", "1", "2"), (0, 1, 2), kind), seed, answers)  # type: ignore[arg-type]
        assert answers.index == [[0, 1, 2]]
        return answers.ranks[0]

    assert answer(0, 0) == answer(0, 0, "random")
    assert len({tuple(answer(5, seed)) for seed in range(20)}) > 1, "the careless one"


def test_accuracy_counts_equal_scores_as_one_half() -> None:
    assert selection.accuracy_of(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), np.array([1.0, 1.0, -1.0])) == pytest.approx(0.5)


# Ratios

NUMBERS = np.array([10.0, 20.0, 30.0, 40.0])


def test_a_target_is_reached_between_rounds_on_a_monotone_curve() -> None:
    rising = np.array([0.5, 0.6, 0.7, 0.8])
    assert selection.needed(NUMBERS, rising, 0.65) == pytest.approx(25) and selection.needed(NUMBERS, rising, 0.5) == 10
    assert selection.needed(NUMBERS, rising, 0.81) == float("inf")
    noisy = np.array([0.5, 0.7, 0.6, 0.8])  # isotonic: 0.5, 0.65, 0.65, 0.8
    assert selection.needed(NUMBERS, noisy, 0.6) == pytest.approx(10 + 10 * 0.1 / 0.15) and selection.needed(NUMBERS, noisy, 0.7) == pytest.approx(30 + 10 * 0.05 / 0.15)


def test_ratios_are_those_of_curves_that_are_known() -> None:
    numbers = np.arange(10.0, 101.0, 10.0)
    random = np.stack([0.5 + numbers / 1000 + shift for shift in (0.0, 0.01, -0.01)])  # gains 0.09 over 90 rankings
    twice = np.stack([0.5 + (2 * numbers - 10) / 1000 + shift for shift in (0.0, 0.01, -0.01)])
    for row, share in zip(selection.compare(numbers, twice, random, draws=50), selection.TARGETS, strict=True):
        assert row["rankings_random"] == pytest.approx(10 + 90 * share) and row["rankings"] == pytest.approx(10 + 45 * share)
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["ratio_low"] == pytest.approx(row["ratio_high"], abs=1e-9)
        assert row["goal_met"] is (row["ratio_high"] <= 0.6)
    flat = selection.known(selection.compare(numbers, np.full((3, 10), 0.5), random, draws=50)[2])
    assert flat["rankings"] is None and flat["ratio"] is None and flat["ratio_high"] is None and flat["goal_met"] is False
    assert all(row["ratio"] == 1 for row in selection.compare(numbers, random, random, draws=50))


# The command


def test_finished_curves_are_read_and_those_of_other_settings_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("--out", str(tmp_path), "--methods", "[random, variance]")
    first: Any = selection.main(cfg)["rows"]
    monkeypatch.setattr(selection, "curve", lambda *_: pytest.fail("it is kept"))
    assert selection.main(cfg)["rows"] == first
    with pytest.raises(UserError, match="made with another floor"):
        selection.main(cfg.model_copy(update={"floor": 0.5}))
    with pytest.raises(UserError, match="ratios are to `random`"):
        selection.main(config("--methods", "[bald]", "--out", str(tmp_path)))
