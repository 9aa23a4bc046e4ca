"""The same pairs through trl's RewardTrainer and through our likelihood: the same loss, the same gradient, the same weights."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from recipes.reward_model import event_nll
from reward.vlm.model import VlmReward
from reward.vlm.trl_pairs import trl_parts
from tests.reward.vlm.tiny import clips, save_tiny, tiny_reward

PROMPTS = ["a bright clip", "a bright clip", "dark", "dark", "x", "x"]
PAIRS = [(0, 1), (3, 2), (4, 5)]  # (better, worse)
RATE, STEPS = 0.05, 3


def our_steps(model: VlmReward) -> list[float]:
    """Plain Bradley-Terry: rankings of two without ties."""
    index, ranks, dim = torch.tensor(PAIRS), torch.tensor([[1, 2]]).expand(3, 2), torch.ones(3, dtype=torch.long)
    never = torch.full((2, 1), -math.inf)  # no ties
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    losses = []
    for _ in range(STEPS):
        scores = model.scores(clips(6), PROMPTS, [8.0] * 6).mean
        loss = event_nll(scores[None], index, ranks, dim, never).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trl_steps(model: VlmReward, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl import RewardConfig, RewardTrainer

    parts = trl_parts(model, "match", clips(6), PROMPTS, PAIRS, [8.0] * 6)
    config = RewardConfig(
        str(out),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        per_device_train_batch_size=3,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        center_rewards_coefficient=None,
    )
    trainer = RewardTrainer(parts.model, config, train_dataset=parts.dataset, data_collator=parts.collate, processing_class=model.base.tokenizer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_kwargs)?`:FutureWarning")  # trl uses transformers' old names
def test_trl_finds_the_same_losses_and_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base", "qwen2_5_vl")
    ours, theirs = tiny_reward(base), tiny_reward(base)
    start = {name: value.clone() for name, value in ours.learned().items()}
    mine, other = our_steps(ours), trl_steps(theirs, tmp_path / "trl", monkeypatch)
    print("ours", mine, "trl", other)
    assert len(other) == STEPS and mine[0] != pytest.approx(mine[-1], abs=1e-3)
    assert mine[0] == pytest.approx(other[0], abs=1e-6)
    assert mine == pytest.approx(other, abs=1e-5)
    moved = 0
    for name, value in ours.learned().items():
        torch.testing.assert_close(theirs.learned()[name], value, rtol=1e-4, atol=2e-6)
        moved += int(not torch.equal(value, start[name]))
    assert moved > 20
