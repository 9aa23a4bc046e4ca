"""Each training recipe improves its own metric on a small model, and its first ratio is exactly 1."""

import json
from pathlib import Path

import pytest
import torch

from align.run import Run, read_metrics
from recipes import ddpo, feedback, grpo, nft, pretrain, sft
from recipes.feedback import Assessor, HeldOut, SafetyLimit
from recipes.generate import Sampler, safety_runner
from reward.mixture import Mixture, Term
from tests.recipes.small import Brightness, save_small_network, small_model

SAMPLER = Sampler(steps=4, frames=5, height=16, width=16)
BRIGHT = Mixture({"signal": Brightness()}, (Term("signal", "overall", scale=0.1),))


def held_out(folder: Path, texts: list[str]) -> HeldOut:
    return HeldOut(texts, small_model().encode_text(texts), SAMPLER, BRIGHT, folder)


def test_sft_lowers_the_held_out_loss_and_saves_what_it_reached(tmp_path: Path) -> None:
    fit = sft.Fit(iterations=60, lr=5e-3, capacity=1024, held_out=16, evaluate_every=10, save_every=10, ema_decay=0.9)
    base = save_small_network(tmp_path / "base.safetensors")
    result = sft.main(sft.Config(out=tmp_path / "run", base=base, clips=60, fit=fit))
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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_sft_with_lora_and_either_optimizer_learns_and_comes_back_merged(tmp_path: Path, optimizer: str) -> None:
    fit = sft.Fit.model_validate({"iterations": 12, "lr": 1e-2, "capacity": 512, "held_out": 8, "evaluate_every": 6, "ema_decay": 0.5, "optimizer": optimizer})
    base = save_small_network(tmp_path / "base.safetensors")
    result = sft.main(sft.Config(out=tmp_path / "run", base=base, clips=24, lora_rank=8, fit=fit))
    losses = [row["held_out_loss"] for row in read_metrics(tmp_path / "run") if "held_out_loss" in row]
    assert losses[-1] < losses[0]
    still = fit.model_copy(update={"iterations": 1, "lr": 1e-9})
    again = sft.main(sft.Config(out=tmp_path / "again", base=Path(str(result["weights"])), clips=24, fit=still))
    assert again["held_out_loss"] == pytest.approx(result["held_out_loss"], rel=1e-3)


def run_rl(recipe: str, out: Path, *, constrained: bool) -> list[dict[str, float]]:
    common = {"out": out, "prompt_pool": 6, "strobe": 0.0, "two_objects": 0.0, "constrained": constrained, "sampler": SAMPLER, "safety": SafetyLimit(limit=0.5)}
    model = small_model()
    model.network.requires_grad_(False)
    texts = ["a red circle moves left", "a blue square grows"] * 4
    if recipe == "ddpo":
        cfg = ddpo.Config(**common, policy=ddpo.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, updates=2, evaluate_every=20, save_every=20))
        run = Run(out, cfg, seed=0, resume=False, metrics=ddpo.METRICS, quiet=True)
        ddpo.train(cfg, run, model, Assessor(BRIGHT, safety_runner(), 12.0, max_error_share=1.0), held_out(out / "held_out", texts))
    elif recipe == "grpo":
        settings = grpo.Config(**common, policy=grpo.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, first_steps=3, evaluate_every=20, save_every=20))
        run = Run(out, settings, seed=0, resume=False, metrics=grpo.METRICS, quiet=True)
        grpo.train(settings, run, model, Assessor(BRIGHT, safety_runner(), 12.0, max_error_share=1.0), held_out(out / "held_out", texts))
    else:
        forward = nft.Config(**common, policy=nft.Policy(iterations=14, prompts=3, group_size=8, micro_batch=12, lr=1e-2, updates=2, evaluate_every=20, save_every=20))
        run = Run(out, forward, seed=0, resume=False, metrics=nft.METRICS, quiet=True)
        nft.train(forward, run, model, Assessor(BRIGHT, safety_runner(), 12.0, max_error_share=1.0), held_out(out / "held_out", texts))
    return read_metrics(out)


@pytest.mark.parametrize("recipe", ["ddpo", "grpo"])
def test_rl_makes_clips_brighter_when_brightness_is_the_reward(tmp_path: Path, recipe: str) -> None:
    rows = run_rl(recipe, tmp_path / recipe, constrained=False)
    first, last = (sum(row["reward"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    print(f"{recipe}: reward {first:.3f} -> {last:.3f}")
    assert last > first + 0.15
    assert rows[0]["kl_per_element"] == 0.0
    assert rows[-1]["kl_per_element"] > 0.0
    assert rows[-1]["kl_total"] == pytest.approx(rows[-1]["kl_per_element"] * 16 * 2 * 4 * 4)
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


def test_a_constrained_run_logs_its_multiplier_and_an_unconstrained_one_has_none(tmp_path: Path) -> None:
    rows = run_rl("ddpo", tmp_path / "with", constrained=True)
    assert all(row["multiplier"] > 0 for row in rows)
    assert all(row["multiplier"] == 0 for row in run_rl("ddpo", tmp_path / "without", constrained=False)[:1])


def test_the_guard_stops_a_run_it_sees_falling_and_remembers_the_best_safe_checkpoint() -> None:
    watch = feedback.GuardWatch(drop=0.5, limit=0.02)
    adapters = [{"a": torch.full((1,), float(k))} for k in range(4)]
    assert not watch.fell(1.0, 0.01, adapters[0])
    assert not watch.fell(2.0, 0.30, adapters[1]), "better, but it violates the limit: not remembered"
    assert not watch.fell(1.2, 0.00, adapters[2])
    assert watch.fell(0.6, 0.00, adapters[3])
    assert watch.best["a"].item() == 2.0
    restored = feedback.GuardWatch(drop=0.5, limit=0.02)
    restored.load_state_dict(watch.state_dict())
    assert restored.best_guard == 1.2 and restored.best["a"].item() == 2.0


def test_an_unknown_reward_is_masked_and_an_unknown_cost_too() -> None:
    from align.advantage import group_advantage
    from align.constraints import Multiplier

    nan = float("nan")
    seen = feedback.Assessment(torch.tensor([1.0, 2.0, nan, 3.0]), torch.tensor([0.1, nan, 0.2, 0.9]), torch.tensor([False, False, False, True]))
    limited = feedback.apply_limits(group_advantage(seen.reward, 4), seen, Multiplier("P17", limit=0.02), SafetyLimit(), 4)
    assert limited.valid.tolist() == [True, False, False, True]
    assert limited.advantage[3] <= -1.0, "a blocked clip cannot buy itself back"
    assert feedback.rollout_stats(seen, 4, None)["error_share"] == 0.5
