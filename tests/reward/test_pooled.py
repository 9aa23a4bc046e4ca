"""The reward model on frozen encoders: what it may look at, what it is at the start, and what a folder must hold to be believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from base_model.errors import UserError
from reward.encoders import Encoder, load_encoder
from reward.model import load_reward_model
from reward.pooled import Features, PooledModel, load_pooled, save_pooled, sights
from reward.types import Scorer
from tests.reward import tiny_encoders as tiny
from tests.reward.test_model import encode

DIMS = ("alignment", "motion")
PROMPTS = ["a red circle", "a blue bar moves left", "a red circle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.save(family, tmp_path_factory.mktemp("encoders") / family) for family in tiny.FAMILIES}


@pytest.fixture(scope="module")
def every(folders: dict[str, Path]) -> list[Encoder]:
    return [load_encoder(folder, fps=12.0) for folder in folders.values()]


def clips(batch: int = 3) -> Tensor:
    return torch.rand(batch, 5, 3, 24, 32, generator=torch.Generator().manual_seed(1))


def model_of(encoders: list[Encoder], *, learned: bool = True, motion_dims: tuple[str, ...] = ()) -> PooledModel:
    torch.manual_seed(0)
    model = PooledModel(encoders, DIMS, members=3, width=8, motion_dims=motion_dims).eval()
    if learned:
        with torch.no_grad():
            for parameter in model.heads.parameters():
                parameter.add_(torch.randn_like(parameter))
    return model


# Scores


def test_it_is_a_scorer_of_every_family_at_once(every: list[Encoder]) -> None:
    scorer: Scorer = model_of(every)
    scores = scorer(clips(), PROMPTS)
    assert scorer.dims == DIMS and not scorer.differentiable
    assert scores.mean.shape == scores.spread.shape == (3, 2) and torch.isfinite(scores.mean).all() and (scores.spread > 0).all() and not scores.mean.requires_grad
    for i in range(3):
        alone = scorer(clips()[i : i + 1], PROMPTS[i : i + 1])
        torch.testing.assert_close(scores.mean[i : i + 1], alone.mean, rtol=0, atol=1e-4)


def test_a_clip_that_is_not_finite_is_unknown_and_leaves_the_others_alone(every: list[Encoder]) -> None:
    model, video = model_of(every), clips()
    expected = model(video, PROMPTS)
    video[1, 2, 0, 3, 3] = torch.inf
    scores = model(video, PROMPTS)
    assert scores.mean[1].isnan().all() and scores.spread[1].isnan().all()
    torch.testing.assert_close(scores.mean[[0, 2]], expected.mean[[0, 2]], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="3 clips and 2 prompts"):
        model(video, PROMPTS[:2])


def test_heads_pool_as_a_plain_loop_does(every: list[Encoder]) -> None:
    model = model_of(every, motion_dims=("motion",)).double()
    features = model.features(clips(), PROMPTS)
    model.fit_standard(features)
    found = model.heads([model.standardised(x, m, s).double() for x, m, s in zip(features.tokens, model.token_mean, model.token_std, strict=True)], features.cosine.double())
    heads = model.heads
    for m in range(3):
        for b in range(3):
            for r, dim in enumerate(DIMS):
                keys, values = [], []
                for e, encoder in enumerate(every):
                    if encoder.motion and dim != "motion":
                        continue
                    for n, token in enumerate(features.tokens[e][b].double()):
                        x = ((token - model.token_mean[e]) / model.token_std[e]).clamp(-3, 3)
                        keys.append(x @ heads.key[e][m] + heads.place[e][m, n])
                        values.append(x @ heads.value[e][m] + heads.place[e][m, n])
                share = (torch.stack(keys) @ heads.question[m, r] / 8**0.5).softmax(0)
                pooled = share @ F.gelu(torch.stack(values))
                expected = pooled @ heads.weight[m, r] / 8**0.5 + features.cosine[b].double() @ heads.match[m, r]
                torch.testing.assert_close(found[m, b, r], expected, rtol=1e-9, atol=1e-9)


def test_before_it_learns_a_score_is_half_the_sum_of_the_standardised_cosines(every: list[Encoder]) -> None:
    model = model_of(every, learned=False)
    features = model.features(clips(), PROMPTS)
    model.fit_standard(features)
    standard = (features.cosine - features.cosine.mean(0)) / features.cosine.std(0, correction=0)
    expected = standard.clamp(-3, 3).sum(1) / 2
    scores = model(clips(), PROMPTS)
    assert features.cosine.shape == (3, 3)
    torch.testing.assert_close(scores.mean, expected[:, None].expand(3, 2), rtol=0, atol=1e-5)
    assert scores.spread.max() < 1e-5


def test_spread_is_the_deviation_of_the_heads_and_temperature_divides_both(every: list[Encoder]) -> None:
    model = model_of(every)
    heads = model.ensemble(model.features(clips(), PROMPTS))
    torch.testing.assert_close(model(clips(), PROMPTS).spread, heads.std(0, correction=0), rtol=0, atol=1e-5)
    model.temperature.fill_(2.0)
    torch.testing.assert_close(model(clips(), PROMPTS).mean, heads.mean(0) / 2, rtol=0, atol=1e-5)


def test_tokens_of_motion_feed_the_motion_dimensions_alone_where_asked(every: list[Encoder]) -> None:
    features = model_of(every).features(clips(), PROMPTS)
    other = Features(tuple(-x if encoder.motion else x for x, encoder in zip(features.tokens, every, strict=True)), features.cosine)
    kept, changed = (model_of(every, motion_dims=("motion",)).ensemble(each) for each in (features, other))
    assert torch.equal(kept[..., 0], changed[..., 0]) and (kept[..., 1] - changed[..., 1]).abs().min() > 1e-3
    kept, changed = (model_of(every).ensemble(each) for each in (features, other))
    assert (kept - changed).abs().min() > 1e-3


def test_what_cannot_be_looked_at_is_refused(every: list[Encoder], folders: dict[str, Path]) -> None:
    assert sights(every, DIMS, ()).all() and sights(every[:1], DIMS, ("motion",)).all()
    with pytest.raises(UserError, match="no dimension 'speed'"):
        sights(every, DIMS, ("speed",))
    with pytest.raises(UserError, match="'alignment' may not look at motion"):
        sights(every[3:], DIMS, ("motion",))
    with pytest.raises(ValueError, match="one frame rate"):
        PooledModel([every[0], load_encoder(folders["siglip"], fps=8.0)], DIMS)


def test_encoders_without_text_have_no_cosine_and_still_score(every: list[Encoder]) -> None:
    model = model_of(every[3:])
    assert model.features(clips(), PROMPTS).cosine.shape == (3, 0) and torch.isfinite(model(clips(), PROMPTS).mean).all()


# Files


def test_saved_models_score_the_same_and_their_card_names_the_encoders(every: list[Encoder], tmp_path: Path) -> None:
    model = model_of(every, motion_dims=("motion",))
    model.fit_standard(model.features(clips(), PROMPTS))
    with torch.no_grad():
        model.temperature.fill_(1.5)
    card = save_pooled(tmp_path, model, {"licences": ["CC-BY-4.0"]})
    again = load_pooled(tmp_path, fps=12.0)
    torch.testing.assert_close(again(clips(), PROMPTS), model(clips(), PROMPTS), rtol=0, atol=0)
    assert again.dims == DIMS and again.motion_dims == ("motion",) and again.fps == 12.0 and not any(p.requires_grad for p in again.parameters())
    assert json.loads((tmp_path / "reward_card.json").read_text()) == card and card["licences"] == ["CC-BY-4.0"]
    first = card["encoders"][0]
    assert (first["family"], first["revision"], first["sampler"]) == ("clip", every[0].revision, {"frames": 8, "fps": 12.0})
    assert first["pixels"]["mean"] == tiny.PIXELS["image_mean"] and {"normalisation", "temperature", "log_tie", "golden", "sha256"} <= card.keys()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 400_000, "the encoders' weights are not copied"


def test_a_folder_that_is_not_what_its_card_says_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = Path(shutil.copytree(folders["clip"], tmp_path / "clip"))
    folder = tmp_path / "model"
    save_pooled(folder, model_of([load_encoder(encoder, fps=12.0)]), {})
    with pytest.raises(UserError, match="is for clips of 12 frames a second, and these have 8"):
        load_pooled(folder, fps=8.0)
    assert load_pooled(folder, fps=12000 / 1001).fps == 12.0  # a rate that containers round
    with pytest.raises(UserError, match="tier 'encoders', where one of 'matcher' is read"):
        load_reward_model(folder, encode)
    moved = Path(shutil.move(encoder, tmp_path / "moved"))
    with pytest.raises(UserError, match="no encoder"):
        load_pooled(folder, fps=12.0)
    load_pooled(folder, fps=12.0, moved={str(encoder): moved})
    (moved / "preprocessor_config.json").write_text((moved / "preprocessor_config.json").read_text().replace("0.48", "0.49"))
    with pytest.raises(UserError, match="is not the one of the reward model's card"):
        load_pooled(folder, fps=12.0, moved={str(encoder): moved})
    shutil.copytree(folders["clip"], encoder)
    card = json.loads((folder / "reward_card.json").read_text())
    wrong = {**card["golden"], "mean": [[9, 9], [9, 9]]}
    damaged = "not a reward model's card"
    cases = [({"sha256": "0"}, "not those of their card"), ({"width": 9}, damaged), ({"golden": {}}, damaged), ({"golden": wrong}, "golden scores")]
    for change, message in cases:
        (folder / "reward_card.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(UserError, match=message):
            load_pooled(folder, fps=12.0)
