"""The reward model on frozen encoders, end to end on random tiny checkpoints: what people plainly prefer is learned, and nothing is encoded twice."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import dump, leaves, load
from align.run import read_metrics
from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import reward_encoders
from recipes.reward_encoders import frame_rate_of
from recipes.reward_model import Config, Encoders, held_out_nll, main
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent, write_comparisons
from reward.encoders import Encoder
from reward.pooled import load_pooled
from tests.reward import tiny_encoders as tiny

PROMPTS, CLIPS = 60, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prompts, 4 clips each: a bar on a grey ground that moves by its own step, in its own brightness. Somebody likes bright clips, with Gumbel noise; what is close ties."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    new, worth = [], []
    x = torch.arange(32)
    for i in range(PROMPTS):
        for j in range(CLIPS):
            bright, step = rng.random(), int(rng.integers(4))
            bar = torch.stack([((x - 3 - step * t) % 32 < 6).float() for t in range(5)])  # [T,W]
            ground = 0.2 + 0.05 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(CLIPS * i + j))  # no two clips are alike
            video = ground + 0.6 * bright * bar[:, None, None, :]
            new.append(NewClip(video, f"a bar {i}", f"p{i}", j, {"steps": 1}, "test", 12.0))
            worth.append(10 * bright)
    rows = ClipStore(folder / "clips").add_many(new, preview=False)
    events = []
    for i in range(PROMPTS):
        told = np.array(worth[CLIPS * i : CLIPS * i + CLIPS]) + rng.gumbel(size=CLIPS)
        ranks = tuple(1 + sum(bool(other > own + 0.3) for other in told) for own in told)
        events.append(RankingEvent(f"e{i}", f"t{i}", f"p{i}", "ann", tuple(row.clip_id for row in rows[CLIPS * i : CLIPS * i + CLIPS]), ranks, licence="CC0"))
    write_comparisons(folder / "rankings", events, clips=[Clip.of(row) for row in rows], prompts=[Prompt(f"p{i}", f"a bar {i}") for i in range(PROMPTS)])
    for family in tiny.FAMILIES:
        tiny.save(family, folder / family)
    return folder


def config(world: Path, out: Path, *families: str, epochs: int = 20, **changes: Any) -> Config:
    encoders = Encoders(checkpoints=tuple(str(world / family) for family in families), cache=world / "features", width=16, epochs=epochs, learning_rate=0.01, members=3, **changes)
    return Config(out=out, comparisons=world / "rankings", clips=world / "clips", encoders=encoders)


@pytest.fixture(scope="module")
def first(world: Path) -> dict[str, Any]:
    """A run on all families, which fills the cache for the tests after it."""
    return main(config(world, world / "first", *tiny.FAMILIES, epochs=4))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_people_plainly_prefer_is_learned_on_every_family(world: Path, first: dict[str, Any], tmp_path: Path, family: str) -> None:
    result = main(config(world, tmp_path / "out", family))
    assert result["accuracy"]["low"] > 0.5 and result["accuracy"]["mean"] > 0.65, result["accuracy"]
    assert set(result["floors"]) == {"tie_share", "prompt_only", "signal_only"} and result["floors"]["prompt_only"]["mean"] == 0.5
    model = load_pooled(tmp_path / "out", fps=12.0)
    shades = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1, 1).expand(2, 5, 3, 32, 32)
    scores = model(shades, ["a bar"] * 2)
    assert torch.isfinite(scores.mean).all() and (scores.spread > 0).all()
    card = json.loads((tmp_path / "out" / "reward_card.json").read_text())
    assert card["encoders"][0]["family"] == family and card["licences"] == ["CC0"] and card["fps"] == [12.0] and sum(card["answers"].values()) == PROMPTS
    assert card["measured"]["accuracy"] == result["accuracy"]
    made, again = (leaves(dump(cfg)) for cfg in (config(world, tmp_path / "out", family), load(Config, None, shlex.split(card["command"])[2:])))
    assert card["command"].startswith("rushes reward-model --") and card["config"] == {key: again[key] for key in card["config"]} == {key: made[key] for key in card["config"]}
    assert set(made) - set(card["config"]) == {"out", "comparisons", "clips", "matcher", "encoders.cache"}, "all but where things lie"


def test_all_families_learn_together_and_a_second_run_encodes_and_decodes_nothing(
    world: Path, first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = [line["held_out_nll"] for line in read_metrics(world / "first")]
    assert len(log) >= 2 and min(log[1:]) < log[0]
    told = json.loads((world / "first" / "reward_card.json").read_text())["cache"]
    assert told == {"hits": 0, "misses": PROMPTS * (CLIPS * 6 + 3), "damaged": 0}, "five encoders and the signals of each clip, three encoders of each prompt"
    for kind, name in ((Encoder, "clips"), (Encoder, "texts"), (ClipStore, "load")):
        monkeypatch.setattr(kind, name, lambda *_: pytest.fail("it is kept"))
    monkeypatch.setattr("reward.pooled.golden_scores", lambda scorer: {"mean": [], "spread": []})
    second = main(config(world, tmp_path / "b", *tiny.FAMILIES, epochs=4))
    assert {**second, "out": "", "seconds": 0} == {**first, "out": "", "seconds": 0}
    assert (world / "first" / "reward_model.safetensors").read_bytes() == (tmp_path / "b" / "reward_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "b" / "reward_card.json").read_text())["cache"]["misses"] == 0


def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(world: Path, first: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(out: str) -> Config:
        return config(world, tmp_path / out, "clip", epochs=4).model_copy(update={"save_every": 2})

    main(settings("whole"))
    calls: list[int] = []

    def cut_off(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("cut off")
        return held_out_nll(*arguments)

    monkeypatch.setattr(reward_encoders, "held_out_nll", cut_off)
    with pytest.raises(RuntimeError, match="cut off"):
        main(settings("broken"))
    monkeypatch.undo()
    main(settings("broken"), resume=True)
    whole, broken = ((tmp_path / name / "reward_model.safetensors").read_bytes() for name in ("whole", "broken"))
    assert whole == broken


def test_half_precision_features_are_kept_and_told(world: Path, tmp_path: Path) -> None:
    main(config(world, tmp_path / "out", "clip", epochs=1, dtype="float16"))
    assert json.loads((tmp_path / "out" / "reward_card.json").read_text())["encoders"][0]["dtype"] == "float16"
    assert load_pooled(tmp_path / "out", fps=12.0).encoders[0].dtype == "float16"


def test_clips_of_several_frame_rates_are_refused(world: Path, tmp_path: Path) -> None:
    rows = ClipStore(world / "clips").rows()[:2]
    clips = [Clip.of(row) for row in rows]
    clips[0] = Clip(**{**clips[0].__dict__, "fps": 8.0})
    event = RankingEvent("e", "t", "p0", "ann", tuple(clip.clip_id for clip in clips), (1, 2))
    write_comparisons(tmp_path / "rankings", [event], clips=clips, prompts=[Prompt("p0", "x")], shares=(1.0, 0.0, 0.0))
    with pytest.raises(UserError, match="the ranked clips have 8, 12 frames a second"):
        main(config(world, tmp_path / "out", "clip").model_copy(update={"comparisons": tmp_path / "rankings"}))


def test_rates_that_containers_round_are_one_rate() -> None:
    clips = {name: Clip(name, "x", "p", fps=fps) for name, fps in {"a": 24.0, "b": 24000 / 1001, "c": 23.976, "d": 24.0}.items()}
    event = RankingEvent("e", "t", "p", "ann", tuple(clips), (1, 2, 3, 4))
    assert frame_rate_of(Comparisons((event,), clips, {}, {}, {}, {}), [event]) == 24.0


def test_an_encoder_that_is_not_there_is_one_line(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no encoder") as error:
        main(config(world, tmp_path / "out", "nothing"))
    assert "\n" not in str(error.value)
