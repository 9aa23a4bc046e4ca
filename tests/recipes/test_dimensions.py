"""A reward of several dimensions: weighed and added, or compared one by one within the group (GDPO)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.run import read_metrics
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from recipes import feedback, grpo
from recipes.cli import main
from recipes.feedback import Assessor, people_terms
from recipes.generate import safety_runner
from reward.matcher import Matcher
from reward.mixture import Mixture
from reward.model import RewardModel, save_reward_model
from reward.quality import Quality
from reward.types import Scores
from tests.recipes.small import mean_over, run_small, save_small_network

WEIGHTS = {"bright": 2.0, "loud": 1.0}


class Two:
    """Brightness, and a thousand times darkness."""

    dims = ("bright", "loud", "unasked")
    differentiable = True
    center, scale = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([0.1, 2.0, 1.0])

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        mean = video.flatten(1).mean(1)  # [B]
        mean = torch.stack([mean, -1000 * mean, mean], 1)  # [B,3]
        return Scores(mean, torch.full_like(mean, 0.25))


def mixture(**weights: float) -> Mixture:
    raw = SimpleNamespace(dims=Two.dims, center=torch.zeros(3), scale=torch.ones(3))
    return Mixture({"people": Two()}, people_terms(raw, 0.0, weights))  # type: ignore[arg-type]


def test_each_dimension_is_standardised_before_it_is_weighed() -> None:
    video = torch.rand(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = video.flatten(1).double().mean(1)  # [3]
    bright, loud = (mean - 0.5 * 0.25 - 0.5) / 0.1, (-1000 * mean - 0.5 * 0.25 + 1.0) / 2.0
    found = Mixture({"people": Two()}, people_terms(Two(), 0.5, WEIGHTS))(video, ["a"] * 3)  # type: ignore[arg-type]
    assert found.reward.tolist() == pytest.approx((2 * bright + loud).tolist(), rel=1e-4)
    first = Mixture({"people": Two()}, people_terms(Two(), 0.5, None))(video, ["a"] * 3)  # type: ignore[arg-type]
    assert first.reward.tolist() == pytest.approx(bright.tolist(), rel=1e-4), "nothing asked for is the first dimension"


def test_what_a_reward_has_not_is_named_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^the reward has no dimension colour, sound, dimensions\. Choose from bright, loud, unasked$"):
        people_terms(Two(), 0.0, {"sound": 1.0, "bright": 1.0, "colour": 1.0})  # type: ignore[arg-type]


def test_several_dimensions_are_told_apart_also_where_processes_share_the_clips() -> None:
    video = torch.rand(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assess = Assessor(mixture(**WEIGHTS), safety_runner(), 12.0, dimensions=tuple(WEIGHTS))
    whole = assess(video, ["a"] * 4)
    assert list(whole.parts) == ["bright", "loud"] and torch.equal(whole.reward, 2 * whole.parts["bright"] + whole.parts["loud"])
    kept: list[list[Any]] = []
    assess(video[2:], ["a"] * 2, gather=lambda items: kept.append(list(items)) or kept[-1])
    others = iter(kept)
    both = assess(video[:2], ["a"] * 2, gather=lambda items: [*items, *next(others)])
    assert torch.equal(both.reward, whole.reward) and all(torch.equal(both.parts[name], whole.parts[name]) for name in WEIGHTS)
    told = feedback.rollout_stats(whole, 4, None)
    assert told["reward_bright"] == pytest.approx(float(video.mean()), rel=1e-5) and told["reward_loud"] == pytest.approx(-1000 * float(video.mean()), rel=1e-5)
    assert Assessor(mixture(**WEIGHTS), safety_runner(), 12.0)(video, ["a"] * 4).parts == {}
    assert feedback.told_apart(grpo.Config(dimensions={"bright": 3.0})) == (), "one alone is the reward"


def test_by_gdpo_a_dimension_counts_by_its_weight_and_in_a_sum_by_its_spread(tmp_path: Path) -> None:
    policy = {"iterations": 12, "prompts": 3, "group_size": 4}
    rows = {
        how: run_small(grpo, tmp_path / how, {**policy, "divide_by": how}, reward=mixture(**WEIGHTS), dimensions=WEIGHTS) for how in ("group_std", "gdpo")
    }
    (before, summed), (start, apart) = (mean_over(rows[how], "reward_bright") for how in ("group_std", "gdpo"))
    print(f"brightness: in a sum {before:.3f} -> {summed:.3f}, by GDPO {start:.3f} -> {apart:.3f}")
    assert summed < before - 0.01 and apart > start + 0.01
    assert rows["gdpo"][0]["reward"] == pytest.approx(2 * rows["gdpo"][0]["reward_bright"] + rows["gdpo"][0]["reward_loud"], rel=1e-5)


@pytest.mark.parametrize("words", [["--dimensions", "{overall: 0.0}"], ["--policy.divide_by", "gdpo"], ["--policy.divide_by", "gdpo", "--dimensions", "{overall: 1}"]])
def test_weights_that_say_nothing_are_refused_before_anything_is_loaded(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grpo", "--out", str(tmp_path / "run"), *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "dimensions" in told and not (tmp_path / "run").exists()


def test_a_reward_model_s_dimensions_are_weighed_by_name_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = RewardModel(Matcher(), Quality(), ("look", "motion"), TextEncoder())
    with torch.no_grad():
        model.head.weight[1].uniform_(-1, 1)
    save_reward_model(tmp_path / "reward", model, {})
    words = ["grpo", "--out", str(tmp_path / "run"), "--model", str(save_small_network(tmp_path / "network.safetensors")), "--reward", str(tmp_path / "reward")]
    small = ["--policy.iterations", "1", "--policy.prompts", "2", "--policy.group_size", "3", "--policy.first_steps", "1", "--held_out_prompts", "2", "--prompt_pool", "4"]
    clips = ["--sampler", "{steps: 2, frames: 5, height: 16, width: 16}"]
    assert main([*words, *small, *clips, "--dimensions", "{motion: 1, look: -0.5}", "--policy.divide_by", "gdpo"]) == 0
    (row,) = [row for row in read_metrics(tmp_path / "run") if row.get("reward") is not None]
    assert row["reward"] == pytest.approx(row["reward_motion"] - 0.5 * row["reward_look"], rel=1e-4) and row["reward_motion"] != pytest.approx(row["reward_look"])
    capsys.readouterr()
    assert main([*words[:2], str(tmp_path / "other"), *words[3:], *small, *clips, "--dimensions", "{sound: 1}"]) == 2
    assert "the reward has no dimension sound, dimensions. Choose from look, motion" in capsys.readouterr().err
