"""A vision-language reward on disk: it scores the same again, holds nothing of the base, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from base_model.errors import UserError
from base_model.prompts.vision import FAMILIES
from reward.vlm.files import WEIGHTS, load_vlm_reward, save_vlm_reward
from tests.reward.vlm.tiny import clips, save_tiny, tiny_reward

PROMPTS = ["a bright clip", "dark", "x"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and a reward trained on it."""
    folder = tmp_path_factory.mktemp("saved")
    save_vlm_reward(folder / "reward", tiny_reward(save_tiny(folder / "base", "qwen2_5_vl"), spread=True), {"seed": 3})
    return folder


def changed(folder: Path, out: Path, **values: object) -> Path:
    """A copy of the reward with other values in its card."""
    shutil.copytree(folder / "reward", out)
    card = json.loads((out / "reward_card.json").read_text())
    (out / "reward_card.json").write_text(json.dumps({**card, **values}))
    return out


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_scores_the_same_and_holds_nothing_of_the_base(family: str, nf4: bool, tmp_path: Path) -> None:
    model = tiny_reward(save_tiny(tmp_path / "base", family, width=64), spread=True, nf4=nf4, most_clips=3)
    with torch.no_grad():
        model.temperature.fill_(1.7)
        model.center.copy_(torch.tensor([0.5, -1.0]))
        model.log_tie.copy_(torch.tensor([[-0.5, -1.5], [-1.0, -2.0]]))
    card = save_vlm_reward(tmp_path / "reward", model, {"seed": 3})
    again = load_vlm_reward(tmp_path / "reward", clip_fps=8.0)
    with torch.no_grad():
        expected, found = model(clips(), PROMPTS), again(clips(), PROMPTS)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.spread, expected.spread, rtol=0, atol=1e-5)
    assert torch.equal(again.log_tie, model.log_tie) and again.dims == ("look", "match") and not any(p.requires_grad for p in again.parameters())

    tensors = safetensors.torch.load_file(tmp_path / "reward" / WEIGHTS)
    own = {"lora_A", "lora_B", "trainable_tokens_delta", "head", "log_tie", "temperature", "center", "scale"}
    assert all(any(part in name for part in own) for name in tensors) and not any("base_layer" in name or "visual" in name for name in tensors)
    assert json.loads((tmp_path / "reward" / "reward_card.json").read_text()) == card
    assert card["sampler"]["fps"] == 4.0 and card["base"]["family"] == family and card["normalisation"]["match"] == {"center": -1.0, "scale": 1.0} and card["seed"] == 3
    assert card["log_tie"]["look"] == [-0.5, -1.5] and card["temperature"]["look"] == pytest.approx(1.7) and card["adapter"]["nf4"] is nf4


def test_a_base_with_other_weights_is_refused_and_a_moved_one_is_not(saved: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "qwen2_5_vl", seed=1)
    with pytest.raises(UserError, match="its weights differ") as error:
        load_vlm_reward(saved / "reward", clip_fps=8.0, base=other)
    assert "\n" not in str(error.value) and str(saved / "base") in str(error.value)
    moved = tmp_path / "moved"
    shutil.copytree(saved / "base", moved)
    assert load_vlm_reward(saved / "reward", clip_fps=8.0, base=moved).base.name == str(moved)


def test_clips_of_a_rate_that_it_was_not_trained_to_see_are_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="2 frames a second, and the reward model looks at 4") as error:
        load_vlm_reward(saved / "reward", clip_fps=2.0)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="16 at most"):
        load_vlm_reward(saved / "reward", clip_fps=4.0)(clips(1, 20), ["x"])


def test_golden_scores_catch_another_rubric_another_sampler_and_another_tokenizer(saved: Path, tmp_path: Path) -> None:
    card = json.loads((saved / "reward" / "reward_card.json").read_text())
    changes = {
        "rubric": card["rubric"].replace("generated", "made-up"),
        "sampler": {**card["sampler"], "min_pixels": 1024},
        "fps": {**card["sampler"], "fps": 2.0},
        "golden": {**card["golden"], "mean": [[9.0, 9.0], [9.0, 9.0]]},
    }
    for name, value in changes.items():
        folder = changed(saved, tmp_path / name, **{"sampler" if name == "fps" else name: value})
        with pytest.raises(UserError, match="golden scores"):
            load_vlm_reward(folder, clip_fps=8.0)
    base = tmp_path / "base"
    shutil.copytree(saved / "base", base)
    words = json.loads((base / "tokenizer.json").read_text())
    words["model"]["merges"] = words["model"]["merges"][:10]
    (base / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="golden scores"):
        load_vlm_reward(saved / "reward", clip_fps=8.0, base=base)


def test_damaged_and_foreign_folders_are_one_line(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vision-language reward"):
        load_vlm_reward(tmp_path / "nowhere", clip_fps=8.0)
    cases = {
        "hash": ({"sha256": "0" * 64}, "not those of their card"),
        "rank": ({"adapter": {"rank": 3, "alpha": 4.0, "nf4": False, "keeps_vision": False, "positions": "grid", "spread": True}}, "not what this model learns"),
        "dimensions": ({"dimensions": [{"title": "look"}]}, "not a vision-language reward"),
        "sampler": ({"sampler": {"fps": -1}}, "not a frame sampler"),
        "base": ({"base": {}}, "not a vision-language reward's card"),
        "tier": ({"tier": "matcher"}, "of the tier 'matcher'"),
        "no rate": ({"golden": {"mean": [[0.0, 0.0]] * 2, "spread": [[0.0, 0.0]] * 2}}, "not a vision-language reward's card"),
        "no numbers": ({"golden": {"fps": 4.0, "mean": ["a"], "spread": [[0.0, 0.0]] * 2}}, "not a vision-language reward's card"),
    }
    for name, (values, match) in cases.items():
        with pytest.raises(UserError, match=match) as error:
            load_vlm_reward(changed(saved, tmp_path / name, **values), clip_fps=8.0)
        assert "\n" not in str(error.value)
    broken = changed(saved, tmp_path / "broken")
    (broken / "reward_card.json").write_text("[")
    with pytest.raises(UserError, match="not a vision-language reward's card"):
        load_vlm_reward(broken, clip_fps=8.0)
    torch.save({"a": torch.zeros(1)}, broken / WEIGHTS)
    shutil.copy(saved / "reward" / "reward_card.json", broken)
    with pytest.raises(UserError, match="pickled"):
        load_vlm_reward(broken, clip_fps=8.0)
