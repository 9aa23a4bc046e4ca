"""The reward model's recipe, end to end on a small clip store with planted tastes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.run import Run
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.video.store import ClipStore, NewClip
from recipes import reward_model
from recipes.match import change
from recipes.reward_model import Config, main
from recipes.shapes.prompts import ShapesPrompt, Thing, make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.comparisons import Clip, Prompt, RankingEvent, write_comparisons
from reward.matcher import Matcher, MatcherSize, save_matcher
from reward.model import RewardModel, load_reward_model

SMALL = MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts, 4 clips each: right, wrong colour, wrong shape, both wrong. Two people dislike what is wrong, with Gumbel noise; what is close in worth ties."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    asked = make_prompts(40, seed=5, split="train")
    new = []
    for prompt in asked:
        for j, wrong in enumerate(([], ["color"], ["shape"], ["color", "shape"])):
            things = prompt.things
            for attribute in wrong:
                things = change(things, attribute, rng, unseen=True)  # type: ignore[arg-type]
            shown = ShapesPrompt(prompt.prompt_id, prompt.text, things, False, "train")
            video = render(sample_scene(shown, rng, clip=DEMO_CLIP), DEMO_CLIP)
            new.append(NewClip(video, prompt.text, prompt.prompt_id, j, {"steps": 1}, "test", 12.0))
    rows = ClipStore(folder / "clips").add_many(new, preview=False)
    events = []
    for i, prompt in enumerate(asked):
        for person in ("ann", "bob"):
            worth = np.array([0, -2.5, -2, -4.5]) + rng.gumbel(size=4)
            ranks = tuple(1 + sum(bool(other > own + 0.3) for other in worth) for own in worth)
            events.append(RankingEvent(f"{i}-{person}", f"t{i}", prompt.prompt_id, person, tuple(row.clip_id for row in rows[4 * i : 4 * i + 4]), ranks))
    prompts = [Prompt(prompt.prompt_id, prompt.text) for prompt in asked]
    write_comparisons(folder / "rankings", events, clips=[Clip.of(row) for row in rows], prompts=prompts)
    torch.manual_seed(0)
    save_matcher(folder / "matcher.safetensors", Matcher(SMALL))
    return folder


def config(world: Path, out: Path, **changes: object) -> Config:
    return Config(out=out, comparisons=world / "rankings", clips=world / "clips", matcher=world / "matcher.safetensors").model_copy(update=changes)


def test_what_people_like_is_learned_beyond_the_floor_from_the_shipped_matcher(world: Path, tmp_path: Path) -> None:
    result = main(config(world, tmp_path / "a", matcher=None, epochs=1))
    assert result["accuracy"]["low"] > result["floor"]["high"], result
    assert result["accuracy"]["mean"] > 0.7 and result["ceiling"]["mean"] > 0.7
    assert result["floors"]["prompt_only"]["mean"] == 0.5 and 0 < result["floors"]["tie_share"]["mean"] < 0.3

    model = load_reward_model(tmp_path / "a", TextEncoder())
    card = json.loads((tmp_path / "a" / "reward_card.json").read_text())
    assert sum(card["answers"].values()) == 80 and card["measured"]["accuracy"] == result["accuracy"]
    misfit = card["misfit"]["overall"]
    assert misfit["pairs_judged_by_several"] == 6 * card["answers"]["train"] / 2 and misfit["std"] == pytest.approx(float(model.misfit / model.temperature))
    right, wrong = Thing("circle", "red", "left"), Thing("circle", "blue", "left")
    scenes = [sample_scene(ShapesPrompt("", "", (thing,), False, "train"), np.random.default_rng(3), clip=DEMO_CLIP) for thing in (right, wrong)]
    scores = model(torch.stack([render(scene, DEMO_CLIP) for scene in scenes]), ["a red circle moves left"] * 2)
    assert scores.mean[0] > scores.mean[1] and (scores.spread > 0).all()


def test_a_run_repeats_to_the_bit(world: Path, tmp_path: Path) -> None:
    first, second = (main(config(world, tmp_path / name, epochs=1)) for name in "ab")
    assert (tmp_path / "a" / "reward_model.safetensors").read_bytes() == (tmp_path / "b" / "reward_model.safetensors").read_bytes()
    assert {**first, "out": "", "seconds": 0} == {**second, "out": "", "seconds": 0}


def test_what_fitting_the_head_left_of_a_gradient_is_no_part_of_a_step(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first one after a resume, either: a killed run would end with other weights."""
    fit, step, norms = reward_model.fit_head, Run.step, []

    def fit_and_leave(cfg: Config, model: RewardModel, train: Any) -> None:
        fit(cfg, model, train)
        assert model.log_tie.grad is not None
        model.log_tie.grad.fill_(1e6)

    def one_step(self: Run, *arguments: Any, **named: Any) -> float:
        norms.append(step(self, *arguments, **named))
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "fit_head", fit_and_leave)
    monkeypatch.setattr(Run, "step", one_step)
    with pytest.raises(KeyboardInterrupt):
        main(config(world, tmp_path, epochs=1, batch=8))
    assert 0 < norms[0] < 100


def test_too_few_prompts_to_hold_any_out_still_give_a_model_and_an_unknown_accuracy(world: Path, tmp_path: Path) -> None:
    store = ClipStore(world / "clips")
    ids = [row.clip_id for row in store.rows()[:4]]
    folder = tmp_path / "few"
    write_comparisons(
        folder,
        [RankingEvent("e", "t", store.rows()[0].prompt_id, "ann", tuple(ids), (1, 2, 3, 4))],
        clips=[Clip.of(row) for row in store.rows()[:4]],
        prompts=[Prompt(store.rows()[0].prompt_id, "x")],
        shares=(1.0, 0.0, 0.0),
    )
    result = main(config(world, tmp_path / "out", comparisons=folder, epochs=1))
    assert math.isnan(result["accuracy"]["mean"]) and math.isfinite(result["normalisation"]["overall"]["scale"])
    assert json.loads((tmp_path / "out" / "reward_card.json").read_text())["calibrated_on"].startswith("train")


def test_missing_input_is_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        main(config(world, tmp_path / "out", comparisons=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no such weights"):
        main(config(world, tmp_path / "out", matcher=tmp_path / "no.safetensors"))


def test_a_commercial_run_refuses_answers_whose_licence_forbids_it_or_is_unknown(tmp_path: Path) -> None:
    clips, prompts = [Clip(name, f"{name}.mkv", "p") for name in "ab"], [Prompt("p", "a cat")]
    events = [
        RankingEvent(f"e{licence}", "t", "p", "ann", ("a", "b"), (1, 2), source_dataset="their data", licence=licence, kind="pair", choice="A")
        for licence in ("CC-BY-NC-4.0", "", "Apache-2.0")
    ]
    write_comparisons(tmp_path / "rankings", events, clips=clips, prompts=prompts, shares=(1, 0, 0))
    settings = {"out": tmp_path / "out", "comparisons": tmp_path / "rankings", "clips": tmp_path / "clips"}
    with pytest.raises(UserError, match=r"1 answers of their data under no licence \(unknown\); 1 answers of their data under CC-BY-NC-4.0 \(non-commercial\), .*rankings"):
        main(Config(**settings, commercial=True))
    with pytest.raises(UserError, match=r"a\.mkv"):
        main(Config(**settings))  # goes on, to the clip that is not there
    assert not (tmp_path / "out").exists()
