"""Limits on further policies: each has a multiplier, a cost and metrics of its own, in every recipe that keeps limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from align.advantage import group_advantage
from align.constraints import Multiplier, Multipliers
from base_model.errors import UserError
from recipes import cli, ddpo, dpo, feedback, grpo, nft, ppo, reward_gradient
from recipes.feedback import Assessment, Assessor, PolicyLimit, SafetyLimit, UnderPolicy
from recipes.guards import Guards, GuardWatch
from recipes.preferences import fresh_pairs
from reward.mixture import Mixture, Term
from reward.safety.contract import Ruling, SafetyRunner, Verdict
from reward.safety.policy import load_policy
from reward.types import Scores
from tests.recipes.small import BRIGHT, SAMPLER, Dazzle, mean_over, run_small, save_small_network, save_small_reward_model

NAN = float("nan")


def redness(video: Tensor) -> Tensor:
    """The share of red in the light of clips [B,T,3,H,W], [B]."""
    return video[:, :, 0].flatten(1).mean(1) / video.sum(2).flatten(1).mean(1)


class Redness:
    """A filter with a known answer: the score is 0.5 where red is `limit` of all light, and what is redder is blocked, or left to people."""

    id, version, threshold, policies = "redness", "1", 0.5, ("P14",)

    def __init__(self, limit: float, verdict: Verdict = Verdict.BLOCK) -> None:
        self.limit, self.verdict = limit, verdict

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        scores = torch.sigmoid(60 * (redness(video) - self.limit)).tolist()
        return [[Ruling(self.verdict if score > 0.5 else Verdict.ALLOW, "P14", score, (), self.id, self.version, self.threshold)] for score in scores]


def runner(redness: float, *, verdict: Verdict = Verdict.BLOCK) -> SafetyRunner:
    """Nothing is too bright, and what is redder than `redness` violates P14."""
    return SafetyRunner([Dazzle(2.0), Redness(redness, verdict)], load_policy())


def seen() -> Assessment:
    """Two prompts of two clips: the second clip flashes, the third is left to people under P14, of the fourth nobody knows whether it is."""
    further = {"P14": UnderPolicy(torch.tensor([0.1, 0.3, 0.7, NAN]), torch.tensor([0.0, 0.0, 1.0, NAN]))}
    cost, violates = torch.tensor([0.2, 0.8, 0.1, 0.1]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    return Assessment(torch.tensor([1.0, 3.0, 2.0, 0.5]), cost, violates, torch.tensor([True, False, False, True]), torch.zeros(4), further=further)


def both(first: float = 2.0, second: float = 0.5) -> Multipliers:
    return Multipliers([Multiplier("P17", limit=0.02, initial=first), Multiplier("P14", limit=0.1, initial=second)])


def test_every_cost_is_weighed_by_its_own_multiplier_and_what_violates_any_policy_is_gated() -> None:
    now = seen()
    assert now.violating.tolist() == [False, True, True, False] and now.unknown.tolist() == [False, False, False, True]
    limited = feedback.apply_limits(group_advantage(now.reward, 2), now, both(), SafetyLimit(), 2)
    advantage = group_advantage(now.reward, 2).advantage
    first = (advantage[0] - 2.0 * (0.2 - 0.8) - 0.5 * (0.1 - 0.3)) / 3.5
    second = (advantage[1] - 2.0 * (0.8 - 0.2) - 0.5 * (0.3 - 0.1)) / 3.5
    assert limited.advantage[0] == pytest.approx(float(first)) and limited.advantage[1] == pytest.approx(min(float(second), -1 / 3.5))
    assert limited.valid.tolist() == [True, True, False, False], "of a prompt with one known cost nothing is a baseline"


def test_pairs_of_fresh_clips_pay_every_price() -> None:
    further = {"P14": UnderPolicy(torch.tensor([0.0, 1.0]), torch.zeros(2))}
    alone = Assessment(torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.8]), torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.zeros(2), further=further)
    for price, winner in ((0.5, 1), (2.0, 0)):  # 3 - 0.8 - price against 1 - 0.2
        multipliers = Multipliers([Multiplier("P17", limit=0.02, initial=1.0), Multiplier("P14", limit=0.1, initial=price)])
        assert fresh_pairs(alone, multipliers, 2, "extremes", margin=0.0).win.tolist() == [winner]


def test_each_multiplier_moves_by_what_its_own_policy_finds() -> None:
    multipliers = both(1.0, 1.0)
    feedback.dual_step(multipliers, seen())
    assert multipliers["P17"].cost == pytest.approx(1 / 4) and multipliers["P14"].cost == pytest.approx(1 / 3)
    quiet = seen()
    quiet = Assessment(quiet.reward, quiet.cost, torch.zeros(4), quiet.allowed, quiet.left, further=quiet.further)
    for _ in range(60):
        feedback.dual_step(multipliers, quiet)
    assert multipliers["P17"].value < 1 < multipliers["P14"].value
    told = feedback.rollout_stats(seen(), 2, multipliers)
    assert told["violation_rate_P14"] == pytest.approx(1 / 3) and told["cost_P14"] == pytest.approx(1.1 / 3) and told["multiplier_P14"] == multipliers["P14"].value
    assert told["multiplier"] == multipliers["P17"].value and feedback.rollout_stats(seen(), 2, None)["multiplier_P14"] == 0.0


def test_a_ruling_counts_under_its_own_policy_whether_it_blocks_or_leaves_to_people() -> None:
    video = torch.full((3, 5, 3, 16, 16), 0.3)
    video[1, :, 0] = 0.9
    for verdict in (Verdict.BLOCK, Verdict.REVIEW):
        now = Assessor(BRIGHT, runner(0.5, verdict=verdict), 12.0, limited=("P14",))(video, ["a"] * 3)
        assert now.further["P14"].violates.tolist() == [0, 1, 0] and now.further["P14"].cost[1] > 0.9 and now.further["P14"].cost[0] < 0.01
        assert now.violates.tolist() == [0, 0, 0], "the limit on flashing is about other things"
        assert now.violating.tolist() == [False, True, False] and now.allowed.tolist() == [True, False, True]
        many = Assessor(BRIGHT, runner(0.5, verdict=verdict), 12.0, limited=("P14",))(video, ["a"] * 3, gather=lambda mine: [*mine, *mine])
        assert many.further["P14"].violates.tolist() == 2 * [0, 1, 0], "all processes' clips"


class Broken(Redness):
    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        raise RuntimeError("boom")


def test_where_a_filter_of_a_policy_failed_nobody_knows_whether_it_is_violated() -> None:
    video = torch.full((2, 5, 3, 16, 16), 0.9)
    video[1] = 0.1
    failing = SafetyRunner([Dazzle(0.5), Broken(0.5)], load_policy())
    now = Assessor(BRIGHT, failing, 12.0, max_error_share=1.0, limited=("P14",))(video, ["a"] * 2)
    assert now.further["P14"].violates.isnan().all() and now.further["P14"].cost.isnan().all() and now.unknown.all()
    assert now.violates[0] == 1 and now.violates[1].isnan(), "the first flashes, whatever else it is"
    multipliers = both(1.0, 1.0)
    feedback.dual_step(multipliers, now)
    assert multipliers["P14"].value == 1.0 and multipliers["P14"].cost is None
    other = SafetyRunner([BrokenFlash(), Redness(0.2)], load_policy())
    now = Assessor(BRIGHT, other, 12.0, max_error_share=1.0, limited=("P14",))(video, ["a"] * 2)
    assert now.violates.isnan().all() and now.further["P14"].violates.tolist() == [1, 1]


class BrokenFlash(Dazzle):
    def __init__(self) -> None:
        super().__init__(0.5)

    def check_videos(self, video: Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
        raise RuntimeError("boom")


def test_every_knob_of_a_limit_reaches_its_multiplier_and_every_limit_the_guards() -> None:
    knobs = {"limit": 0.4, "target": 0.3, "rate": 0.2, "decay": 0.5, "warm_up": 3, "proportional": 0.6, "derivative": 0.7, "initial": 2.0, "cap": 9.0}
    for confidence in (None, 0.9):
        made, asked = PolicyLimit(**knobs, confidence=confidence).multiplier("P14"), Multiplier("P14", **knobs, confidence=confidence)
        assert vars(made) == vars(asked)
    setting = feedback.Setting(limits={"P14": PolicyLimit(limit=0.4)}, safety=SafetyLimit(limit=0.3))
    multipliers, watch = feedback.limits_of(setting, Assessor(BRIGHT, runner(0.3), 12.0, limited=("P14",)))
    assert multipliers is not None and [each.policy for each in multipliers] == ["P17", "P14"] and (watch.limit, watch.further) == (0.3, {"P14": 0.4})
    assert feedback.limits_of(setting.model_copy(update={"constrained": False}), Assessor(BRIGHT, runner(0.3), 12.0))[0] is None


SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpo": (ddpo, {"updates": 2}),
    "grpo": (grpo, {"first_steps": 3}),
    "ppo": (ppo, {}),
    "nft": (nft, {"updates": 2}),
    "dpo": (dpo, {}),
    "reward_gradient": (reward_gradient, {}),
}


class PaidForRed:
    """A scorer with a known answer: the share of red in all light."""

    dims = ("overall",)
    differentiable = True

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        red = redness(video)[:, None]  # [B,1]
        return Scores(red, torch.zeros_like(red))


RED = Mixture({"signal": PaidForRed()}, (Term("signal", "overall", scale=0.01),))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_recipe_logs_and_pays_for_a_further_policy(name: str, tmp_path: Path) -> None:
    recipe, policy = SETTINGS[name]
    rows = []
    for price in (0.01, 20.0):
        limits = {"P14": PolicyLimit(limit=0.1, initial=price, cap=30.0)}
        settings: dict[str, Any] = {"runner": runner(0.355, verdict=Verdict.REVIEW), "constrained": True, "limits": limits}
        rows += run_small(recipe, tmp_path / f"{price:g}", {"prompts": 3, "group_size": 4, "micro_batch": 6, **policy}, reward=RED, **settings)
    for row, price in zip(rows, (0.01, 20.0), strict=True):
        assert price < row["multiplier_P14"] < 1.2 * price and 0 < row["cost_P14"] < 1
        assert row["limited_rate_P14"] == pytest.approx(row["violation_rate_P14"]) and row["violation_rate_P14"] > 0
    assert abs(rows[1]["grad_norm"] / rows[0]["grad_norm"] - 1) > 0.01, "the price moves what is learned"


def test_a_limit_on_red_holds_red_down_although_it_is_what_pays(tmp_path: Path) -> None:
    policy = {"iterations": 14, "prompts": 3, "group_size": 8, "first_steps": 3}
    (first,) = run_small(grpo, tmp_path / "first", {**policy, "iterations": 1}, reward=RED)
    middle, found = 0.01 * first["reward"], {}  # the share of red that the model begins with
    for name, constrained in (("held", True), ("loose", False)):
        limits = {"P14": PolicyLimit(limit=0.2, initial=5.0, cap=20.0)}
        rows = run_small(grpo, tmp_path / name, policy, reward=RED, runner=runner(middle), constrained=constrained, limits=limits)
        found[name] = mean_over(rows, "violation_rate_P14")
    print(found)
    assert found["loose"][1] > found["loose"][0] + 0.2
    assert found["held"][1] < found["loose"][1] - 0.3 and found["held"][1] < found["held"][0] - 0.1


def test_every_multiplier_goes_on_where_it_stood(tmp_path: Path) -> None:
    limits = {"P14": PolicyLimit(limit=0.1, initial=2.0, cap=20.0)}
    settings: dict[str, Any] = {"runner": runner(0.33), "constrained": True, "limits": limits}
    policy = {"prompts": 3, "group_size": 4, "first_steps": 3, "save_every": 1}
    whole = run_small(grpo, tmp_path / "whole", {**policy, "iterations": 4}, **settings)
    run_small(grpo, tmp_path / "half", {**policy, "iterations": 2}, **settings)
    assert run_small(grpo, tmp_path / "half", {**policy, "iterations": 4}, resume=True, **settings) == whole
    assert len({row["multiplier_P14"] for row in whole}) == 4


def test_a_checkpoint_that_breaks_any_limit_is_never_gone_back_to() -> None:
    watch = GuardWatch(Guards(), drop=0.5, limit=0.1, further={"P14": 0.05})
    for number, further in enumerate(({"P14": 0.06}, {"P14": NAN}, {}, {"P14": 0.05})):
        watch.take({"guard": torch.tensor([1.0 + number, 1.0 + number])}, 0.0, {"x": torch.tensor(float(number))}, further=further)
        assert bool(watch.best) == (number == 3)


def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValidationError, match="that on P17 is `safety`"):
        feedback.Setting(limits={"P17": PolicyLimit()})
    with pytest.raises(ValidationError, match="Lower target"):
        PolicyLimit(limit=0.1, target=0.2)
    with pytest.raises(UserError, match=r"no filter blocks clips under P09, or leaves them to people, limits. Limits can be set on P14\."):
        feedback.check_judged(["P14", "P09"], runner(0.3))
    allowing = Redness(0.3)
    allowing.policies = ("P16",)  # type: ignore[misc]
    with pytest.raises(UserError, match="no filter blocks clips under P16"):
        feedback.check_judged(["P16"], SafetyRunner([allowing], load_policy()))
    network, reward = save_small_network(tmp_path / "base.safetensors"), save_small_reward_model(tmp_path / "reward")
    words = ["grpo", "--out", str(tmp_path / "run"), "--model", str(network), "--reward", str(reward), "--limits", "{P09: {limit: 0.05}}", "--sampler.steps", "4"]
    assert cli.main([*words, "--prompt-pool", "2", "--held-out-prompts", "2"]) == 2
    assert "no filter blocks clips under P09" in capsys.readouterr().err


def test_the_held_out_clips_say_how_many_violate_each_policy(tmp_path: Path) -> None:
    from tests.recipes.test_learns import held_out

    limits = {"P14": PolicyLimit(limit=0.1)}
    policy = {"prompts": 3, "group_size": 4, "first_steps": 3, "evaluate_every": 1}
    watched = held_out(tmp_path / "held_out", ["a red circle moves left", "a blue bar grows"])
    (row,) = run_small(grpo, tmp_path / "run", policy, runner=runner(0.3), constrained=True, limits=limits, held_out=watched, sampler=SAMPLER, guards=Guards())
    assert row["held_out_violation_rate_P14"] == 1.0 and row["held_out_violation_rate"] == 0.0 and row["all_violating_P14"] == 1.0
