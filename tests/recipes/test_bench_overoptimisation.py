"""Gold against sqrt(KL): reward models from few and many rankings, the best of n by each, and an RL run that is looked at on its way and goes on when it was killed."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import load
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from recipes import cli, nft
from recipes.bench import overoptimisation as bench
from recipes.bench._people import panel_worth, perceived, to_tensor
from recipes.shapes.labelers import REWARD_PANEL
from recipes.shapes.prompts import make_prompts
from reward.model import INPUTS, INTACT

SMALL = ["--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--prompts", "4", "--clips", "6", "--rankings", "[4, 8]", "--seeds", "[0, 1]"]
SMALL += ["--kl_steps", "4", "--kl_clips", "2"]
POLICY = ["--policy", "{iterations: 3, evaluate_every: 1, save_every: 1, prompts: 2, group_size: 2, micro_batch: 4, updates: 1, lora_rank: 2}"]


def config(out: Path, *more: str) -> bench.Config:
    return load(bench.Config, None, [*SMALL, *POLICY, "--out", str(out), *more])


def drawn(prompts: int, clips: int, seed: int = 0) -> bench.Clips:
    """Clips nobody rendered: inputs of the reward model, and an eye that sees the match in them and noise."""
    rng = np.random.default_rng(seed)
    inputs = torch.from_numpy(rng.normal(size=(prompts * clips, len(INPUTS)))).float()
    match = 1 / (1 + np.exp(-inputs[:, :3].sum(1).double().numpy() - 0.7 * rng.normal(size=prompts * clips)))
    seen = torch.from_numpy(rng.uniform(0, 0.1, size=(prompts * clips, 11)))
    seen[:, [0, 2, 4]] = torch.from_numpy(match)[:, None]
    seen[:, [1, 3, 5]] = math.nan
    return bench.Clips(make_prompts(prompts, seed=seed, split="train"), inputs, perceived(seen), torch.from_numpy((match > 0.5).astype(np.float32)))


# Reward models and what they pick


def test_what_the_eye_saw_comes_back_from_its_tensor() -> None:
    seen = drawn(2, 3).perception
    again = perceived(to_tensor(seen))
    for before, after in zip((seen.color, seen.motion, seen.extra, *seen.signals), (again.color, again.motion, again.extra, *again.signals), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_shipped_prior_stays_with_the_matcher_and_a_weak_one_learns_from_every_ranking() -> None:
    ranked, takes, encode = drawn(200, bench.K), drawn(20, 30, seed=1), TextEncoder()
    worth, seen = takes.golds()["people"], takes.inputs[:, : INTACT + 1]

    def proxy(prior: str, rankings: int, seed: int = 0) -> torch.Tensor:
        return bench.scores(bench.learn(ranked, prior, rankings, seed, encode), takes.inputs)

    def agreement(scores: torch.Tensor) -> float:
        """Correlation with the best score of what the prior is about: the parts of the match and being intact."""
        columns = torch.cat([seen, seen.tanh(), torch.ones(len(seen), 1)], dim=1)
        return float(torch.corrcoef(torch.stack([scores, columns @ torch.linalg.lstsq(columns, scores[:, None]).solution[:, 0]]))[0, 1])

    few, many = (proxy(bench.WEAK, number) for number in (8, 200))
    assert agreement(proxy(bench.SHIPPED_PRIOR, 8)) > 0.99 > agreement(many) > agreement(few) + 0.03
    assert bench.accuracy(takes.by_prompt(few), worth) < bench.accuracy(takes.by_prompt(many), worth) - 0.03
    assert torch.equal(proxy(bench.WEAK, 8), few) and not torch.equal(proxy(bench.WEAK, 8, seed=1), few)


def test_accuracy_counts_pairs_of_one_prompt() -> None:
    worth = np.array([[0.0, 1.0, 2.0], [5.0, 5.0, 4.0]])
    proxy = np.array([[0.0, 2.0, 1.0], [7.0, 3.0, 3.0]])
    assert bench.accuracy(proxy, worth) == pytest.approx((1 + 1 + 0 + 1 + 0.5) / 5) and bench.accuracy(worth, worth) == 1


def test_the_mean_over_seeds_is_taken_prompt_by_prompt_and_gold_frames_it(tmp_path: Path) -> None:
    takes, encode = drawn(10, 12, seed=1), TextEncoder()
    arms = bench.arms_of(config(tmp_path), drawn(8, bench.K), takes, encode)
    assert [(arm.prior, arm.rankings) for arm in arms] == [("the matcher alone", 0), ("as shipped", 4), ("as shipped", 8), ("weak", 4), ("weak", 8), ("gold itself", None)]
    weak = arms[3]
    first, second = weak.curves["judge"]
    np.testing.assert_allclose(weak.mean("judge").gold, (first.gold + second.gold) / 2)
    np.testing.assert_allclose(weak.mean("judge").proxy, (first.proxy / first.proxy_std + second.proxy / second.proxy_std) / 2)
    rows = bench.best_of_n_rows(arms, {"proxy": 1.0, "people": 2.0, "judge": 1.0})
    ceiling = {row["gold"]: row["n_12"] for row in rows if row["picked_by"] == bench.ITSELF}
    assert all(row["n_12"] <= ceiling[row["gold"]] + 1e-12 for row in rows) and len(rows) == 2 * len(arms)
    assert rows[0]["n_12"] == pytest.approx(arms[0].mean("people").gold[:, -1].mean() / 2)


def test_a_peak_beyond_what_was_measured_is_not_told() -> None:
    d = np.array([0.0, 0.5, 1.0, 1.5])
    inside, outside = (bench.form_row("best_of_n", d, np.tile(d * (1 - beta * d), (5, 1))) for beta in (0.5, 0.1))
    assert inside["peak_sqrt_kl"] == pytest.approx(1) and inside["peak_n"] == pytest.approx(6.305, abs=0.001) and outside["peak_sqrt_kl"] is outside["peak_n_high"] is None
    assert "peak_n" not in bench.form_row("rl", d, np.tile(d, (5, 1)))
    (row,) = bench.compact([{"a": "x", **bench.interval("peak", [1.0, 0.5, math.inf])}])
    assert row == {"a": "x", "peak": "1 [0.5, beyond]"}


# RL


def untimed(rows: Any) -> Any:
    return json.loads(json.dumps(rows))


def test_a_run_that_was_killed_goes_on_and_a_finished_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked, takes, encode = drawn(8, bench.K), drawn(4, 6, seed=1), TextEncoder()

    def climbed(out: Path) -> bench.Climb:
        return bench.kept_climb(config(out), out, ranked, takes, bench.WEAK, 4, encode)

    whole = climbed(tmp_path / "whole")
    assert whole.iteration == [0, 1, 2, 3] and whole.kl[0] == 0 and (whole.kl[1:] > 0).all() and all(values.shape == (4, 4) for values in whole.values.values())
    assert [grid["steps"] for grid in whole.grids] == [2, 4, 8, 16] and whole.grids[1]["kl_total"] == pytest.approx(whole.kl[-1])
    calls, real = [], bench.path_kl
    monkeypatch.setattr(bench, "path_kl", lambda *rest: real(*rest) if calls.append(0) or len(calls) < 3 else pytest.fail("killed"))  # type: ignore[func-returns-value]
    with pytest.raises(pytest.fail.Exception):
        climbed(tmp_path / "killed")
    monkeypatch.setattr(bench, "path_kl", real)
    again = climbed(tmp_path / "killed")
    assert again.iteration == whole.iteration and np.array_equal(again.kl, whole.kl) and all(np.array_equal(again.values[name], whole.values[name]) for name in whole.values)
    monkeypatch.setattr(nft, "train", lambda *_: pytest.fail("it is kept"))
    assert np.array_equal(climbed(tmp_path / "whole").kl, whole.kl)


# The command


def test_the_quick_form_runs_in_flat_rows_draws_every_curve_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "overoptimisation", "--quick", "--json", *SMALL, *POLICY, "--write", "--results", str(tmp_path / "results"), "--date", "2026-11"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(set(row) == set(rows[0]) for row in rows) and not (tmp_path / "runs").exists()
    parts = [row["part"] for row in rows]
    assert {part: parts.count(part) for part in parts} == {"best of n": 12, "Gao's form, best of n": 12, "RL": 8, "Gao's form, RL": 4, "KL at the end, by grid": 8}
    looks = [row for row in rows if row["part"] == "RL"]
    assert {(row["reward_model"], row["rankings"]) for row in looks} == {("weak", 4), ("as shipped", 8)} and [row["kl_total"] for row in looks if row["iteration"] == 0] == [0, 0]
    picture = ET.fromstring((tmp_path / "results" / "overoptimisation.svg").read_text())
    assert len([element for element in picture if element.attrib.get("class") == "chart"]) == 8
    (text,) = (path.read_text() for path in (tmp_path / "results").glob("2026-11_*_overoptimisation.md"))
    assert "![Gold against sqrt(KL)](overoptimisation.svg)" in text and "| weak | 4 |" in text


def test_a_run_without_a_look_on_its_way_and_rankings_out_of_order_are_the_users_error() -> None:
    with pytest.raises(UserError, match="more iterations than evaluate_every, 4"):
        load(bench.Config, None, ["--policy.iterations", "4"])
    with pytest.raises(UserError, match=r"increasing numbers, got \[8, 4\]"):
        load(bench.Config, None, ["--rankings", "[8, 4]"])


def test_what_people_want_is_the_mean_over_the_panel() -> None:
    seen = drawn(3, 4).perception
    assert panel_worth(REWARD_PANEL[:1], seen).shape == (12,) and np.corrcoef(panel_worth(REWARD_PANEL, seen), seen.right)[0, 1] > 0.9
