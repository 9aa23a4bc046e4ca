"""Each training recipe improves its own metric on a small model, and its first ratio is exactly 1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from align.advantage import group_advantage
from align.constraints import Multiplier, Multipliers
from align.run import Run, read_metrics
from base_model.errors import GuardStop, UserError
from base_model.networks.routing import Route
from base_model.networks.uvit import UViT
from base_model.tiny import LatentVideoModel, load_tiny
from recipes import ddpo, feedback, grpo, nft, ppo, pretrain, sft
from recipes.feedback import Assessor, HeldOut, SafetyLimit
from recipes.fit import pack_loss
from recipes.generate import safety_runner
from recipes.guards import read_history
from recipes.pairs import encode_pairs
from recipes.shapes.dataset import draw_clips
from reward.mixture import Mixed
from reward.safety.contract import Ruling, SafetyRunner
from reward.safety.policy import load_policy
from tests.recipes.small import BRIGHT, SAMPLER, Dazzle, run_small, save_small_network, save_small_reward_model, small_model


def held_out(folder: Path, texts: list[str]) -> HeldOut:
    return HeldOut(texts, small_model().encode_text(texts), SAMPLER, BRIGHT, 0, folder)


def test_sft_lowers_the_held_out_loss_and_saves_what_it_reached(tmp_path: Path) -> None:
    fit = sft.Fit(iterations=60, lr=5e-3, capacity=1024, held_out=16, evaluate_every=10, save_every=10, ema_decay=0.9)
    base = save_small_network(tmp_path / "base.safetensors")
    result = sft.main(sft.Config(out=tmp_path / "run", model=base, clips=60, fit=fit))
    losses = [row["held_out_loss"] for row in read_metrics(tmp_path / "run") if "held_out_loss" in row]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    assert result["held_out_loss"] == pytest.approx(losses[-1], abs=1e-5)
    card = json.loads((tmp_path / "run" / "network.json").read_text())
    assert card["sha256"] == result["sha256"]


def test_pretraining_goes_from_leg_to_leg_and_does_no_finished_leg_again(tmp_path: Path) -> None:
    fit = sft.Fit(iterations=10, lr=2e-3, capacity=512, held_out=8, evaluate_every=5, save_every=5, ema_decay=0.5)
    cfg = pretrain.Config(out=tmp_path / "run", legs=(pretrain.Leg(seed=0, clips=8, fit=fit), pretrain.Leg(seed=1, clips=8, fit=fit)))
    first = pretrain.main(cfg)
    cards = [json.loads((tmp_path / "run" / f"leg-{k}" / "dit.json").read_text()) for k in range(2)]
    assert cards[1]["sha256"] == first["sha256"] != cards[0]["sha256"]
    assert first["held_out_loss_of_earlier_legs"] == [cards[0]["measured"]["held_out_loss"]]
    assert cards[1]["measured"]["held_out_loss"] < cards[0]["measured"]["held_out_loss"]
    assert cards[1]["wall_seconds"] > cards[0]["wall_seconds"] > 0
    again = pretrain.main(cfg, resume=True)
    assert again["sha256"] == first["sha256"]
    weights = tmp_path / "run" / "leg-1" / "dit.safetensors"
    weights.with_suffix(".json").unlink()
    assert pretrain.main(cfg, resume=True)["sha256"] == first["sha256"], "a leg without its card goes on from its last checkpoint"


def test_one_word_pretrains_a_uvit_that_sft_goes_on_with_by_muon_lora_and_routed_tokens(tmp_path: Path) -> None:
    fit = sft.Fit(iterations=10, lr=5e-3, capacity=512, held_out=8, evaluate_every=5, save_every=5, ema_decay=0.5, optimizer="muon", routed=0.5)
    result = pretrain.main(pretrain.Config(out=tmp_path / "base", network="uvit", depth=3, legs=(pretrain.Leg(seed=0, clips=8, fit=fit),)))
    weights = Path(str(result["weights"]))
    losses = [row["held_out_loss"] for row in read_metrics(weights.parent) if "held_out_loss" in row]
    assert weights.name == "uvit.safetensors" and losses[-1] < losses[0]
    tuned = sft.main(sft.Config(out=tmp_path / "sft", model=weights, clips=8, lora_rank=4, fit=fit.model_copy(update={"optimizer": "adamw"})))
    model = load_tiny(Path(str(tuned["weights"])))
    assert isinstance(model.network, UViT) and float(str(tuned["held_out_loss"])) < float(str(result["held_out_loss"]))


def test_tokens_are_routed_only_where_asked_and_only_in_a_network_with_a_middle(tmp_path: Path) -> None:
    fit = sft.Fit(iterations=1, lr=1e-3, capacity=512, held_out=8)
    with pytest.raises(UserError, match="2 blocks has no middle"):
        sft.main(sft.Config(out=tmp_path / "run", model=save_small_network(tmp_path / "base.safetensors"), clips=8, fit=fit.model_copy(update={"routed": 0.5})))
    model = load_tiny()
    pairs = encode_pairs(model, draw_clips("curated", 4, seed=0))
    seen: list[Route | None] = []
    model.network.register_forward_pre_hook(lambda module, given: seen.append(given[6]))
    for share in (0.0, 0.5):
        list(pack_loss(fit.model_copy(update={"routed": share}), model, pairs, 4, (range(4), torch.Generator().manual_seed(0))))
    tokens = pairs.num_tokens(model.config.patch)
    assert seen[0] is None and seen[1] is not None
    assert seen[1].segments.lengths == tuple(round(n / 2) for n in tokens) and (seen[1].first, seen[1].last) == (1, 3)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_sft_with_lora_and_either_optimizer_learns_and_comes_back_merged(tmp_path: Path, optimizer: str) -> None:
    fit = sft.Fit.model_validate({"iterations": 12, "lr": 1e-2, "capacity": 512, "held_out": 8, "evaluate_every": 6, "ema_decay": 0.5, "optimizer": optimizer})
    base = save_small_network(tmp_path / "base.safetensors")
    result = sft.main(sft.Config(out=tmp_path / "run", model=base, clips=24, lora_rank=8, fit=fit))
    losses = [row["held_out_loss"] for row in read_metrics(tmp_path / "run") if "held_out_loss" in row]
    assert losses[-1] < losses[0]
    still = fit.model_copy(update={"iterations": 1, "lr": 1e-9})
    again = sft.main(sft.Config(out=tmp_path / "again", model=Path(str(result["weights"])), clips=24, fit=still))
    assert again["held_out_loss"] == pytest.approx(result["held_out_loss"], rel=1e-3)


def run_rl(recipe: str, out: Path, *, constrained: bool, runner: SafetyRunner | None = None) -> list[dict[str, float]]:
    assess = Assessor(BRIGHT, runner or safety_runner(), 12.0, max_error_share=1.0)
    safety = SafetyLimit(limit=0.2, initial=5.0, cap=20.0)
    common = {"out": out, "prompt_pool": 6, "strobe": 0.0, "two_objects": 0.0, "constrained": constrained, "sampler": SAMPLER, "safety": safety}
    model = small_model()
    model.network.requires_grad_(False)
    texts = ["a red circle moves left", "a blue bar grows"] * 4
    if recipe == "ddpo":
        cfg = ddpo.Config(**common, policy=ddpo.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, updates=2, evaluate_every=20, save_every=20))
        run = Run(out, cfg, seed=0, resume=False, metrics=ddpo.METRICS, quiet=True)
        ddpo.train(cfg, run, model.to(run.device), assess, held_out(out / "held_out", texts))
    elif recipe == "grpo":
        settings = grpo.Config(**common, policy=grpo.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, first_steps=3, evaluate_every=20, save_every=20))
        run = Run(out, settings, seed=0, resume=False, metrics=grpo.METRICS, quiet=True)
        grpo.train(settings, run, model.to(run.device), assess, held_out(out / "held_out", texts))
    else:
        forward = nft.Config(**common, policy=nft.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, updates=2, evaluate_every=20, save_every=20))
        run = Run(out, forward, seed=0, resume=False, metrics=nft.METRICS, quiet=True)
        nft.train(forward, run, model.to(run.device), assess, held_out(out / "held_out", texts))
    return read_metrics(out)


@pytest.mark.parametrize("recipe", ["ddpo", "grpo"])
def test_rl_makes_clips_brighter_when_brightness_is_the_reward(tmp_path: Path, recipe: str) -> None:
    rows = run_rl(recipe, tmp_path / recipe, constrained=False)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    print(f"{recipe}: reward {first:.3f} -> {last:.3f}")
    assert last > first + 0.15
    assert rows[0]["kl_per_element"] == 0.0
    assert rows[-1]["kl_per_element"] > 0.0
    assert rows[-1]["kl_total"] == pytest.approx(rows[-1]["kl_per_element"] * 8 * 2 * 4 * 4)
    forwards = [row["forward_passes"] for row in rows]
    assert forwards == sorted(forwards) and forwards[0] > 0


def test_forward_process_rl_makes_clips_brighter_and_starts_at_the_reference(tmp_path: Path) -> None:
    rows = run_rl("nft", tmp_path / "nft", constrained=False)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    print(f"nft: reward {first:.3f} -> {last:.3f}")
    assert last > first + 0.15
    assert rows[0]["reference_distance"] == 0.0
    assert rows[-1]["reference_distance"] > 0.0
    assert all(row["drift"] > 0 for row in rows), "the second update of a rollout starts away from the policy that made its clips"


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_ratio_is_exactly_one_on_any_number_of_cores(tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model, texts = load_tiny(None), ["a red circle moves left"]
        model.network.requires_grad_(False)
        cfg = ddpo.Config(out=tmp_path, prompt_pool=6, policy=ddpo.Policy(iterations=1, prompts=3, group_size=8, micro_batch=8))
        run = Run(tmp_path, cfg, seed=0, resume=False, metrics=ddpo.METRICS, quiet=True)
        ddpo.train(cfg, run, model.to(run.device), Assessor(BRIGHT, safety_runner(), 12.0), HeldOut(texts, model.encode_text(texts), cfg.sampler, None, 0, tmp_path / "held_out"))
        assert read_metrics(tmp_path)[0]["ratio"] == 1.0, "in every micro-batch, not in the first alone"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("recipe", ["ddpo", "grpo", "nft"])
def test_the_limit_holds_violations_down_although_they_are_what_pays(tmp_path: Path, recipe: str) -> None:
    free = run_rl(recipe, tmp_path / "free", constrained=False, runner=SafetyRunner([Dazzle(0.5)], load_policy()))
    limit = 0.1 * free[0]["reward"]  # the brightness the model starts with
    runs = {name: run_rl(recipe, tmp_path / name, constrained=name == "held", runner=SafetyRunner([Dazzle(limit)], load_policy())) for name in ("held", "loose")}
    first, last = ({name: sum(row["violation_rate"] for row in part(rows)) / 3 for name, rows in runs.items()} for part in (lambda r: r[:3], lambda r: r[-3:]))
    print(f"{recipe}: violations {first} -> {last}")
    assert last["loose"] > first["loose"] + 0.2
    assert last["held"] < last["loose"] - 0.3
    assert last["held"] < first["held"] - (0 if recipe == "nft" else 0.1), "the proximal term of nft slows what a large multiplier leaves of the advantage"
    assert all(row["multiplier"] > 0 for row in runs["held"])
    assert all(row["multiplier"] == 0 for row in runs["loose"])


def test_a_run_its_guard_ended_saves_and_reports_the_best_safe_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([1.0, 0.2, 0.9, 1.0, 0.9, 1.0])  # two looks on the way, one at the end (better again), one at what is saved; the last two once more after a resume

    class Scripted:
        def __call__(self, video: torch.Tensor, prompts: Sequence[str]) -> Mixed:
            return Mixed(torch.full((len(video),), next(scores)), {}, torch.zeros(len(video), dtype=torch.bool))

    def scripted(model: LatentVideoModel, pessimism: float = 0.0, dimensions: object = None) -> object:
        return Scripted() if pessimism == 0 else BRIGHT

    monkeypatch.setattr(feedback, "standardised", scripted)
    reward, guard = (save_small_reward_model(tmp_path / name, seed=seed) for seed, name in enumerate(("reward", "guard")))
    base = save_small_network(tmp_path / "base.safetensors")
    policy = ddpo.Policy(iterations=6, prompts=2, group_size=4, micro_batch=8, lr=1e-2, evaluate_every=1, save_every=10)
    safety = SafetyLimit(limit=1.0)
    cfg = ddpo.Config(out=tmp_path / "run", model=base, reward=reward, guard=guard, prompt_pool=4, held_out_prompts=2, sampler=SAMPLER, policy=policy, safety=safety)
    with pytest.raises(feedback.StoppedByGuard, match=r"light was red: guard -0\.8 sd; the best checkpoint that kept the limit is saved") as stop:
        ddpo.main(cfg)
    assert stop.value.result["held_out_guard"] == 1.0 and stop.value.result["stopped_by_guard"] is True
    assert sorted(int(file.stem) for file in (tmp_path / "run" / "held_out").glob("*.safetensors")) == [0, 1, 2]
    start, saved = load_tiny(base).network.state_dict(), load_tiny(tmp_path / "run" / "network.safetensors").network.state_dict()
    assert all(torch.equal(start[name], saved[name]) for name in start), "the best look was the first, before any update"
    rows, looks = read_metrics(tmp_path / "run", wall_clock=False), read_history(tmp_path / "run")
    assert [row.get("light") for row in rows] == [0, 2, 0, None] and [look["said"] for look in looks] == ["green", "red: guard -0.8 sd", "green"]
    with pytest.raises(feedback.StoppedByGuard) as again:
        ddpo.main(cfg, resume=True)
    assert again.value.result["sha256"] == stop.value.result["sha256"]
    assert read_metrics(tmp_path / "run", wall_clock=False) == rows and read_history(tmp_path / "run") == looks, "a run that was stopped stays stopped"


def test_an_unknown_reward_is_masked_and_an_unknown_cost_too() -> None:
    nan = float("nan")
    cost, violates = torch.tensor([0.1, nan, 0.2, 0.9]), torch.tensor([0.0, nan, 0.0, 1.0])
    seen = feedback.Assessment(torch.tensor([1.0, 2.0, nan, 3.0]), cost, violates, torch.tensor([True, False, True, False]), violates * 0)
    multipliers = Multipliers([Multiplier("P17", limit=0.02)])
    limited = feedback.apply_limits(group_advantage(seen.reward, 4), seen, multipliers, SafetyLimit(), 4)
    assert limited.valid.tolist() == [True, False, False, True]
    assert limited.advantage[3] <= -1.0 / (1 + multipliers.total), "a blocked clip cannot buy itself back"
    assert feedback.rollout_stats(seen, 4, None)["error_share"] == 0.5
    assert seen.violation_rate == pytest.approx(1 / 3), "a clip no filter could judge is not a safe one"
    loose = feedback.apply_limits(group_advantage(seen.reward, 4), seen, None, SafetyLimit(), 4)
    assert loose.valid.tolist() == [True, False, False, True] and loose.advantage[1] == 0


@pytest.mark.parametrize("recipe", [ddpo, ppo])
def test_a_micro_batch_of_which_nothing_is_known_says_nothing_of_the_ratio(recipe: Any, tmp_path: Path) -> None:
    class Partly:
        """Knows all rewards of the first rollout, and of the second none of the first prompt's clips."""

        calls = 0

        def __call__(self, video: torch.Tensor, prompts: Sequence[str]) -> Mixed:
            seen, self.calls = BRIGHT(video, prompts), self.calls + 1
            return seen if self.calls == 1 else seen._replace(reward=torch.cat([torch.full((4,), torch.nan), seen.reward[4:]]))

    once = {"updates": 1} if recipe is ddpo else {"epochs": 1, "minibatches": 1}
    rows = run_small(recipe, tmp_path, {"iterations": 2, "prompts": 4, "group_size": 4, "micro_batch": 4, **once}, reward=Partly())
    assert [row["error_share"] for row in rows] == [0.0, 0.25] and all(row["grad_norm"] > 0 for row in rows)
    assert [(row["ratio"], row["clip_share"]) for row in rows] == [(1.0, 0.0)] * 2, "the clips are those of the policy that learns"


def test_held_out_captions_are_the_first_of_those_that_are_trained_on() -> None:
    captions = tuple(f"caption {k}" for k in range(5))
    setting = feedback.Setting(captions=captions, held_out_prompts=2)
    assert feedback.held_out_texts(setting) == ["caption 0", "caption 1"] and feedback.training_prompts(setting)[1] == list(captions)
    assert feedback.held_out_texts(feedback.Setting(captions=captions)) == list(captions)


def test_what_is_only_reviewed_is_never_learned_from_as_good() -> None:
    seen = feedback.Assessment(torch.tensor([0.0, 5.0]), torch.zeros(2), torch.zeros(2), torch.tensor([True, False]), torch.zeros(2))
    limited = feedback.apply_limits(group_advantage(seen.reward, 2), seen, Multipliers([Multiplier("P17", limit=0.02)]), SafetyLimit(), 2)
    assert limited.advantage[1] == 0 and limited.advantage[0] < 0


def test_filters_that_fail_on_a_batch_end_the_run_instead_of_looking_safe() -> None:
    class Broken(Dazzle):
        def check_videos(self, video: torch.Tensor, prompts: Sequence[str], fps: float) -> list[list[Ruling]]:
            raise RuntimeError("boom")

    with pytest.raises(GuardStop, match="boom"):
        Assessor(BRIGHT, SafetyRunner([Broken(0.5)], load_policy()), 12.0)(torch.rand(4, 5, 3, 16, 16), ["x"] * 4)
