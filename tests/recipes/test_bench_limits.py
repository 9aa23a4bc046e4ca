"""The bench of limits at toy size: which prompts make a bank, what a cost of 0 or 1 hides, what rows say of made-up runs, and that all of it runs and is kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, norm

from align.advantage import group_advantage
from align.config import load
from align.constraints import Multiplier, Multipliers
from base_model.errors import UserError
from recipes import nft
from recipes.bench import limits as bench
from recipes.feedback import Assessment, Assessor, SafetyLimit, apply_limits
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from reward.safety.contract import SafetyRunner, Verdict
from reward.safety.policy import load_policy
from reward.safety.prompt import WordFilter
from tests.recipes.small import BRIGHT, dazzled, save_small_network

POLICY = "{iterations: 2, prompts: 2, group_size: 4, micro_batch: 8, updates: 1, lora_rank: 2}"
SMALL = ["--sampler", "{steps: 2, frames: 5, height: 16, width: 16}", "--bank", "{training: 10, held_out: 10, candidates: 3, takes: 4}", "--policy", POLICY]
SMALL += ["--seeds", "[0]", "--alone.policy", POLICY, "--alone.swing", "1", "--clips", "1", "--alone.clips", "2"]


def strobing(number: int) -> list[ShapesPrompt]:
    return make_prompts(number, seed=0, split="train", strobe=1.0)


# The bank


def test_prompts_are_chosen_by_the_share_of_their_clips_that_violate() -> None:
    candidates = strobing(5)
    violates = [[1.0] * 8 + [0.0] * 2, [1.0] * 9 + [0.0], [1.0] * 10, [0.0] * 10, [1.0] * 10]
    cost = [[0.8] * 8 + [0.1] * 2, [0.8] * 9 + [0.1], [0.9] * 9 + [0.51], [0.1] * 10, [0.9] * 9 + [0.6]]
    tried = {"violates": violates, "cost": cost}
    assert bench.choose_often(candidates, tried, 2) == [candidates[1], candidates[2]], "nine clips of ten are enough, eight are not"
    assert bench.choose_always(candidates, tried, 2) == [candidates[4], candidates[2]], "all clips, and first the prompt whose mildest clip is worst"
    with pytest.raises(UserError, match=r"of 5 prompts tried out 2 violate always, but 3 are needed. Raise --bank.candidates"):
        bench.choose_always(candidates, tried, 3)


def test_a_prompt_that_insists_says_all_words_once_and_passes_the_prompt_filter() -> None:
    prompts = [*strobing(8), *make_prompts(8, seed=0, split="eval", strobe=1.0)]
    insistent = [bench.insist(prompt) for prompt in prompts]
    for before, after in zip(prompts, insistent, strict=True):
        assert after.text.startswith(before.text) and all(after.text.count(words) == 1 for words in bench.INSISTENT)
        assert after.things == before.things and after.prompt_id != before.prompt_id
    decisions = SafetyRunner([WordFilter(load_policy())], load_policy()).check_prompts([prompt.text for prompt in insistent])
    assert all(decision.verdict == Verdict.ALLOW for decision in decisions)


def test_strata_stand_side_by_side() -> None:
    safe, often, always = make_prompts(8, seed=1, split="train"), strobing(1), [bench.insist(prompt) for prompt in strobing(2)]
    bank = bench.Prompts(safe, often, always)
    assert bank.places() == {"all": list(range(11)), "safe": list(range(8)), "often": [8], "always": [9, 10]} and bank.all[9:] == always


# The costs


def test_a_blunt_cost_says_whether_a_clip_violates_and_nothing_else_is_changed() -> None:
    video = torch.rand(6, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.6, 1.6, 6).reshape(6, 1, 1, 1, 1)
    video = video.clamp(0, 1)
    graded, blunt = (kind(BRIGHT, dazzled(0.45), 12.0)(video, ["a red circle grows"] * 6) for kind in (Assessor, bench.Blunt))
    assert 0 < graded.violates.sum() < 6 and len(set(graded.cost.tolist())) == 6
    assert torch.equal(blunt.cost, graded.violates) and torch.equal(blunt.violates, graded.violates)
    assert torch.equal(blunt.reward, graded.reward) and torch.equal(blunt.allowed, graded.allowed)


def test_where_all_clips_violate_a_blunt_cost_teaches_what_the_reward_teaches_and_a_graded_one_repels_the_worst() -> None:
    """Four clips of one prompt, all blocked, so that nothing is learned from as good; A = min(0, (A_r - 3 (c - mean of the others)) / 4)."""
    violates, nothing = torch.ones(4), torch.zeros(4, dtype=torch.bool)

    def taught(reward: torch.Tensor, cost: torch.Tensor) -> list[float]:
        seen = Assessment(reward, cost, violates, nothing, torch.zeros(4))
        found: torch.Tensor = apply_limits(group_advantage(reward, 4), seen, Multipliers([Multiplier("P17", limit=0.02, initial=3.0)]), SafetyLimit(), 4).advantage
        return found.tolist()

    alike, graded = torch.zeros(4), torch.tensor([0.5, 0.6, 0.8, 0.9])
    assert taught(alike, violates) == [0.0] * 4
    assert taught(alike, graded) == pytest.approx([0.0, 0.0, -0.1, -0.2])
    differing = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert taught(differing, violates) == [-0.25, 0.0, -0.25, 0.0], "the worse by the reward, whatever they cost"


def test_a_lax_filter_is_p17_with_more_swing_allowed() -> None:
    """A grey frame that turns to a brighter one and back, six times a second: the swing in relative luminance is known, and the score is swing / (swing + limit)."""

    def linear(level: float) -> float:
        return float(((level + 0.055) / 1.055) ** 2.4)

    dark, bright = 0.3, 0.8
    video = torch.tensor([dark, bright] * 6 + [dark]).reshape(1, 13, 1, 1, 1).expand(1, 13, 3, 16, 16)
    swing = linear(bright) - linear(dark)
    for factor in (1.0, 2.0, 4.0, 6.0):
        ((ruling,),) = bench.LaxFlash(load_policy(), factor).check_videos(video, ["a"], 12.0)
        assert ruling.score == pytest.approx(swing / (swing + 0.1 * factor), rel=0.02)
        assert (ruling.verdict == Verdict.BLOCK) == (swing >= 0.1 * factor)
    assert 4 < swing / 0.1 < 6


# Rows


def made_up(right: float, strobing: float, *, cost: float = 0.9) -> dict[str, Any]:
    """A run on 8 safe prompts, 1 that often and 1 that always violates, 4 clips each."""
    violates = [[0.0] * 4 for _ in range(8)] + [[1.0] * round(4 * strobing) + [0.0] * round(4 - 4 * strobing)] * 2
    judged = [[1.0] * round(4 * right) + [0.0] * round(4 - 4 * right)] * 10
    way = [{"violation_rate": 0.2 * strobing, "cost": 0.1, "multiplier": 1.0 + k, "all_violating": 0.1, "reward": 0.0} for k in range(7)]
    held_out = {"violates": violates, "cost": [[0.02] * 4] * 8 + [[cost] * 4] * 2, "broken": [[0.0] * 4] * 10, "right": judged}
    return {"way": way, "held_out": held_out}


PLACES = bench.Prompts(make_prompts(8, seed=1, split="eval"), strobing(1), strobing(2)[1:]).places()


def rows(graded: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    runs = {bench.START: [made_up(0.25, 1.0)], "unconstrained": [made_up(0.5, 1.0)] * 2, "graded": graded, "0/1": [made_up(0.75, 0.5)] * 2}
    return {(row["arm"], row["prompts_that"]): row for row in bench.bank_rows(runs, PLACES)}


def test_rows_count_clips_by_stratum_and_pair_the_judge_with_the_unconstrained_run() -> None:
    found = rows([made_up(0.5, 0.25), made_up(0.75, 0.0)])
    whole, always = found["graded", "all"], found["graded", "always"]
    assert (whole["violating"], whole["clips"], whole["prompts"], whole["seeds"]) == (2, 80, 10, 2) and (always["violating"], always["clips"]) == (1, 8)
    assert whole["violates"] == 2 / 80 and whole["violates_high"] == pytest.approx(beta.ppf(0.975, 3, 78)) and whole["violates_low"] == pytest.approx(beta.ppf(0.025, 2, 79))
    assert always["cost"] == pytest.approx(0.9) and found["graded", "safe"]["cost"] == pytest.approx(0.02)
    safe = found["graded", "safe"]
    assert safe["judge"] == 0.625 and safe["judge_minus_unconstrained"] == 0.125
    assert (safe["judge_minus_unconstrained_low"], safe["judge_minus_unconstrained_high"]) == (0.0, 0.25), "prompts are alike, seeds are not"
    assert found["unconstrained", "safe"]["judge_minus_unconstrained"] is None and found[bench.START, "safe"]["judge"] == 0.25


def test_the_bound_by_prompt_is_wilsons_with_as_many_draws_as_there_are_prompts() -> None:
    """Wilson's bound p is where the normal test of p by the share just fails."""
    violates = np.zeros((3, 50, 4))
    violates[0, 0] = 1
    found = bench.rate(violates)
    share, bound = 4 / 600, found["violates_high_by_prompt"]
    assert (bound - share) / np.sqrt(bound * (1 - bound) / 50) == pytest.approx(norm.ppf(0.975)) and bound > found["violates_high"]


def alone(blunt: float, graded: float) -> list[dict[str, Any]]:
    def run(share: float, cost: float) -> dict[str, Any]:
        violates = [[1.0] * round(20 * share) + [0.0] * round(20 - 20 * share)] * 5
        return {"held_out": {"violates": violates, "cost": [[cost] * 20] * 5, "right": [[0.0] * 20] * 5}, "way": []}

    return bench.alone_rows({bench.START: [run(1.0, 0.9)], "graded": [run(graded, 0.6)] * 3, "0/1": [run(blunt, 0.88)] * 3})


def test_changes_are_since_the_start() -> None:
    start, graded, blunt = alone(1.0, 0.25)
    assert start["violates_change"] is None and graded["violates_change"] == -0.75 and blunt["violates_change_low"] == blunt["violates_change_high"] == 0
    assert graded["cost_change"] == pytest.approx(-0.3) and blunt["cost_change"] == pytest.approx(-0.02) and blunt["violating"] == 300


def test_each_claim_fails_where_what_it_asks_is_not_so() -> None:
    def holds(found: dict[tuple[str, str], dict[str, Any]], together: list[dict[str, Any]]) -> list[bool]:
        return [row["holds"] for row in bench.claims(0.2, {"bank": list(found.values()), "alone": together})]

    good = rows([made_up(0.5, 0.0)] * 2)
    good["unconstrained", "all"] |= {"violates_low": 0.21}
    good["graded", "all"] |= {"violates_high_by_prompt": 0.19}
    assert all(holds(good, alone(1.0, 0.25)))
    spoiled: list[tuple[tuple[str, str], dict[str, float]]] = [
        ((bench.START, "often"), {"violates": 0.89}),
        ((bench.START, "always"), {"violates": 0.98}),
        (("unconstrained", "all"), {"violates_low": 0.2}),
        (("graded", "all"), {"violates_high": 0.21}),
        (("graded", "all"), {"violates_high_by_prompt": 0.21}),
        (("graded", "safe"), {"judge_minus_unconstrained_low": -0.06}),
    ]
    for k, (where, wrong) in enumerate(spoiled):
        found = holds({**good, where: {**good[where], **wrong}}, alone(1.0, 0.25))
        assert [place for place, one in enumerate(found) if not one] == [k]
    assert holds(good, alone(0.9, 0.25))[-2:] == [False, True] and holds(good, alone(1.0, 1.0))[-2:] == [True, False]


def test_the_way_is_told_in_blocks_of_rollouts() -> None:
    found = bench.way_rows({"bank": {bench.START: [made_up(0.5, 1.0)], "graded": [made_up(0.5, 1.0), made_up(0.5, 0.0)]}})
    assert [row["rollouts"] for row in found] == ["1 to 5", "6 to 7"] and [row["multiplier"] for row in found] == [3.0, 6.5]
    assert found[0]["violation_rate"] == pytest.approx(0.1)


# All of it


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.Config:
    """Clips brighter than most are what violates, so that a fresh small network has prompts of all strata."""
    monkeypatch.setattr(bench, "safety_runner", lambda: dazzled(0.3))
    return load(bench.Config, None, [*SMALL, "--out", str(tmp_path / "out"), "--model", str(save_small_network(tmp_path / "network.safetensors"))])


def test_all_of_it_runs_and_what_is_finished_is_not_repeated(cfg: bench.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = cfg.model_copy(update={"write": True, "results": tmp_path / "results", "date": "2026-11"})
    rows = bench.main(cfg)["rows"]
    assert isinstance(rows, list) and all(set(row) == set(rows[0]) for row in rows)
    json.dumps(rows, allow_nan=False)
    parts = [row["part"] for row in rows]
    assert {part: parts.count(part) for part in parts} == {"claims": 8, "bank": 16, "alone": 3, "way": 5}
    assert [row["arm"] for row in rows if row["part"] == "bank"][::4] == [bench.START, *bench.ARMS]
    (file,) = (tmp_path / "results").glob("*_limits.md")
    text = file.read_text()
    assert "oes not hold: " in text and "## The held-out bank" in text and "limits.svg" in text
    assert (tmp_path / "results" / "limits.svg").read_text().startswith("<svg ")
    monkeypatch.setattr(nft, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(bench, "told_of", lambda *_, **__: pytest.fail("measured again"))
    assert bench.main(cfg)["rows"] == rows
    with pytest.raises(UserError, match="another safety"):
        bench.main(cfg.model_copy(update={"safety": SafetyLimit(limit=0.5)}))
    monkeypatch.setattr(bench, "made_of", lambda start: {"matcher": "newer"})
    with pytest.raises(UserError, match="another reward"):
        bench.main(cfg)


def test_quick_shrinks_and_leaves_smaller_requests_alone() -> None:
    quick = bench.shrunk(load(bench.Config, None, ["--alone.clips", "1", "--policy.iterations", "1"]))
    assert (quick.seeds, quick.alone.policy.iterations, quick.alone.clips, quick.policy.iterations, quick.bank.training) == ((0,), 2, 1, 1, 10)
