"""The sight: whose convolutions it begins with, where its features lie, and that the matcher asks of them what it asks of pixels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from base_model.tiny import LatentVideoModel
from reward.features import subsampled_chroma
from reward.latent import LatentReward, LatentSize, load_latent_reward, save_latent_reward
from reward.matcher import Matcher
from reward.sight import Sight, Stem
from tests.recipes.small import small_model

PROMPTS = ["a red circle", "a blue bar that moves slowly to the left"]


def sight_of(model: LatentVideoModel, depth: int = 1) -> Sight:
    torch.manual_seed(2)
    return Sight(model.codec, depth, Matcher())


def latents(frames: int, height: int, width: int) -> Tensor:
    return torch.randn(2, 8, frames, height, width, generator=torch.Generator().manual_seed(frames))


def test_it_begins_with_what_the_codec_makes_of_latents() -> None:
    model = small_model()
    stem, x0 = sight_of(model, depth=2).stem, latents(3, 4, 4)
    theirs, ours = [], []
    model.codec.vae.decoder[2].register_forward_hook(lambda module, inputs, out: theirs.append(out[0]))
    stem.blocks[1].register_forward_hook(lambda module, inputs, out: ours.append(out[0]))
    model.decode(x0)
    stem(x0, torch.tensor([0.0, 0.7]))
    torch.testing.assert_close(ours[0], theirs[0])
    assert all(parameter.requires_grad for parameter in stem.parameters()) and not any(parameter.requires_grad for parameter in model.codec.parameters())


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 4), (2, 4, 6), (4, 8, 8)])
def test_its_features_are_on_the_matchers_grid(frames: int, height: int, width: int) -> None:
    model = small_model()
    sight, x0 = sight_of(model), latents(frames, height, width)
    features, inputs = sight(x0, torch.zeros(2), model.encode_text(PROMPTS))
    assert features.shape == sight.matcher.see(model.decode(x0)).shape == (2, 1 + 4 * (frames - 1), 24, 2 * height, 2 * width)
    assert inputs.shape == (2, 26) and inputs.isfinite().all()


def test_a_feature_depends_on_cells_around_its_place_and_on_no_later_frame() -> None:
    model = small_model()
    stem, x0 = sight_of(model, depth=1).stem, latents(4, 8, 10).requires_grad_()
    features, _ = stem(x0, torch.zeros(2))  # [2,13,24,16,20]
    for frame, row, column in ((0, 0, 0), (4, 5, 12), (5, 15, 3), (12, 8, 19)):
        (slope,) = torch.autograd.grad(features[0, frame, :, row, column].sum(), x0, retain_graph=True)
        at = torch.nonzero(slope[0].abs().amax(0))  # [n,3]
        place = torch.tensor([(frame + 3) // 4, row // 2, column // 2])
        near = (at - place).abs()
        assert slope[1].abs().max() == 0 and (at[:, 0] <= place[0]).all() and near.max() == 2
        assert (near[:, 1:] <= 2).all() and (near == 0).all(1).any(), "the first convolution and the block's reach one cell each"


def test_the_matcher_asks_of_features_what_it_asks_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    sight, x0, cond = sight_of(model), latents(2, 4, 4), model.encode_text(PROMPTS)
    sight.match_mean.copy_(torch.tensor([0.5, -0.3, 0.1]))
    sight.match_std.copy_(torch.tensor([0.5, 2.0, 0.7]))
    video = subsampled_chroma(model.decode(x0))
    monkeypatch.setattr(Stem, "forward", lambda *_: (sight.matcher.see(video), torch.full((2, 23), 7.0)))
    _, inputs = sight(x0, torch.zeros(2), cond)
    known = (sight.matcher.parts(video, cond.text, cond.mask) - sight.match_mean) / sight.match_std
    torch.testing.assert_close(inputs[:, :3], 2 * torch.tanh(known / 2))
    assert (inputs[:, 3:] == 7).all()


def test_sizes_the_codec_does_not_have_are_refused() -> None:
    model = small_model()
    for depth in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 blocks"):
            sight_of(model, depth)


def test_a_latent_reward_keeps_its_sight(tmp_path: Path) -> None:
    model, again = small_model(), small_model()
    torch.manual_seed(3)
    scorer = LatentReward(model, LatentSize(after=(1,), width=16, heads=2, sight=1), ("overall",), levels=(0.0, 0.5), matcher=Matcher()).eval()
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    card = save_latent_reward(tmp_path, scorer, {"measured": []})
    loaded = load_latent_reward(tmp_path, again)
    x_t, t = latents(2, 4, 4), torch.tensor([0.0, 0.4])
    expected, found = scorer(x_t, t, model.encode_text(PROMPTS)), loaded(x_t, t, again.encode_text(PROMPTS))
    assert torch.equal(found.mean, expected.mean) and torch.equal(found.spread, expected.spread)
    assert card["matcher"]["slots"] == 2 and card["size"]["sight"] == 1
    blind = LatentReward(model, scorer.size, ("overall",), levels=(0.0, 0.5))
    assert blind.sight is None and not any("sight" in name for name in blind.state_dict())


def test_what_is_told_is_trusted_by_noise_level_and_at_the_start_wholly() -> None:
    model = small_model()
    scorer = LatentReward(model, LatentSize(after=(1,), width=16, heads=2), ("overall",), levels=(0.0,), matcher=Matcher())
    x_t, t, cond = latents(2, 4, 4), torch.tensor([0.0, 0.8]), model.encode_text(PROMPTS)
    seen = scorer.seen(x_t, t, cond)
    assert torch.equal(scorer.summary(seen, x_t, t, cond)[:, 32:], seen.inputs) and scorer.trust is not None
    with torch.no_grad():
        scorer.trust.weight.normal_(generator=torch.Generator().manual_seed(0))
    angle = 1000 * t[:, None] * 10_000 ** (-torch.arange(8) / 8)
    share = 1 + torch.cat([angle.cos(), angle.sin()], dim=1) @ scorer.trust.weight.T
    torch.testing.assert_close(scorer.summary(seen, x_t, t, cond)[:, 32:], seen.inputs * share, rtol=1e-3, atol=1e-4)
