"""The latent reward: which hidden states it reads, whose they are, and what a folder must hold to be believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.lora import add_lora, merge, reference
from base_model.networks.packing import Segments, pack
from base_model.prompts.text import TextEncoder
from base_model.tiny import LatentVideoModel, packed, packed_text
from base_model.types import Conditioning, Known
from recipes.scorers import card_of, tier_of
from reward.latent import LatentMixture, LatentReward, LatentSize, between, load_latent_reward, rotary_axes, save_latent_reward
from reward.mixture import Term
from reward.model import load_reward_model
from tests.recipes.small import save_small_reward_model, small_model

DIMS = ("alignment", "motion")
PROMPTS = ["a red circle", "a blue bar that moves slowly to the left", "a green triangle grows"]
LEVELS = (0.0, 0.25, 0.5, 1.0)


def scorer_of(model: LatentVideoModel, after: tuple[int, ...] = (1, 2)) -> LatentReward:
    torch.manual_seed(3)
    scorer = LatentReward(model, LatentSize(after=after, width=24, depth=1, heads=2), DIMS, levels=LEVELS)
    with torch.no_grad():
        for parameter in scorer.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return scorer.eval()


def clips(model: LatentVideoModel) -> tuple[Tensor, Tensor, Conditioning]:
    x_t = torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return x_t, torch.tensor([0.0, 0.3, 0.9]), model.encode_text(PROMPTS)


def trained_adapter(model: LatentVideoModel) -> None:
    """An adapter that changes what the network says."""
    model.network = add_lora(model.network, rank=2, alpha=2, seed=0)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(5))


# What is read


def test_it_reads_the_hidden_states_that_blocks_called_by_hand_give() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model, after=(0, 2))
    network, (tokens, positions, segments), (text, text_segments) = model.network, packed(x_t, model.config.patch), packed_text(cond)
    seen: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out))
    network(tokens, positions, segments, t, text, text_segments)
    expected = torch.cat([network.tokens_in(tokens), seen[1]], dim=-1)
    assert torch.equal(scorer.hidden(x_t, t, cond), expected)


def test_the_features_are_those_of_the_base_whether_the_policy_has_an_adapter_or_not() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    plain, base = model(x_t, t, cond), scorer(x_t, t, cond)
    trained_adapter(model)
    assert (model(x_t, t, cond) - plain).abs().max() > 1e-2, "the adapter does something"
    adapted = scorer(x_t, t, cond)
    assert torch.equal(adapted.mean, base.mean) and torch.equal(adapted.spread, base.spread)
    with reference(model.network):
        torch.testing.assert_close(model(x_t, t, cond), plain)
    assert (model(x_t, t, cond) - plain).abs().max() > 1e-2, "a score leaves the adapter on"


def test_a_network_that_is_no_longer_the_base_is_refused() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    trained_adapter(model)
    model.network = merge(model.network)
    with pytest.raises(ValueError, match="no longer the one"):
        scorer(x_t, t, cond)


def test_a_clip_scores_alone_what_it_scores_beside_others_with_longer_prompts() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    scores = scorer(x_t, t, cond)
    assert scores.mean.shape == scores.spread.shape == (3, 2) and (scores.spread > 0).all()
    for i in range(3):
        alone = scorer(x_t[i : i + 1], t[i : i + 1], model.encode_text(PROMPTS[i : i + 1]))
        torch.testing.assert_close(scores.mean[i : i + 1], alone.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(scores.spread[i : i + 1], alone.spread, rtol=0, atol=1e-5)


def test_clips_of_several_sizes_in_one_pack_get_what_each_gets_alone() -> None:
    model = small_model()
    scorer = scorer_of(model)
    cond, t = model.encode_text(PROMPTS), torch.tensor([0.0, 0.3, 0.9])
    generator = torch.Generator().manual_seed(2)
    sizes = [torch.randn(8, f, h, w, generator=generator) for f, h, w in ((2, 4, 4), (1, 4, 6), (3, 2, 4))]
    tokens, positions, segments = pack(sizes, model.config.patch)
    states = model.network.hidden(tokens, positions, segments, t, *packed_text(cond), after=(1, 2))
    together = scorer.head(torch.cat(states, -1), positions, segments, t, *packed_text(cond))
    for i, clip in enumerate(sizes):
        one = cond[[i]]
        seen = scorer.seen(clip[None], t[i : i + 1], one)
        torch.testing.assert_close(together[i : i + 1], scorer.summary(seen, clip[None], t[i : i + 1], one), rtol=0, atol=1e-5)
    assert isinstance(segments, Segments)


def test_latents_or_noise_levels_that_are_not_finite_are_unknown_and_leave_the_others_alone() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    expected = scorer(x_t, t, cond)
    broken = x_t.clone()
    broken[1, 3, 0, 2, 2] = torch.inf
    for latents, level in ((broken, t), (x_t, torch.tensor([0.0, torch.nan, 0.9]))):
        scores = scorer(latents, level, cond)
        assert scores.mean[1].isnan().all() and scores.spread[1].isnan().all()
        torch.testing.assert_close(scores.mean[[0, 2]], expected.mean[[0, 2]], rtol=0, atol=1e-6)


def test_what_it_cannot_score_is_refused() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    with pytest.raises(ValueError, match="noise levels from 0 to 1"):
        scorer(x_t, t + 0.5, cond)
    known = Conditioning(cond.prompts, cond.text, cond.mask, None, Known(x_t, torch.zeros(3, 2, 4, 4, dtype=torch.bool)))
    with pytest.raises(ValueError, match="visual prompt"):
        scorer(x_t, t, known)
    for after in ((), (3,), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="after must be ascending"):
            scorer_of(model, after=after)
    for width in (7, 6):
        with pytest.raises(ValueError, match="cannot be turned"):
            rotary_axes(width)
    assert rotary_axes(32) == (8, 12, 12) and rotary_axes(16) == (4, 6, 6) and rotary_axes(8) == (4, 2, 2)


def test_a_score_has_a_gradient_into_the_latents_of_its_clip_alone(folder: Path) -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = load_latent_reward(folder, model)
    model.network.requires_grad_(False)
    trained_adapter(model)
    x_t.requires_grad_()
    (slope,) = torch.autograd.grad(scorer(x_t, t, cond).mean[1, 0], x_t)
    assert slope[0].abs().max() == slope[2].abs().max() == 0
    step = 0.02 * slope / slope.norm()
    with torch.no_grad():
        rise = scorer(x_t + step, t, cond).mean[1, 0] - scorer(x_t - step, t, cond).mean[1, 0]
    assert float(rise) == pytest.approx(2 * 0.02 * float(slope.norm()), rel=0.02)
    assert all(parameter.grad is None for parameter in model.network.parameters())


# Spread and reward


def test_the_spread_is_widened_between_the_levels_on_straight_lines() -> None:
    levels, values = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 4.0], [5.0, 1.0]])
    t = torch.tensor([-0.1, 0.0, 0.1, 0.25, 0.4, 0.5, 0.8, 1.0, 1.4])
    expected = np.stack([np.interp(t.numpy(), levels.numpy(), values[:, r].numpy()) for r in range(2)], axis=1)
    np.testing.assert_allclose(between(levels, values, t).numpy(), expected, atol=1e-6)
    assert torch.equal(between(torch.tensor([0.3]), torch.tensor([[7.0]]), t), torch.full((9, 1), 7.0)), "one level holds everywhere"
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    narrow = scorer(x_t, t, cond)
    scorer.widening.copy_(values)
    wide = scorer(x_t, t, cond)
    torch.testing.assert_close(wide.spread / narrow.spread, between(levels, values, t))
    assert torch.equal(wide.mean, narrow.mean)


def test_what_the_spread_learns_does_not_reach_the_head() -> None:
    model = small_model()
    x_t, t, cond = clips(model)
    scorer = scorer_of(model)
    _, spread = scorer.read(scorer.summary(scorer.seen(x_t, t, cond), x_t, t, cond), t)
    spread.sum().backward()
    assert scorer.log_spread.weight.grad is not None and scorer.log_spread.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in scorer.head.parameters())


def test_the_reward_of_finished_latents_is_their_pessimistic_score_in_deviations() -> None:
    model = small_model()
    x0, _, cond = clips(model)
    scorer = scorer_of(model)
    scores = scorer(x0, torch.zeros(3), cond)
    term = Term("people", "motion", weight=2.0, center=0.3, scale=1.7, pessimism=0.5)
    mixed = LatentMixture(scorer, (term,))(x0, cond)
    expected = 2 * ((scores.mean[:, 1] - 0.5 * scores.spread[:, 1]) - 0.3) / 1.7
    torch.testing.assert_close(mixed.reward, expected, rtol=0, atol=1e-6)
    x0[0] = torch.nan
    mixed = LatentMixture(scorer, (term,))(x0, cond)
    assert mixed.unknown.tolist() == [True, False, False] and mixed.reward[0].isnan()


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_latent_reward(tmp_path / "latent", scorer_of(small_model()), {"measured": []})
    return tmp_path / "latent"


def test_a_folder_gives_the_same_scores_on_the_same_network(folder: Path) -> None:
    model, again = small_model(), small_model()
    x_t, t, cond = clips(model)
    expected, loaded = scorer_of(model)(x_t, t, cond), load_latent_reward(folder, again)
    found = loaded(x_t, t, cond)
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.spread, expected.spread)
    card = json.loads((folder / "reward_card.json").read_text())
    assert card["tier"] == tier_of(card_of(folder)) == "latent" and card["dims"] == list(DIMS) and card["size"]["after"] == [1, 2]
    assert np.shape(card["golden"]["mean"]) == (4, 2), "two golden clips, finished and half noised"
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not any(name.startswith("_model") for name in loaded.state_dict())


def test_another_network_is_refused_and_so_is_another_codec_or_text_encoder(folder: Path) -> None:
    with pytest.raises(UserError, match="reads another network"):
        load_latent_reward(folder, small_model(seed=1))
    coded = small_model()
    coded.codec.normaliser.mean.add_(0.5)
    with pytest.raises(UserError, match="golden scores"):
        load_latent_reward(folder, coded)

    class Other(TextEncoder):
        def __call__(self, prompts: list[str]) -> Conditioning:  # type: ignore[override]
            return super().__call__([prompt[::-1] for prompt in prompts])

    told = small_model()
    told.text = Other()
    with pytest.raises(UserError, match="golden scores"):
        load_latent_reward(folder, told)


def test_what_is_no_latent_reward_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(UserError, match="no reward model"):
        load_latent_reward(tmp_path / "nowhere", model)
    with pytest.raises(UserError, match="tier 'matcher'"):
        load_latent_reward(save_small_reward_model(tmp_path / "pixels"), model)
    with pytest.raises(UserError, match="tier 'latent'"):
        load_reward_model(folder, model.text)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "reward_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError):
        load_latent_reward(other, model)
    for change in ({"base": 3}, {"size": {"after": 1}}, {"size": {"width": -4}}, {"levels": None}, {"golden": {}}, {"dims": []}):
        other = shutil.copytree(folder, tmp_path / f"changed-{next(iter(change))}-{len(str(change))}")
        card = json.loads((other / "reward_card.json").read_text())
        (other / "reward_card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError) as refused:
            load_latent_reward(other, model)
        assert "\n" not in str(refused.value)
    (folder / "reward_card.json").write_text("[")
    with pytest.raises(UserError, match="the card of the reward model"):
        card_of(folder)
