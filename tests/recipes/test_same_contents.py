"""A run goes on with the contents it was begun with, wherever they lie: paths may change, what they hold may not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from align.run import Run
from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import dpo, latent_reward, reward_model, sft, vlm_reward
from recipes.cli import main as rushes
from recipes.shapes.prompts import make_prompts
from reward.comparisons import Clip, Prompt, RankingEvent, load_comparisons, write_comparisons
from reward.safety.head import Head, load_look, save_filter
from reward.safety.policy import load_policy
from tests.recipes.small import SAMPLER, dazzled, run_small, save_small_network, save_small_reward_model
from tests.reward import tiny_encoders

NOTES = ("model", "reward", "guard", "hazard")


def save_hazard(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    save_filter(folder, Head(("P05", "P17"), 8, 4), load_look("", fps=12.0, seconds=1.0), fps=12.0, seconds=1.0, facts={"policy_version": load_policy().version})
    return folder


def save_given(folder: Path, seed: int) -> Path:
    """What the paths of a run of RL name."""
    folder.mkdir()
    save_small_network(folder / "network.safetensors", seed)
    for k, name in enumerate(("reward", "guard")):
        save_small_reward_model(folder / name, seed=2 * seed + k)
    save_hazard(folder / "hazard", seed)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of each: `one` and `other`; and `begun`, a run of one update with the first."""
    folder = tmp_path_factory.mktemp("given")
    for seed, name in enumerate(("one", "other")):
        save_given(folder / name, seed)
    assert rushes(words(folder / "one", folder / "begun")) == 0
    return folder


def words(given: Path, out: Path, **changed: Path) -> list[str]:
    policy = {"iterations": 1, "prompts": 2, "group_size": 2, "micro_batch": 4, "lora_rank": 2, "evaluate_every": 9}
    paths = {"model": given / "network.safetensors", "reward": given / "reward", "guard": given / "guard", "guards.hazard": given / "hazard"} | changed
    sampler = {"steps": 2, "frames": 5, "height": 16, "width": 16}
    told: dict[str, Any] = {**{f"policy.{key}": value for key, value in policy.items()}, **{f"sampler.{key}": value for key, value in sampler.items()}}
    told |= {**paths, "prompt_pool": 4, "held_out_prompts": 2, "guards.watch": "false", "out": out}
    return ["nft", *(word for key, value in told.items() for word in (f"--{key}", str(value)))]


@pytest.mark.parametrize(("key", "file"), [("model", "network.safetensors"), ("reward", "reward"), ("guard", "guard"), ("guards.hazard", "hazard")])
def test_a_run_does_not_go_on_with_another_model_or_reward_at_a_path_that_may_change(key: str, file: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(given / "begun", tmp_path / "out")
    before = (out / "run.json").read_bytes()
    assert rushes([*words(given / "one", out, **{key: given / "other" / file}), "--resume"]) == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"was begun with another `{key.rpartition('.')[2]}` than there is now" in said and (out / "run.json").read_bytes() == before


def test_a_run_does_not_go_on_without_its_guard(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(given / "begun", tmp_path / "out")
    assert rushes([*words(given / "one", out), "--guard", "null", "--resume"]) == 2
    assert "another `guard`" in capsys.readouterr().err


def test_moved_folders_and_runs_that_noted_nothing_go_on(given: Path, tmp_path: Path) -> None:
    moved, out = shutil.copytree(given / "one", tmp_path / "moved"), shutil.copytree(given / "begun", tmp_path / "out")
    told = json.loads((out / "run.json").read_text())
    noted = {name: told.pop(name) for name in NOTES}
    assert all(isinstance(value, str) and value for value in noted.values())
    for before in (told | noted, told):
        (out / "run.json").write_text(json.dumps(before))
        assert rushes([*words(moved, out), "--resume"]) == 0
        assert {name: json.loads((out / "run.json").read_text())[name] for name in NOTES} == noted, "from now on it is noted"


def test_the_card_of_a_policy_names_the_prompts_that_it_learned_from(given: Path) -> None:
    prompts = make_prompts(4, seed=0, split="train", two_objects=0.2, strobe=0.2)
    card = json.loads((given / "begun" / "network.json").read_text())
    assert card["data_sha256"] == hashlib.sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest()


# Rankings


def rank(folder: Path, numbers: range) -> None:
    """Of some prompts, two clips each: the first is better."""
    new = [NewClip(torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(k)), f"x {k // 2}", f"p{k // 2}", k, {}, "t", 12.0) for k in range(2 * len(numbers))]
    rows = ClipStore(folder / "clips").add_many(new, preview=False)
    events = [RankingEvent(f"e{i}", f"t{i}", f"p{i}", "ann", (rows[2 * i].clip_id, rows[2 * i + 1].clip_id), (1, 2), licence="CC0-1.0") for i in numbers]
    write_comparisons(folder / "rankings", events, clips=[Clip.of(row) for row in rows], prompts=[Prompt(f"p{i}", f"x {i}") for i in numbers], shares=(0.8, 0.1, 0.1))


def rank_again(folder: Path) -> None:
    """Somebody else answers about clips that were ranked before."""
    old = load_comparisons(folder / "rankings").events
    events = [RankingEvent(f"again-{event.event_id}", event.task_id, event.prompt_id, "else", event.clip_ids, (2, 1), licence="CC0-1.0") for event in old]
    write_comparisons(folder / "rankings", events, clips=(), prompts=())


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    rank(tmp_path, range(12))
    return tmp_path


@pytest.mark.parametrize("tier", ["matcher", "encoders"])
def test_a_reward_model_does_not_go_on_with_grown_rankings(tier: str, ranked: Path) -> None:
    encoders: dict[str, Any] = {}
    if tier == "encoders":
        tiny_encoders.save("siglip_vision_model", ranked / "encoder")
        encoders = {"encoders": {"checkpoints": [str(ranked / "encoder")], "cache": ranked / "features", "epochs": 1}}
    told = {"out": ranked / "out", "comparisons": ranked / "rankings", "clips": ranked / "clips", "checks": 0, **encoders}
    cfg = reward_model.Config.model_validate(told)
    reward_model.main(cfg)
    rank_again(ranked)
    with pytest.raises(UserError, match="begun with another `answers`"):
        reward_model.main(cfg, resume=True)


def test_preferences_are_not_gone_on_with_from_grown_rankings(ranked: Path) -> None:
    told = {"comparisons": ranked / "rankings", "clips": ranked / "clips", "runner": dazzled(2.0)}
    few = {"pairs": 4, "save_every": 1}
    run_small(dpo, ranked / "out", few, **told)
    run_small(dpo, ranked / "out", few, resume=True, **told)
    rank_again(ranked)
    with pytest.raises(UserError, match="begun with another `answers`"):
        run_small(dpo, ranked / "out", few, resume=True, **told)


# Where a run is too long for a test: one that was begun with something else


def begun(cfg: Any, seed: int, **noted: Any) -> None:
    run = Run(cfg.out, cfg, seed=seed, resume=False, metrics={}, quiet=True)
    for name, value in noted.items():
        run.note(name, value)
    for _ in run.iterations(1, save_every=1, label="begun"):
        pass


def test_fine_tuning_does_not_go_on_with_another_model(given: Path, tmp_path: Path) -> None:
    cfg = sft.Config(out=tmp_path / "out", model=given / "one" / "network.safetensors", clips=4)
    begun(cfg, cfg.seed, model="another")
    with pytest.raises(UserError, match="begun with another `model`"):
        sft.main(cfg, resume=True)


def test_a_vision_language_reward_does_not_go_on_with_grown_rankings(ranked: Path) -> None:
    frames = {"fps": 4.0, "min_frames": 2, "max_frames": 16, "min_pixels": 64, "max_pixels": 1024}
    cfg = vlm_reward.Config.model_validate({"out": ranked / "out", "comparisons": ranked / "rankings", "clips": ranked / "clips", "base": "nobody/nothing", "frames": frames})
    begun(cfg, cfg.seed, answers="others")
    with pytest.raises(UserError, match="begun with another `answers`"):
        vlm_reward.main(cfg, resume=True)


@pytest.mark.parametrize("name", ["model", "reward", "clips"])
def test_a_latent_reward_does_not_go_on_with_another_model_reward_or_store(name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_reward, "make_scored", lambda *_: None)
    ClipStore(tmp_path / "clips").add_many([NewClip(torch.rand(5, 3, 16, 16), "x", "x", 0, {}, "t", 12.0)], preview=False)
    one = given / "one"
    told = {"out": tmp_path / "out", "model": one / "network.safetensors", "reward": one / "reward", "clips": tmp_path / "clips", "sampler": SAMPLER}
    cfg = latent_reward.Config.model_validate(told)
    begun(cfg, cfg.seed, **{name: "another"})
    with pytest.raises(UserError, match=f"begun with another `{name}`"):
        latent_reward.main(cfg, resume=True)


# The guard


def test_what_is_climbed_does_not_watch_itself(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = shutil.copytree(given / "one" / "reward", tmp_path / "copied")
    assert rushes(words(given / "one", tmp_path / "out", guard=copied)) == 2
    assert f"the guard has the weights of the reward model, {copied}" in capsys.readouterr().err and not (tmp_path / "out").exists()
