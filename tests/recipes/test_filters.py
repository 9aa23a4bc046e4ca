"""Named filters reach every runner, and what ruled reaches the record of every recipe that takes gradient steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import demo, evaluate
from recipes.cli import main as rushes
from recipes.filters import Filters, lineage_of_clips, read_lineage
from recipes.generate import safety_runner
from recipes.pairs import save_pairs
from recipes.shapes.dataset import draw_clips
from reward.comparisons import Clip, Prompt, RankingEvent, write_comparisons
from reward.safety.contract import Verdict, to_json
from reward.safety.duplicate import block, save_blocked
from reward.safety.head import Head, load_look, save_filter
from reward.safety.policy import load_policy
from tests.recipes.small import save_small_network, save_small_reward_model
from tests.reward import tiny_encoders
from tests.reward.guards import tiny_guards

POLICY = load_policy()
BUILT_IN = ["prompt-words", "flash", "degenerate"]
CALM = torch.rand(13, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 0.1 + torch.linspace(0.3, 0.6, 32)
RL = ("ddpo", "grpo", "ppo", "nft", "dpo", "reward-gradient")


def save_head(folder: Path, *, limit: float = 0.999) -> Path:
    """A trained filter on latents that has learned nothing: it says about one half, and so allows below `limit`."""
    torch.manual_seed(0)
    look, head = load_look("", fps=12.0, seconds=1.0), Head(("P05", "P17"), 8, 4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.01)
    for name in ("low", "high"):
        getattr(head, name).fill_(limit)
    save_filter(folder, head, look, fps=12.0, seconds=1.0, facts={"policy_version": POLICY.version})
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained filter, blocked clips, and what recipes start from."""
    folder = tmp_path_factory.mktemp("named")
    save_head(folder / "head")
    save_blocked(folder / "blocked.json", [block("old", "P05", CALM, 12.0)])
    save_small_network(folder / "network.safetensors")
    save_small_reward_model(folder / "reward", seed=1)
    store, runner = ClipStore(folder / "clips"), safety_runner(Filters(trained=(folder / "head",)))
    video = torch.rand(20, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    decisions = runner.check_videos(video, ["x"] * 20, 12.0)
    rows = store.add_many(
        [NewClip(clip, f"x {i // 2}", f"p{i // 2}", i, {}, "t", 12.0, safety=to_json(d)) for i, (clip, d) in enumerate(zip(video, decisions, strict=True))], preview=False
    )
    events = [RankingEvent(f"e{i}", f"t{i}", f"p{i}", "ann", (rows[2 * i].clip_id, rows[2 * i + 1].clip_id), (1, 2)) for i in range(10)]
    write_comparisons(folder / "rankings", events, clips=[Clip.of(row) for row in rows], prompts=[Prompt(f"p{i}", f"x {i}") for i in range(10)], shares=(0.8, 0.1, 0.1))
    tiny_encoders.save("siglip_vision_model", folder / "encoder")
    save_pairs(folder / "pairs", draw_clips("curated", 6, seed=0))
    (folder / "pairs" / "safety.json").write_text(json.dumps(runner.lineage()))
    return folder


def words_of(recipe: str, named: Path, out: Path) -> list[str]:
    """A run of one step or none."""
    common = [recipe, "--out", str(out)]
    if recipe == "sft":
        return [*common, "--model", str(named / "network.safetensors"), "--data", str(named / "pairs"), "--fit.iterations", "1", "--fit.held_out", "2"]
    if recipe.startswith("reward-model"):
        encoder = ["--encoders.checkpoints", json.dumps([str(named / "encoder")]), "--encoders.cache", str(out.parent / "features"), "--encoders.epochs", "1"]
        rankings = ["--comparisons", str(named / "rankings"), "--clips", str(named / "clips"), "--checks", "0"]
        return ["reward-model", "--out", str(out), *rankings, *(encoder if recipe.endswith("encoders") else [])]
    policy = {"iterations": 1, "prompts": 2, "group_size": 2, "micro_batch": 2, "evaluate_every": 9, "lora_rank": 2}
    sampler = {"steps": 3, "frames": 5, "height": 16, "width": 16}
    told = {**{f"policy.{key}": value for key, value in policy.items()}, **{f"sampler.{key}": value for key, value in sampler.items()}}
    told |= {"model": named / "network.safetensors", "reward": named / "reward", "prompt_pool": 4, "held_out_prompts": 2, "guards.watch": "false"}
    told |= {"filters.trained": json.dumps([str(named / "head")]), "filters.blocked": named / "blocked.json"}
    return [*common, *[word for key, value in told.items() for word in (f"--{key}", str(value))]]


@pytest.mark.parametrize("recipe", [*RL, "sft", "reward-model", "reward-model on encoders"])
def test_every_gradient_steps_record_names_filters_versions_limits_and_policy(named: Path, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rushes(words_of(recipe, named, tmp_path / "out")) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "out" / "run.json").read_text())["safety"]
    version = json.loads((named / "head" / "filter_card.json").read_text())["version"][:16]
    assert {"head-latent", "flash", "degenerate"} <= {each["filter"] for each in told}
    (mine,) = [each for each in told if each["filter"] == "head-latent"]
    assert (mine["version"], mine["policies"], mine["policy_version"]) == (version, ["P05", "P17"], POLICY.version) and mine["threshold"] == pytest.approx(0.999)
    assert all({"filter", "version", "threshold", "policies", "policy_version"} <= set(each) for each in told)
    if recipe in RL:
        assert "near-duplicate" in {each["filter"] for each in told}
    if not recipe.startswith("reward-model"):
        assert json.loads((tmp_path / "out" / "network.json").read_text())["safety"] == told, "the card goes with the weights"


def test_a_run_does_not_go_on_with_other_filters(named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_head(tmp_path / "head")
    words = [word.replace(str(named / "head"), str(tmp_path / "head")) for word in words_of("nft", named, tmp_path / "out")]
    assert rushes(words) == 0
    before = (tmp_path / "out" / "run.json").read_bytes()
    save_head(tmp_path / "head", limit=0.9)
    assert rushes([*words, "--resume"]) == 2
    assert "was begun with another `safety`" in capsys.readouterr().err.splitlines()[-1]
    save_head(tmp_path / "head")
    assert rushes([*words, "--resume"]) == 0 and (tmp_path / "out" / "run.json").read_bytes() == before


def test_named_filters_rule_beside_those_that_need_no_weights(named: Path, tmp_path: Path) -> None:
    runner = safety_runner(Filters(trained=(named / "head",), blocked=named / "blocked.json"))
    assert [each["filter"] for each in runner.lineage()] == [*BUILT_IN, "head-latent", "near-duplicate"]
    (copy, other) = runner.check_videos(torch.stack([CALM, CALM.flip(0).flip(2) * 0.5]), ["a", "b"], 12.0)
    assert copy.verdict == Verdict.BLOCK and any("nearly the blocked clip old" in reason.text for ruling in copy.rulings for reason in ruling.reasons)
    assert other.verdict == Verdict.ALLOW
    save_head(tmp_path / "strict", limit=0.01)
    strict = safety_runner(Filters(trained=(tmp_path / "strict",)))
    assert strict.check_videos(CALM[None], ["a"], 12.0)[0].verdict == Verdict.BLOCK


def test_guards_can_be_named(tmp_path: Path) -> None:
    tiny_guards.save_qwen(tmp_path / "qwen", steps=0)
    tiny_guards.save_shield(tmp_path / "shield")
    tiny_encoders.save("siglip", tmp_path / "siglip")
    from tests.reward.guards.test_guards import Classifier, save_classifier

    save_classifier(tmp_path / "head.safetensors", Classifier(tiny_encoders.WIDTH).eval())
    named = Filters(qwen3guard=str(tmp_path / "qwen"), shieldgemma=str(tmp_path / "shield"), siglip=str(tmp_path / "siglip"), siglip_head=tmp_path / "head.safetensors")
    assert {"qwen3guard", "shieldgemma2", "siglip-guard"} <= {str(each["filter"]) for each in safety_runner(named).lineage()}


def test_a_filter_that_is_not_there_stops_the_command_in_one_line(named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.json").write_text(json.dumps({"format": 1, "samples_a_second": 12, "clips": []}))
    for words, message in (
        (["--filters.trained", json.dumps([str(tmp_path / "none")])], "cannot read the card of the trained filter"),
        (["--filters.blocked", str(tmp_path / "none.json")], "cannot read the blocked clips"),
        (["--filters.blocked", str(tmp_path / "empty.json")], "no clip is blocked yet"),
        (["--filters.qwen3guard", str(tmp_path / "none")], "no guard"),
        (["--filters.siglip", str(tmp_path / "none")], "go together"),
    ):
        assert rushes(["generate", "--out", str(tmp_path / "out"), "--model", str(named / "network.safetensors"), *words]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
    with pytest.raises(ValidationError, match="go together"):
        Filters(siglip_head=Path("x"))


def test_generate_and_evaluate_ask_the_named_filters(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_head(tmp_path / "strict", limit=0.01)
    words = ["--filters.trained", json.dumps([str(tmp_path / "strict")]), "--sampler.steps", "2", "--sampler.frames", "5", "--sampler.height", "16", "--sampler.width", "16"]
    assert rushes(["generate", "--out", str(tmp_path / "out"), "--model", str(named / "network.safetensors"), "--clips_per_prompt", "1", *words]) == 0
    rows = ClipStore(tmp_path / "out").rows()
    assert rows and all(json.loads(row.safety_json)["verdict"] == "block" for row in rows)
    asked: list[Any] = []

    def noted(filters: Filters) -> None:
        asked.append(filters)
        raise UserError("enough")

    monkeypatch.setattr(evaluate, "safety_runner", noted)
    with pytest.raises(UserError, match="enough"):
        evaluate.main(evaluate.Config(out=tmp_path / "report", filters=Filters(trained=(tmp_path / "strict",))))
    assert asked == [Filters(trained=(tmp_path / "strict",))]


# Lineage of what is on disk


def test_filters_of_stored_clips_are_told_with_how_many_clips_they_ruled_on(named: Path, tmp_path: Path) -> None:
    rows = ClipStore(named / "clips").rows()
    told = lineage_of_clips([*rows, rows[0]])
    assert {each["filter"]: each["clips"] for each in told} == {"flash": 20, "degenerate": 20, "head-latent": 20}
    (bare,) = ClipStore(tmp_path).add_many([NewClip(CALM, "x", "p", 0, {}, "t", 12.0)], preview=False)
    assert lineage_of_clips([bare]) == [{"filter": "", "version": "", "threshold": 0.0, "policies": [], "policy_version": "", "clips": 1}]
    assert lineage_of_clips([]) == []


def test_curated_pairs_say_which_filters_they_passed(tmp_path: Path) -> None:
    demo.make_data(demo.Config(out=tmp_path, pairs=4), tmp_path / "data")
    assert [each["filter"] for each in read_lineage(tmp_path / "data")] == BUILT_IN
    assert read_lineage(None) == [] and read_lineage(tmp_path) == []
    (tmp_path / "data" / "safety.json").write_text("[")
    with pytest.raises(UserError, match="cannot read which filters the data passed"):
        read_lineage(tmp_path / "data")
