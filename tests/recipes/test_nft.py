"""`rushes nft`: its relatives by a word, and the policy that makes clips and follows slowly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from align.run import Run
from base_model.lora import adapter_state
from base_model.types import Conditioning
from recipes import nft
from tests.recipes.small import SAMPLER, Counting, counting_model, dazzled, mean_over, run_small

SMALL = {"iterations": 12, "prompts": 3, "group_size": 8, "updates": 2}


@pytest.mark.parametrize("method", ["adaptive", "awm", "dgpo", "rwr"])
def test_every_relative_makes_clips_brighter_when_brightness_is_the_reward(method: str, tmp_path: Path) -> None:
    rows = run_small(nft, tmp_path, {**SMALL, "method": method})
    first, last = mean_over(rows, "reward")
    print(f"{method}: reward {first:.2f} -> {last:.2f}, drift {rows[-1]['drift']:.4f}")
    assert last > first + 0.4
    assert rows[0]["reference_distance"] == 0 < rows[-1]["reference_distance"]


def test_the_first_update_of_awm_is_that_of_nft_and_of_dgpo_half_of_it(tmp_path: Path) -> None:
    """align/README.md's table, seen from the recipe: at the policy that made the clips they share their gradient, up to a factor."""
    policy = {**SMALL, "iterations": 1, "updates": 1}
    norm = {method: run_small(nft, tmp_path / method, {**policy, "method": method})[0]["grad_norm"] for method in ("nft", "awm")}
    assert norm["awm"] == pytest.approx(norm["nft"], rel=1e-4)


class Watching(Counting):
    """Keeps the noise levels and states that are trained on."""

    seen: list[tuple[Tensor, Tensor]]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append((t, x_t))
        return super().__call__(x_t, t, cond)


@pytest.mark.parametrize("method", ["nft", "dgpo"])
def test_only_dgpo_noises_the_clips_of_a_prompt_alike(method: str, tmp_path: Path) -> None:
    model = counting_model()
    watching = Watching(model.network, model.codec, model.text, model.config)
    watching.seen = []
    rows = run_small(nft, tmp_path, {**SMALL, "iterations": 1, "updates": 1, "method": method, "micro_batch": 20}, model=watching)
    (checked, _), *learned = watching.seen
    assert len(checked) == (16 // 8 if method == "dgpo" else 3), "before the first update every eighth of the first micro-batch is asked"
    assert sorted(len(t) for t, _ in learned) == ([8, 16] if method == "dgpo" else [4, 20]), "whole groups go through the network together"
    for t, _ in learned:
        assert (t.reshape(-1, 4).std(1) == 0).all() == (method == "dgpo")
    assert rows[0]["grad_norm"] > 0


@pytest.mark.parametrize(("policy", "asked"), [({"updates": 1}, 0), ({"updates": 3}, 2), ({"updates": 3, "kl_coef": 0.1}, 2 + 3), ({"updates": 3, "old_rate": 0.1}, 3)])
def test_a_clip_takes_k_passes_and_one_to_train_an_update_and_one_more_where_the_policy_has_moved(policy: dict[str, Any], asked: int, tmp_path: Path) -> None:
    model, sampler = counting_model(), SAMPLER.model_copy(update={"steps": 6})
    rows = run_small(nft, tmp_path, {**SMALL, "iterations": 2, **policy}, model=model, sampler=sampler)
    eighth, updates = 2, policy["updates"]  # two are every eighth of the first micro-batch of 12
    assert model.counted == {"asked": 2 * 24 * (6 + asked) + (2 * 2 + 2) * eighth, "trained": 2 * 24 * updates + eighth}
    assert rows[1]["forward_passes"] == model.counted.total() and rows[1]["reference_distance"] > 0


def test_rwr_imitates_nothing_the_filters_block(tmp_path: Path) -> None:
    rows = run_small(nft, tmp_path, {**SMALL, "iterations": 3, "method": "rwr"}, runner=dazzled(0.0), constrained=True)
    assert all(row["violation_rate"] == 1 and row["grad_norm"] == 0 for row in rows)
    held = mean_over(run_small(nft, tmp_path / "held", {**SMALL, "method": "rwr"}, runner=dazzled(0.35), constrained=True), "violation_rate")
    loose = mean_over(run_small(nft, tmp_path / "loose", {**SMALL, "method": "rwr"}, runner=dazzled(0.35)), "violation_rate")
    print("violations, first and last:", held, loose)
    assert held[1] < loose[1] - 0.3


def test_clips_are_made_by_a_policy_that_follows_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """decay 0, then 0.5, 0.9, 0.9: what made the clips is recomputed from the trained adapters that were seen after each rollout."""
    networks: list[Any] = []
    trained: list[dict[str, Tensor]] = []
    old: list[dict[str, Tensor]] = []
    step = Run.step

    def stepping(self: Run, optimizer: Any, *more: Any) -> float:
        norm = step(self, optimizer, *more)
        trained.append({name: tensor.clone() for name, tensor in adapter_state(networks[0]).items()})
        return norm

    def watched(*told: Any, **more: Any) -> Any:
        network = add_lora(*told, **more)
        networks.append(network)
        return network

    def rolled(*told: Any) -> Any:
        old.append({name: tensor.clone() for name, tensor in adapter_state(networks[0], "old").items()})
        assert networks[0].active_adapter == "old"
        return roll_out(*told)

    add_lora, roll_out = nft.add_lora, nft.feedback.roll_out_clean
    monkeypatch.setattr(nft, "add_lora", watched)
    monkeypatch.setattr(nft.feedback, "roll_out_clean", rolled)
    monkeypatch.setattr(Run, "step", stepping)
    rows = run_small(nft, tmp_path, {**SMALL, "iterations": 4, "updates": 1, "micro_batch": 24, "old_rate": 0.5, "old_largest": 0.9})
    want = old[0]
    for decay, now, found in zip((0.0, 0.5, 0.9), trained, old[1:], strict=False):
        want = {name: decay * tensor + (1 - decay) * now[name] for name, tensor in want.items()}
        assert all(torch.allclose(found[name], want[name], atol=1e-7) for name in want)
        assert any(not torch.equal(found[name], now[name]) for name in want) == (decay > 0)
    assert networks[0].active_adapter == "default"
    assert rows[0]["drift"] == 0 and rows[1]["drift"] == 0 and rows[2]["drift"] > 0, "from the third rollout on the clips are another policy's"


def test_the_slow_policy_goes_on_where_it_was_after_a_resume(tmp_path: Path) -> None:
    policy = {**SMALL, "iterations": 5, "updates": 1, "save_every": 1, "old_rate": 0.3, "old_largest": 0.9}
    whole = run_small(nft, tmp_path / "whole", policy)
    run_small(nft, tmp_path / "broken", {**policy, "iterations": 3})
    assert run_small(nft, tmp_path / "broken", policy, resume=True) == whole
