"""Signals and the reward model: what it may not depend on, what it must refuse, and that it learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base_model.errors import UserError
from base_model.types import Conditioning
from reward.features import SIGNALS, signal_features, subsampled_chroma
from reward.matcher import Matcher, MatcherSize, load_matcher, save_matcher
from reward.model import INPUTS, INTACT, RewardModel, load_reward_model, save_reward_model
from reward.quality import Quality
from reward.ranking import davidson_luce
from reward.types import Scorer

SMALL = MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)


def encode(prompts: Sequence[str]) -> Conditioning:
    """Every word has a fixed random vector; prompts are as long as their words."""
    words = [[torch.randn(384, generator=torch.Generator().manual_seed(int(hashlib.md5(w.encode()).hexdigest()[:8], 16))) for w in p.split()] for p in prompts]
    text = torch.nn.utils.rnn.pad_sequence([torch.stack(row) for row in words], batch_first=True)
    return Conditioning(tuple(prompts), text, torch.arange(text.shape[1]) < torch.tensor([len(row) for row in words])[:, None])


def small_model(dims: tuple[str, ...] = ("overall",)) -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(Matcher(SMALL), Quality(), dims, encode).eval()


def clips(batch: int = 3, frames: int = 5, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(1))


def signal(video: Tensor, name: str) -> float:
    return signal_features(video[None])[0, list(SIGNALS).index(name)].item()


def test_signals_of_clips_with_known_answers() -> None:
    grey = torch.full((6, 3, 16, 16), 0.4)
    assert signal(grey, "brightness") == pytest.approx(0.4, abs=1e-6)
    for name in ("contrast", "saturation", "sharpness", "noise", "motion", "flicker", "acceleration", "first_to_last", "centre", "red"):
        assert signal(grey, name) == pytest.approx(0, abs=2e-4)
    strobe = grey.clone()
    strobe[::2] = 0.9
    assert signal(strobe, "flicker") == pytest.approx(0.5, abs=1e-6) and signal(strobe, "motion") == pytest.approx(0, abs=1e-6)
    moving = grey.clone()
    for t in range(6):
        moving[t, :, 4:8, t : t + 4] = 1.0
    assert signal(moving, "motion") == pytest.approx(2 * 4 * 0.6 / 256, abs=1e-6) and signal(moving, "flicker") == pytest.approx(0, abs=1e-6)
    red = grey.clone()
    red[:, 0] = 1.0
    assert signal(red, "saturation") == pytest.approx(0.6, abs=1e-6) and signal(red, "red") == pytest.approx(0.6 * (1 - 0.299), abs=1e-6)


def test_blur_lowers_sharpness_noise_raises_noise_and_a_grid_shows() -> None:
    plain = clips(1, 4, 32, 32)[0] * 0.0 + torch.linspace(0, 1, 32)[None, None, None, :]
    stripes = (torch.arange(32) % 4 < 2).float().expand(4, 3, 32, 32)
    soft = torch.nn.functional.avg_pool2d(stripes, (1, 3), stride=1, padding=(0, 1))
    assert signal(soft, "sharpness") < 0.7 * signal(stripes, "sharpness")
    noise = 0.05 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    luma_std = 0.05 * (0.299**2 + 0.587**2 + 0.114**2) ** 0.5
    assert signal(0.5 + noise, "noise") == pytest.approx(luma_std, rel=0.1)
    grid = plain.clone()
    grid[..., ::8] = 1.0
    assert signal(grid, "grid") > 5 * abs(signal(plain, "grid"))


def test_subsampled_chroma_keeps_brightness_and_flat_colours_and_blurs_colour_by_two_pixels() -> None:
    grey = clips(1)[:, :, :1].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(subsampled_chroma(grey), grey)
    flat = torch.tensor([0.7, 0.3, 0.2]).view(1, 1, 3, 1, 1).expand(1, 2, 3, 9, 11)
    torch.testing.assert_close(subsampled_chroma(flat), flat)
    luma = torch.tensor([0.299, 0.587, 0.114])
    colors = torch.stack([torch.tensor([0.6, 0.5, 0.4]), torch.tensor([0.4, 0.5, 0.6])])  # two colours in turn, pixel by pixel
    fine = colors[torch.arange(16) % 2].T.view(1, 1, 3, 1, 16).expand(1, 2, 3, 16, 16)
    seen = subsampled_chroma(fine)
    torch.testing.assert_close(torch.einsum("btchw,c->bthw", seen, luma), torch.einsum("btchw,c->bthw", fine, luma))
    chroma = seen - torch.einsum("btchw,c->bthw", seen, luma)[:, :, None]
    torch.testing.assert_close(chroma[..., 1:], chroma[..., :-1])  # the mean of both colours


def test_a_mirrored_clip_under_the_mirrored_prompt_scores_the_same() -> None:
    model, video = small_model(), clips(2, 5, 16, 24)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    scores, mirrored = model(video, ["a disc moves left", "it turns clockwise"]), model(video.flip(-1), ["a disc moves right", "it turns counter-clockwise"])
    torch.testing.assert_close(scores.mean, mirrored.mean, rtol=0, atol=1e-5)
    views = [(video, encode(["a disc moves left", "it turns clockwise"])), (video.flip(-1), encode(["a disc moves right", "it turns counter-clockwise"]))]
    by_hand = torch.stack([model.matcher.parts(subsampled_chroma(clip), cond.text, cond.mask) for clip, cond in views])  # [2,B,3]
    torch.testing.assert_close(model.inputs(video, ["a disc moves left", "it turns clockwise"])[:, :INTACT], by_hand.mean(0), rtol=0, atol=1e-5)
    assert (by_hand[0] - by_hand[1]).abs().max() > 1e-5


def test_more_is_always_more_even_far_from_the_training_clips_and_a_match_has_an_end() -> None:
    model = small_model()
    far = model.standardised(torch.linspace(-50, 50, 101)[:, None].expand(-1, len(INPUTS)))
    assert (far[:, INTACT:].diff(dim=0) > 0).all() and (far[:, :INTACT].diff(dim=0) >= 0).all()
    assert far[:, :INTACT].abs().max() <= 2
    torch.testing.assert_close(model.standardised(torch.full((1, len(INPUTS)), 0.01)), torch.full((1, len(INPUTS)), 0.01), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 16, 24), (13, 32, 32), (25, 48, 24)])
def test_every_native_size_gives_finite_signals_scores_and_gradients(shape: tuple[int, int, int]) -> None:
    video = clips(2, *shape).requires_grad_()
    scores = small_model()(video, ["red circle", "blue bar grows"])
    assert scores.mean.shape == scores.spread.shape == (2, 1)
    (scores.mean.sum() + scores.spread.sum() + signal_features(video).sum()).backward()
    assert video.grad is not None and torch.isfinite(video.grad).all() and (video.grad.flatten(1).abs().sum(1) > 0).all()
    for flat in (torch.zeros(1, *(shape[0], 3, *shape[1:])), torch.ones(1, *(shape[0], 3, *shape[1:]))):
        flat = flat.requires_grad_()
        signal_features(flat).sum().backward()
        assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_a_score_does_not_depend_on_the_other_clips_or_on_padding() -> None:
    model, prompts = small_model(("a", "b")), ["red circle", "a blue bar that grows and grows", "x"]
    together = model(clips(), prompts)
    for i in range(3):
        alone = model(clips()[i : i + 1], prompts[i : i + 1])
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.spread[i : i + 1], alone.spread, rtol=0, atol=1e-5)


def test_a_clip_that_is_not_finite_is_unknown_and_leaves_the_others_alone() -> None:
    model, video = small_model(), clips()
    expected = model(video, ["x"] * 3)
    video[1, 2, 0, 3, 3] = torch.nan
    scores = model(video, ["x"] * 3)
    assert scores.mean[1].isnan().all() and scores.spread[1].isnan().all()
    torch.testing.assert_close(scores.mean[[0, 2]], expected.mean[[0, 2]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        model(video, ["x"] * 2)


def doubtful_model(dims: tuple[str, ...] = ("quality", "motion")) -> RewardModel:
    """With weights, covariances and misfits of its own."""
    model, generator = small_model(dims), torch.Generator().manual_seed(3)
    root = 0.2 * torch.randn(len(dims), len(INPUTS), len(INPUTS), generator=generator)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(len(dims), len(INPUTS), generator=generator))
    model.covariance.copy_(root @ root.mT)
    model.misfit.copy_(torch.tensor([0.5, 1.5])[: len(dims)])
    model.temperature.copy_(torch.tensor([2.0, 0.8])[: len(dims)])
    return model


@torch.no_grad()
def test_the_spread_is_that_of_drawn_weights_and_misfits_and_a_difference_knows_that_weights_are_shared() -> None:
    model, prompts = doubtful_model(), ["red circle", "a blue bar", "x"]
    scores, joint = model(clips(), prompts), model.joint(clips(), prompts)
    x = model.standardised(model.inputs(clips(), prompts)).double()  # [B,26]
    generator = torch.Generator().manual_seed(0)
    for r in range(2):
        root = torch.linalg.cholesky(model.covariance[r].double() + 1e-9 * torch.eye(len(INPUTS), dtype=torch.float64))
        weights = model.head.weight[r].double() + torch.randn(100_000, len(INPUTS), generator=generator, dtype=torch.float64) @ root.T
        drawn = weights @ x.T + model.misfit[r] * torch.randn(100_000, 3, generator=generator, dtype=torch.float64)  # [100000,B]
        drawn /= model.temperature[r]
        torch.testing.assert_close(scores.mean[:, r].double(), drawn.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(scores.spread[:, r].double(), drawn.std(0), rtol=0.01, atol=0)
        torch.testing.assert_close(joint.covariance[r].double(), torch.cov(drawn.T), rtol=0.02, atol=0.02)
        found = joint.difference(torch.tensor([0, 2]), torch.tensor([1, 0]))
        away = torch.stack([drawn[:, 0] - drawn[:, 1], drawn[:, 2] - drawn[:, 0]], dim=1)
        torch.testing.assert_close(found.mean[:, r].double(), away.mean(0), rtol=0, atol=0.03)
        torch.testing.assert_close(found.spread[:, r].double(), away.std(0), rtol=0.01, atol=0)
    torch.testing.assert_close(joint.mean, scores.mean, rtol=0, atol=1e-6)
    apart = (scores.spread[0].square() + scores.spread[1].square()).sqrt()
    assert ((found.spread[0] - apart).abs() > 0.05).all(), "spreads of clips do not add as if they had nothing in common"
    assert torch.equal(joint.difference(torch.tensor([1]), torch.tensor([1])).spread, torch.zeros(1, 2)), "a clip is as good as itself"


def test_doubt_about_a_clip_that_is_not_finite_is_unknown_and_that_of_the_others_stays() -> None:
    model, video, prompts = doubtful_model(), clips(), ["x"] * 3
    expected = model.joint(video, prompts)
    video[1, 0, 0, 0, 0] = torch.inf
    scores, joint = model(video, prompts), model.joint(video, prompts)
    assert scores.spread[1].isnan().all() and joint.mean[1].isnan().all() and joint.covariance[:, 1].isnan().all() and joint.covariance[:, :, 1].isnan().all()
    found = joint.difference(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 1]))
    assert found.mean[[0, 2]].isnan().all() and found.spread[[0, 2]].isnan().all()
    torch.testing.assert_close(found.spread[1], expected.difference(torch.tensor([0]), torch.tensor([2])).spread[0], rtol=0, atol=1e-6)


def test_nothing_is_doubted_before_anything_was_fitted_and_gradients_stay_finite() -> None:
    model, video = small_model(), clips().requires_grad_()
    spread = model(video, ["x"] * 3).spread
    spread.sum().backward()
    assert torch.equal(spread, torch.zeros(3, 1)) and video.grad is not None and torch.isfinite(video.grad).all()
    certain = doubtful_model()
    certain.covariance.zero_()
    torch.testing.assert_close(certain(clips(), ["x"] * 3).spread, (certain.misfit / certain.temperature).expand(3, 2))


def test_the_model_is_small_and_is_a_scorer() -> None:
    scorer: Scorer = RewardModel(Matcher(), Quality(), ("overall",), encode)
    assert scorer.differentiable and scorer.dims == ("overall",)
    assert sum(p.numel() for p in Matcher().parameters()) <= 620_000


def test_saved_models_score_the_same_and_know_their_card(tmp_path: Path) -> None:
    model = doubtful_model()
    model.center.copy_(torch.tensor([0.5, -1.0]))
    card = save_reward_model(tmp_path, model, {"seed": 3})
    again = load_reward_model(tmp_path, encode)
    assert again.dims == ("quality", "motion") and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    torch.testing.assert_close(again(clips(), ["x"] * 3), model(clips(), ["x"] * 3), rtol=0, atol=1e-6)
    assert card["normalisation"]["motion"]["center"] == -1.0 and json.loads((tmp_path / "reward_card.json").read_text()) == card


def test_a_model_that_is_not_what_its_card_says_is_refused(tmp_path: Path) -> None:
    save_reward_model(tmp_path, small_model(), {})

    def other_encoder(prompts: Sequence[str]) -> Conditioning:
        cond = encode(prompts)
        return Conditioning(cond.prompts, -cond.text, cond.mask)

    with pytest.raises(UserError, match="golden scores"):
        load_reward_model(tmp_path, other_encoder)
    card = json.loads((tmp_path / "reward_card.json").read_text())
    (tmp_path / "reward_card.json").write_text(json.dumps({**card, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="not those of their card"):
        load_reward_model(tmp_path, encode)
    (tmp_path / "reward_card.json").write_text(json.dumps({**card, "members": 5}))
    with pytest.raises(UserError, match=r"made by an earlier version, .* Train it again with `rushes reward-model`$"):
        load_reward_model(tmp_path, encode)
    (tmp_path / "reward_card.json").write_text("{")
    with pytest.raises(UserError, match="not a reward model's card"):
        load_reward_model(tmp_path, encode)
    with pytest.raises(UserError, match="no reward model"):
        load_reward_model(tmp_path / "nowhere", encode)


def test_matchers_are_read_back_and_other_files_refused(tmp_path: Path) -> None:
    matcher = Matcher(SMALL)
    save_matcher(tmp_path / "m.safetensors", matcher)
    again = load_matcher(tmp_path / "m.safetensors")
    assert again.size == SMALL and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), matcher.state_dict().values(), strict=True))
    save_reward_model(tmp_path, small_model(), {})
    with pytest.raises(UserError, match="not a video-text matcher"):
        load_matcher(tmp_path / "reward_model.safetensors")


def test_a_preference_for_what_the_prompt_says_is_learned_from_rankings() -> None:
    """Planted: prompts ask for a bright or a dark clip; worth is +-6 x brightness; rankings follow Plackett-Luce."""
    generator = torch.Generator().manual_seed(4)
    level = torch.rand(200, 4, generator=generator)  # [E, K]
    wish = torch.randint(2, (200,), generator=generator)  # [E]
    worth = 6 * level * (2 * wish[:, None] - 1) + 0.01
    ranks = (worth - torch.log(-torch.log(torch.rand(200, 4, generator=generator)))).argsort(-1, descending=True).argsort(-1) + 1
    video = (level.flatten()[:, None, None, None, None] + 0.1 * torch.rand(800, 2, 3, 8, 8, generator=generator)).clamp(0, 1)
    prompts = [("dark", "bright")[w] for w in wish.repeat_interleave(4).tolist()]
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        rows = torch.arange(150)[step % 3 :: 3]
        chosen = (rows[:, None] * 4 + torch.arange(4)).flatten()
        scores = model(video[chosen], [prompts[i] for i in chosen.tolist()]).mean.unflatten(0, (-1, 4))[..., 0]  # [E, K]
        loss = -davidson_luce(scores, ranks[rows], model.log_tie[0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        held_out = model(video[600:], prompts[600:]).mean.unflatten(0, (-1, 4))[..., 0]  # [50, 4]
    true = worth[150:]
    decided = (true[:, :, None] - true[:, None, :]) > 1.0
    assert (held_out[:, :, None] > held_out[:, None, :])[decided].float().mean() > 0.95
    assert model.log_tie[0, 0] < -1.0  # nothing tied, so ties became less likely
