"""A reward model of any tier is loaded as what its card says it is, for clips of the rate it scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from recipes.scorers import TIERS, card_of, check_scorer, load_scorer, tier_of
from recipes.serve_reward import Config, in_thread, make_server
from reward.encoders import load_encoder
from reward.judges.exchange import Endpoint
from reward.judges.remote import RemoteReward
from reward.matcher import Matcher
from reward.model import RewardModel, load_reward_model, save_reward_model
from reward.pooled import PooledModel, load_pooled, save_pooled
from reward.quality import Quality
from reward.vlm.files import load_vlm_reward, save_vlm_reward
from reward.vlm.model import VlmReward
from tests.reward import tiny_encoders
from tests.reward.vlm import tiny as tiny_vlm

PROMPTS = ["a bright clip", "a dark circle moves left"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small model of each tier, for clips of 8 frames a second."""
    made = tmp_path_factory.mktemp("tiers")
    torch.manual_seed(0)
    matcher = RewardModel(Matcher(), Quality(), ("overall",), TextEncoder())
    save_reward_model(_new(made / "matcher"), matcher, {"fps": [8.0]})
    encoder = load_encoder(tiny_encoders.save("clip", made / "clip"), fps=8.0)
    save_pooled(_new(made / "encoders"), PooledModel([encoder], ("look", "match"), members=2, width=8), {"fps": [8.0]})
    base = tiny_vlm.save_tiny(made / "base", "qwen2_vl")
    save_vlm_reward(_new(made / "vlm"), tiny_vlm.tiny_reward(base), {"fps": [8.0]})
    return {tier: made / tier for tier in TIERS}


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def clips(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, 9, 3, 16, 24), generator=torch.Generator().manual_seed(seed)).float() / 255


def direct(tier: str, folder: Path) -> Any:
    loaders = {
        "matcher": lambda: load_reward_model(folder, TextEncoder()), "encoders": lambda: load_pooled(folder, fps=8.0), "vlm": lambda: load_vlm_reward(folder, clip_fps=8.0)
    }  # fmt: skip
    return loaders[tier]()


@pytest.mark.parametrize("tier", TIERS)
def test_a_model_of_every_tier_is_loaded_checked_and_served(tier: str, folders: dict[str, Path]) -> None:
    folder = folders[tier]
    scorer = load_scorer(folder)
    assert type(scorer) is {"matcher": RewardModel, "encoders": PooledModel, "vlm": VlmReward}[tier] and tier_of(card_of(folder)) == tier
    expected = direct(tier, folder)(clips(), PROMPTS)
    torch.testing.assert_close(scorer(clips(), PROMPTS), expected, rtol=0, atol=0)
    assert load_scorer(folder, fps=8.0).dims == scorer.dims

    check_scorer(folder, card_of(folder), scorer)
    with torch.no_grad():
        scorer.temperature *= 1.1
    with pytest.raises(UserError, match="golden scores of its card"):
        check_scorer(folder, card_of(folder), scorer)

    with in_thread(make_server(Config(model=folder), token=None, roots=())) as url:
        remote = RemoteReward(Endpoint(url), fps=8.0)
        torch.testing.assert_close(remote(clips(), PROMPTS), expected, rtol=0, atol=1e-6)
        assert remote.dims == scorer.dims and torch.equal(remote.center, scorer.center) and torch.equal(remote.log_tie, scorer.log_tie)


@pytest.mark.parametrize("tier", TIERS)
def test_clips_of_another_rate_are_refused(tier: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="frames a second") as caught:
        load_scorer(folders[tier], fps=3.0)
    assert "\n" not in str(caught.value)


def changed(folder: Path, made: Path, **values: Any) -> Path:
    shutil.copytree(folder, made, dirs_exist_ok=True)
    card = {**json.loads((folder / "reward_card.json").read_text()), **values}
    (made / "reward_card.json").write_text(json.dumps({key: value for key, value in card.items() if value is not None}))
    return made


def test_a_card_without_a_rate_needs_one_where_the_rate_matters(folders: dict[str, Path], tmp_path: Path) -> None:
    load_scorer(changed(folders["matcher"], tmp_path / "a", fps=None))
    load_scorer(changed(folders["matcher"], tmp_path / "a", fps=None), fps=3.0)
    load_scorer(changed(folders["matcher"], tmp_path / "b", fps=[8.0, 24.0]), fps=24.0)
    load_scorer(changed(folders["vlm"], tmp_path / "d", fps=[8000 / 1001, 8.0]))
    for rates, named in ((None, "none"), ([8.0, 24.0], "8, 24")):
        folder = changed(folders["vlm"], tmp_path / "c", fps=rates)
        with pytest.raises(UserError, match=rf"one frame rate \({named}\).*--fps"):
            load_scorer(folder)
        load_scorer(folder, fps=8.0)


def test_what_is_no_reward_model_is_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    future = changed(folders["matcher"], tmp_path / "future", tier="psychic")
    broken = changed(folders["matcher"], tmp_path / "broken")
    (broken / "reward_card.json").write_text("{")
    first = changed(folders["matcher"], tmp_path / "first", tier=None)
    assert tier_of(card_of(first)) == "matcher"
    for folder, message in (
        (tmp_path / "nowhere", "no reward model"),
        (future, "of the tier 'psychic'.*Known are matcher, encoders, vlm"),
        (broken, "not JSON"),
        (changed(folders["vlm"], tmp_path / "other", tier="encoders"), "reward model|weights"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_scorer(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no device 'cuda:77' here"):
        load_scorer(folders["vlm"], device="cuda:77")


def test_a_text_encoder_that_keeps_few_prompts_says_the_same_of_all_of_them() -> None:
    few, every = TextEncoder(keep=2), TextEncoder()
    prompts = ["a red circle", "a blue bar", "a dark clip"]
    assert torch.equal(few(prompts).text, every(prompts).text) and len(few._states) == 2
    torch.testing.assert_close(few(prompts[:1]).text, every(prompts[:1]).text, rtol=0, atol=1e-5)
