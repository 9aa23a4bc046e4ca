"""The bench of the bias audit at toy size: skews are planted as said, power and false alarms of pools whose truth is known, and that all of it runs and is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from align.config import load
from base_model.errors import UserError
from recipes.bench import bias as bench
from recipes.bench.bias import NAMES, Config
from tests.recipes.small import save_small_network, save_small_reward_model


def made_up(prompts: int = 200, clips: int = 24, concentration: float = 8.0) -> NDArray[np.int64]:
    """A pool in which every prompt has shares of its own; one clip in twenty shows no colour."""
    rng = np.random.default_rng(0)
    pool = np.array([rng.choice(6, size=clips, p=rng.dirichlet(np.full(6, concentration / 6))) for _ in range(prompts)])
    return np.where(rng.random(pool.shape) < 0.05, 6, pool)


def test_a_planted_skew_is_as_large_as_said_and_the_other_model_has_none() -> None:
    pool, rng = made_up(), np.random.default_rng(1)
    drawn = bench.resampled(pool, 4_000, 25, 0.1, rng)
    before, after = (found.counts.sum(0) / found.counts.sum() for found in drawn)
    truth = bench.shares_of_clips(pool)
    assert before == pytest.approx(truth, abs=0.01) and after[0] - truth[0] == pytest.approx(0.1, abs=0.01)
    assert after[1:] == pytest.approx(truth[1:] * (1 - 0.1 / (1 - truth[0])), abs=0.01), "the others lose in proportion"
    assert drawn.before.unclear.sum() / (4_000 * 25) == pytest.approx(0.05, abs=0.005)


def test_p_values_of_a_stack_are_those_of_each_test_alone() -> None:
    pool, truth = made_up(), dict(zip(NAMES, [1 / 6] * 6, strict=True))
    tests = bench.tests_of(bench.resampled(pool, 30, 10, 0.1, np.random.default_rng(0)), truth, 0.1)
    alone = [float(bench.disparity.differs(test.x[:, None], skewed=test.skewed)[0]) for test in tests]
    assert len(tests) == 18 and bench.p_values(tests) == pytest.approx(alone)


def test_an_audit_over_prompts_finds_ten_points_and_keeps_quiet_and_one_over_clips_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STATES_OF", 40)
    cfg, pool = Config(runs=250), made_up()
    skewed, none = (bench.power_row(cfg, pool, 60, skew) for skew in (0.1, 0.0))
    print(skewed, none)
    assert skewed["found"] >= 0.95 and skewed["found_low"] > 0.9 and skewed["pass"] <= 0.05
    assert none["anything"] <= 0.08 and none["anything_naive"] > 0.4, "clips of a prompt are not independent"
    assert none["pass"] >= 0.8 and none["blocked"] == 0 and "found" not in none


def small(tmp_path: Path) -> list[str]:
    network = save_small_network(tmp_path / "network.safetensors")
    rewards = [str(save_small_reward_model(tmp_path / name, seed=k)) for k, name in enumerate(("reward", "guard"))]
    policy = "{iterations: 1, prompts: 2, group_size: 4, updates: 1, lora_rank: 2, evaluate_every: 9}"
    words = ["--model", str(network), "--reward", rewards[0], "--guard", rewards[1], "--sampler.steps", "2", "--policy", policy, "--fit.iterations", "1", "--fit.held_out", "2"]
    words += ["--pairs", "8", "--training", "4", "--pool_prompts", "12", "--pool_clips", "4", "--runs", "10", "--designs", "[12]", "--skews", "[0, 0.1]"]
    return [*words, "--audit", "{prompts: 3, clips: 2, sets: 1, set_clips: 1, scenes: 1}", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]


def test_all_of_it_runs_once_and_is_told_with_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(Config, None, [*small(tmp_path), "--write"])
    rows = bench.main(cfg)["rows"]
    parts = {row["part"] for row in rows}  # type: ignore[attr-defined]
    assert parts == {"claims", "power", "colours", "models", "pool"}
    table = next((tmp_path / "results").glob("*_bias.md")).read_text()
    assert "Does not hold: the pool has at least 5,000 clips (48)" in table and "rushes bench bias" in table
    for name in ("bias.svg", "bias_power.svg"):
        assert (tmp_path / "results" / name).read_text().startswith("<svg ") and 'xmlns="http://www.w3.org/2000/svg"' in (tmp_path / "results" / name).read_text()
    for work in ("draw_pool", "learn_skew", "climb"):
        monkeypatch.setattr(bench, work, lambda *_: pytest.fail("it was done already"))
    assert json.dumps(bench.main(cfg)["rows"]) == json.dumps(rows)
    other = save_small_reward_model(tmp_path / "other", seed=7)
    with pytest.raises(UserError, match=r"climbed\.json was made with another reward\."):
        bench.main(cfg.model_copy(update={"reward": other}))
    with pytest.raises(UserError, match="was made with another planted"):
        bench.main(load(Config, None, [*small(tmp_path), "--planted", "{red: 0.25, green: 0.15, blue: 0.15, yellow: 0.15, magenta: 0.15, cyan: 0.15}"]))


def test_planted_shares_are_of_all_colours() -> None:
    with pytest.raises(UserError, match="expected shares of red"):
        load(Config, None, ["--planted", "{red: 1.0}"])
    with pytest.raises(UserError, match="one needs the others"):
        bench.main(load(Config, None, ["--quick", "--model", "x.safetensors"]))
