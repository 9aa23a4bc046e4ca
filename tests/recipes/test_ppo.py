"""`rushes ppo`: it learns, its critic knows what a prompt is worth, the KL is paid where it was asked for, and the passes are the formula's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes import ppo
from reward.mixture import Mixed, Mixture, Term
from reward.types import Scores
from tests.recipes.small import SAMPLER, Brightness, counting_model, dazzled, mean_over, run_small

STANDARD = Mixture({"signal": Brightness()}, (Term("signal", "overall", center=0.35, scale=0.05),))  # of the small model's clips about 0 and 1
SMALL = {"iterations": 12, "prompts": 3, "group_size": 8, "lr": 5e-3}


def test_it_makes_clips_brighter_when_brightness_is_the_reward(tmp_path: Path) -> None:
    rows = run_small(ppo, tmp_path, SMALL, reward=STANDARD)
    first, last = mean_over(rows, "reward")
    print(f"reward {first:.2f} -> {last:.2f}, nats a clip {rows[-1]['kl_total']:.2f}")
    assert last > first + 1.5
    assert rows[0]["kl_per_element"] == 0 and rows[0]["explained_variance"] == 0, "policy and SFT policy are one, and the critic says 0 of everything"
    assert rows[-1]["kl_per_element"] > 0 and rows[-1]["kl_total"] == pytest.approx(rows[-1]["kl_per_element"] * 8 * 2 * 4 * 4)
    assert all(row["clip_share"] > 0 for row in rows), "the second update of a rollout is away from the policy that made it"


def test_a_single_update_has_a_ratio_of_exactly_one(tmp_path: Path) -> None:
    row = run_small(ppo, tmp_path, {**SMALL, "iterations": 1, "epochs": 1, "minibatches": 1}, reward=STANDARD)[0]
    assert row["ratio"] == 1 and row["clip_share"] == 0 and row["grad_norm"] > 0


class Tidings:
    """Pays for the prompt, and a little for what is on screen."""

    dims, differentiable = ("overall",), False

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        worth = torch.tensor([float(len(prompt) % 2) for prompt in prompts]) * 2 - 1 + 0.5 * (video.flatten(1).mean(1) - 0.35)
        return Scores(worth[:, None], torch.zeros(len(video), 1))


def test_the_critic_learns_what_a_prompt_is_worth_from_states_that_are_still_noise(tmp_path: Path) -> None:
    reward = Mixture({"tidings": Tidings()}, (Term("tidings", "overall"),))
    rows = run_small(ppo, tmp_path, {**SMALL, "iterations": 9, "prompts": 6, "lr": 1e-6, "critic_lr": 3e-3}, reward=reward)
    told = [round(row["explained_variance"], 2) for row in rows]
    print("explained variance:", told, "loss:", rows[0]["value_loss"], rows[-1]["value_loss"])
    assert told[0] == 0 and told[-1] > 0.9
    assert rows[-1]["value_loss"] < 0.2 * rows[0]["value_loss"]


@pytest.mark.parametrize("window", [1, 0])
def test_the_kl_holds_the_policy_back_wherever_it_is_paid_for(window: int, tmp_path: Path) -> None:
    """With a window of one step nothing but the log-ratio of the very step that was taken can tell a policy gradient of its KL."""
    prices: dict[str, dict[str, Any]] = {"free": {"kl_coef": 0.0}, "loss": {"kl_coef": 30.0}, "reward": {"kl_coef": 300.0, "kl_in": "reward"}}
    rows = {name: run_small(ppo, tmp_path / name, {**SMALL, "window": window, "iterations": 7, **price}, reward=STANDARD) for name, price in prices.items()}
    far = {name: mean_over(found, "kl_total")[1] for name, found in rows.items()}
    print("nats a clip:", far, "what it costs:", {name: found[-1]["kl_penalty"] for name, found in rows.items()})
    assert far["loss"] < 0.3 * far["free"] and far["reward"] < 0.3 * far["free"]
    assert rows["reward"][-1]["kl_penalty"] == pytest.approx(300 * rows["reward"][-1]["kl_per_element"], rel=1e-4)


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (3.0, 2)])
def test_a_clip_takes_k_passes_and_w_of_the_reference_and_w_an_epoch(guidance: float, passes: int, tmp_path: Path) -> None:
    model, sampler = counting_model(), SAMPLER.model_copy(update={"steps": 6, "guidance": guidance})
    policy = {"iterations": 3, "prompts": 3, "group_size": 4, "micro_batch": 5, "window": 2, "epochs": 3, "minibatches": 2}
    rows = run_small(ppo, tmp_path, policy, reward=STANDARD, model=model, sampler=sampler)
    totals = [row["forward_passes"] for row in rows]
    print(model.counted, totals)
    each = 12 * passes * (6 + 2 + 3 * 2)
    assert [totals[1] - totals[0], totals[2] - totals[1]] == [each, each]
    check = {"trained": 5, "asked": 5 + 3}  # of the first micro-batch: its KL has a gradient, its ratio is 1 as a whole and in part
    assert totals[0] == each + passes * sum(check.values())
    assert model.counted == {"trained": passes * (3 * 12 * 3 * 2 + check["trained"]), "asked": passes * (3 * 12 * (6 + 2) + check["asked"])}


def test_a_rollout_of_which_nothing_is_known_has_no_gradient_and_says_so(tmp_path: Path) -> None:
    class Once:
        """Knows the first rollout's rewards and no other."""

        calls = 0

        def __call__(self, video: Tensor, prompts: tuple[str, ...]) -> Mixed:
            self.calls += 1
            seen = STANDARD(video, prompts)
            return seen if self.calls == 1 else Mixed(torch.full((len(video),), torch.nan), {}, torch.zeros(len(video), dtype=torch.bool))

    rows = run_small(ppo, tmp_path, {**SMALL, "iterations": 2}, reward=Once())
    assert rows[0]["grad_norm"] > 0 and rows[0]["error_share"] == 0
    assert rows[1]["grad_norm"] == 0 and rows[1]["value_loss"] is None and rows[1]["ratio"] is None and rows[1]["explained_variance"] is None and rows[1]["error_share"] == 1


def test_the_limit_holds_violations_down_although_they_are_what_pays(tmp_path: Path) -> None:
    limit = 0.35  # the brightness the model starts with
    runs = {name: run_small(ppo, tmp_path / name, SMALL, reward=STANDARD, runner=dazzled(limit), constrained=name == "held") for name in ("held", "loose")}
    rates = {name: mean_over(rows, "violation_rate") for name, rows in runs.items()}
    print("violations, first and last:", rates)
    assert rates["loose"][1] > rates["loose"][0] + 0.2
    assert rates["held"][1] < rates["loose"][1] - 0.3 and rates["held"][1] < rates["held"][0]
    assert all(row["multiplier"] > 0 for row in runs["held"])
