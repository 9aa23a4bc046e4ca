"""`rushes reward-gradient`: every method climbs, what is not differentiable is refused, what is not allowed is never made better, and the passes are the formula's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base_model.errors import GuardStop, UserError
from recipes import reward_gradient
from reward.latent import LatentMixture
from reward.mixture import Mixture, Term
from reward.types import Scores
from tests.recipes.small import SAMPLER, Brightness, counting_model, dazzled, mean_over, run_small

SMALL = {"iterations": 12, "prompts": 3, "group_size": 4}


@pytest.mark.parametrize("method", ["draft", "alignprop", "refl", "vader"])
def test_every_method_makes_clips_brighter_when_brightness_is_the_reward(method: str, tmp_path: Path) -> None:
    rows = run_small(reward_gradient, tmp_path, {**SMALL, "method": method, "last_steps": 2, "late_share": 0.5})
    first, last = mean_over(rows, "reward")
    drawn = [row["differentiated"] for row in rows]
    print(f"{method}: reward {first:.2f} -> {last:.2f}, differentiated {drawn}")
    assert last > first + 1.5
    assert rows[0]["reference_distance"] == 0 < rows[-1]["reference_distance"]
    assert set(drawn) == {"draft": {2}, "alignprop": {1, 2, 3, 4}, "refl": {2, 3}, "vader": {1}}[method]
    assert all(row["learned_share"] == 1 for row in rows)
    whole = [row["optimised_reward"] == pytest.approx(row["reward"], rel=1e-5) for row in rows]
    assert not any(whole) if method == "vader" else all(whole), "vader scores a few frames"


def test_a_hinge_asks_nothing_more_of_a_clip_that_is_good_enough(tmp_path: Path) -> None:
    rows = run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 4, "hinge": 2.0})
    assert rows[0]["reward"] > 2 and all(row["grad_norm"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("policy", "sampled"),
    [
        ({"method": "draft", "last_steps": 3}, 6 + 3),
        ({"method": "draft", "last_steps": 3, "checkpointed": False}, 6),
        ({"method": "vader"}, 6 + 1),
        ({"method": "refl", "late_share": 1 / 6}, 6 + 1),
    ],
    ids=str,
)
def test_a_clip_takes_k_passes_and_those_with_a_gradient_once_more(policy: dict[str, Any], sampled: int, tmp_path: Path) -> None:
    model, sampler = counting_model(), SAMPLER.model_copy(update={"steps": 6})
    rows = run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 2, **policy}, model=model, sampler=sampler)
    each, check = 12 * (sampled + 1 + 1), 12 * 3  # when noised one of the SFT network and one to train; before the first update policy and reference, and a gradient
    assert [row["forward_passes"] for row in rows] == [check + each, check + 2 * each]
    assert model.counted.total() == check + 2 * each


def test_checkpointing_changes_no_bit_of_what_is_learned(tmp_path: Path) -> None:
    rows = [run_small(reward_gradient, tmp_path / str(on), {**SMALL, "iterations": 2, "last_steps": 3, "checkpointed": on}) for on in (True, False)]
    counted = {"forward_passes": 0, "forward_equivalents": 0}
    assert [row | counted for row in rows[0]] == [row | counted for row in rows[1]]


def test_the_limit_holds_violations_down_although_they_are_what_pays_and_the_gate_alone_would_not(tmp_path: Path) -> None:
    limit = 0.344  # the brightness the model starts with
    policy = {**SMALL, "iterations": 14, "group_size": 8}
    told = {"held": ({}, True), "gate alone": ({"cost_weight": 1e-9}, True), "loose": ({}, False)}
    runs = {name: run_small(reward_gradient, tmp_path / name, {**policy, **more}, runner=dazzled(limit), constrained=bound) for name, (more, bound) in told.items()}
    rates = {name: mean_over(rows, "violation_rate") for name, rows in runs.items()}
    print("violations, first and last:", rates)
    assert rates["loose"][1] > rates["loose"][0] + 0.2
    assert rates["held"][1] < rates["loose"][1] - 0.3 and rates["held"][1] < rates["held"][0]
    assert rates["gate alone"][1] > 0.9, "it stops clips behind the limit and brings none back"
    assert all(row["multiplier"] > 0 for row in runs["held"])


def test_what_the_filters_do_not_allow_gets_no_reward_gradient(tmp_path: Path) -> None:
    rows = run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 3, "cost_weight": 1e-9}, runner=dazzled(0.0), constrained=True)
    assert all(row["learned_share"] == 0 and row["optimised_reward"] is None and row["grad_norm"] < 1e-6 for row in rows)
    assert all(row["violation_rate"] == 1 for row in rows)


class Scoring:
    """Brightness with a fault."""

    dims = ("overall",)

    def __init__(self, *, differentiable: bool, known: bool = True, detached: bool = False) -> None:
        self.differentiable, self.known, self.detached = differentiable, known, detached

    def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
        seen = Brightness()(video.detach() if self.detached else video, prompts)
        return seen if self.known else Scores(seen.mean * float("nan"), seen.spread)


def only(scorer: Scoring) -> Mixture:
    return Mixture({"signal": scorer}, (Term("signal", "overall", scale=0.1),))


def test_scorers_that_are_not_differentiable_are_refused_in_one_line(tmp_path: Path) -> None:
    for reward, says in (
        (only(Scoring(differentiable=False)), "signal is not differentiable"),
        (only(Scoring(differentiable=True, detached=True)), "reward carries no gradient"),
        (LatentMixture.__new__(LatentMixture), "a latent reward reads the network that trains here"),
    ):
        out = tmp_path / says.replace(" ", "-")
        with pytest.raises(UserError, match=says) as caught:
            run_small(reward_gradient, out, SMALL, reward=reward)
        assert "\n" not in str(caught.value)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run would stop at before its first update is let pass, as later ones are."""
    monkeypatch.setattr(reward_gradient.selfcheck, "known_rewards", lambda reward: 1.0)
    monkeypatch.setattr(reward_gradient.selfcheck, "reward_spread", lambda reward, groups: 1.0)


def test_a_first_rollout_without_rewards_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(GuardStop, match="0% of 12 rewards are known"):
        run_small(reward_gradient, tmp_path, SMALL, reward=only(Scoring(differentiable=True, known=False)))


@pytest.mark.usefixtures("unchecked")
def test_unknown_rewards_move_nothing(tmp_path: Path) -> None:
    rows = run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 2}, reward=only(Scoring(differentiable=True, known=False)))
    assert all(row["learned_share"] == 0 and row["reward"] is None and row["grad_norm"] == 0 and row["error_share"] == 1 for row in rows)


@pytest.mark.usefixtures("unchecked")
def test_a_clip_whose_score_is_nan_by_arithmetic_leaves_the_others_their_gradient(tmp_path: Path) -> None:
    class Half(Scoring):
        def __call__(self, video: Tensor, prompts: Sequence[str]) -> Scores:
            seen, mean = Brightness()(video, prompts), video.flatten(1).mean(1)  # [B]
            return Scores(seen.mean + (mean - 0.344).sqrt().mul(0)[:, None], seen.spread)

    rows = run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 3}, reward=only(Half(differentiable=True)))
    assert all(0 < row["learned_share"] < 1 and row["grad_norm"] > 0 for row in rows[:2])


def test_it_holds_the_velocity_near_that_of_the_sft_policy_where_asked(tmp_path: Path) -> None:
    far = {coef: run_small(reward_gradient, tmp_path / str(coef), {**SMALL, "iterations": 8, "kl_coef": coef})[-1]["reference_distance"] for coef in (0.0, 100.0)}
    print(far)
    assert far[100.0] < 0.1 * far[0.0]


def test_the_clips_it_noises_are_those_it_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repulsion's target is the velocity of the finished clip: with nothing learned its error against the policy's own velocity is that of flow matching, and small."""
    seen: list[Tensor] = []
    noised = reward_gradient.noised

    def noting(p: Any, model: Any, rows: Tensor, cond: Any, x0: Tensor, generator: Any, frames: Any) -> Any:
        part = noised(p, model, rows, cond, x0, generator, frames)
        back, _ = model.path.split(part.x_t, part.target, part.t)
        seen.append((back - x0.detach()).abs().max())
        assert not part.x_t.requires_grad and part.shown.requires_grad and part.shown.shape[2] == 1
        return part

    monkeypatch.setattr(reward_gradient, "noised", noting)
    run_small(reward_gradient, tmp_path, {**SMALL, "iterations": 1, "method": "vader", "micro_batch": 5})
    assert len(seen) == 3 and float(torch.stack(seen).max()) < 1e-5
