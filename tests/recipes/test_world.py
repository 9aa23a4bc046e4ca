"""What a model keeps track of: the scores of clips whose truth is known, and the command's table."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from base_model.tiny import load_tiny
from base_model.types import ClipShape
from recipes import evaluate
from recipes.generate import Sampler
from recipes.shapes.events import EVENTS, Event, sample_event
from recipes.shapes.render import render
from recipes.world import AFTER, AHEAD, GIVEN, MEASURES, SECONDS, Case, continue_cases, continue_lives, draw_cases, draw_lives, lasting, measure_bounds, measure_world, score
from tests.recipes.small import save_small_network, small_model


@pytest.fixture(scope="module")
def cases() -> dict[Event, list[Case]]:
    return {event: draw_cases(event, 6, seed=1) for event in EVENTS}


def held(case: Case) -> Tensor:
    """The last given frame to the end."""
    return torch.cat([case.video[:GIVEN], case.video[GIVEN - 1].expand(len(case.video) - GIVEN, -1, -1, -1)])


@pytest.mark.parametrize("event", EVENTS)
def test_the_true_clip_keeps_everything_and_one_that_stands_still_keeps_nothing(cases: dict[Event, list[Case]], event: Event) -> None:
    for case in cases[event]:
        assert set(score(case, case.video).values()) <= {1.0} or all(math.isnan(value) for value in score(case, case.video).values())
        assert set(score(case, held(case)).values()) <= {0.0} or all(math.isnan(value) for value in score(case, held(case)).values())
    assert sum(next(iter(score(case, case.video).values())) == 1.0 for case in cases[event]) >= 5


def test_a_thing_that_comes_back_in_another_colour_is_not_the_same(cases: dict[Event, list[Case]]) -> None:
    for case in cases["occlusion"]:
        swapped = case.video.clone()
        swapped[-AFTER:] = swapped[-AFTER:, [1, 2, 0]]
        assert score(case, swapped) == {"permanence": 0.0, "identity": 0.0}


def test_a_thing_that_comes_back_with_another_shape_is_there_and_is_not_the_same(cases: dict[Event, list[Case]]) -> None:
    for index, case in enumerate(cases["occlusion"]):
        clip = ClipShape(len(case.video), *case.video.shape[-2:])
        scene = sample_event("occlusion", np.random.default_rng([1, index, EVENTS.index("occlusion")]), clip=clip, split="eval").scene
        assert torch.equal(render(scene, clip), case.video)
        front, back = scene.bodies
        other = replace(back, thing=replace(back.thing, shape="bar" if back.thing.shape != "bar" else "pillar"))
        assert score(case, render(replace(scene, bodies=(front, other)), clip)) == {"permanence": 1.0, "identity": 0.0}


def test_a_camera_that_pans_the_other_way_or_stops_or_moves_both_alike_shows_no_parallax(cases: dict[Event, list[Case]]) -> None:
    for case in cases["parallax"]:
        axis = -1 if case.video.shape[-1] > case.video.shape[-2] else -2
        alike = torch.cat([case.video[:GIVEN], *(torch.roll(case.video[GIVEN - 1 : GIVEN], 1 + k // 4, axis) for k in range(len(case.video) - GIVEN))])
        assert score(case, alike) == {"parallax": 0.0}
        back, stuck = case.video.clone(), case.video.clone()
        back[-1] = case.video[0]
        stuck[GIVEN + 1 :] = case.video[GIVEN]
        assert score(case, back) == score(case, stuck) == {"parallax": 0.0}


def test_a_life_lasts_while_the_thing_alone_is_there_unchanged() -> None:
    life = draw_lives(1, seed=3)[0]
    frames = life.head[:1].expand(12 * max(SECONDS), -1, -1, -1).clone()
    assert [lasting(life, frames, s) for s in SECONDS] == [1.0] * len(SECONDS)
    frames[30:] = frames[30:, [1, 2, 0]]
    assert [lasting(life, frames, s) for s in SECONDS] == [1.0] + [0.0] * (len(SECONDS) - 1)


def test_a_model_goes_on_from_what_is_given_and_hears_its_words() -> None:
    model, sampler, events = load_tiny(), Sampler(steps=2), [draw_cases(event, 2, seed=2)[1] for event in EVENTS]
    told, again, untold = (continue_cases(model, events, sampler, words=words, seed=0) for words in (True, True, False))
    assert [clip.shape for clip in told] == [case.video.shape for case in events]
    assert all(torch.equal(a, b) for a, b in zip(told, again, strict=True)) and not any(torch.equal(a, b) for a, b in zip(told, untold, strict=True))
    lives = draw_lives(2, seed=2)
    long = continue_lives(model, lives, sampler, seed=0)
    assert all(len(clip) == 12 * max(SECONDS) and torch.equal(clip[:AHEAD], life.head) for clip, life in zip(long, lives, strict=True))


def test_the_codec_lets_nearly_all_of_it_through_and_holding_still_reaches_nothing() -> None:
    scores = measure_bounds(small_model(), [case for event in EVENTS for case in draw_cases(event, 12, seed=5)])
    through, still = scores.values()
    assert set(through) == set(still) == {"permanence", "identity", "state", "state and shapes", "parallax"}
    assert all(sum(value == 1.0 for value in values) >= 9 for values in through.values())
    assert not any(value == 1.0 for values in still.values() for value in values)


def test_the_table_has_a_row_a_measure_with_and_without_words_and_is_the_same_again() -> None:
    models = {"base": small_model(), "sft": small_model(1)}
    rows = measure_world(models, Sampler(steps=1), scenes=2, seed=0)
    assert [(row["measure"], row["words"]) for row in rows] == [(m, w) for m in MEASURES for w in ((True, False) if not m.startswith("lasts") else (True,))]
    assert all(set(row["models"]) >= {"base", "sft"} for row in rows) and len(rows[0]["models"]) == 4
    assert rows == measure_world(models, Sampler(steps=1), scenes=2, seed=0)


def test_the_command_adds_the_world_to_the_report(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "sft.safetensors")
    cfg = evaluate.Config(
        out=tmp_path / "out", models={"sft": network}, prompts=2, clips_per_prompt=1, judge_check=0, shown=0, world=True, world_scenes=2, sampler=Sampler(steps=1)
    )
    answer = evaluate.main(cfg)
    stored, page = json.loads((tmp_path / "out" / "report.json").read_text()), (tmp_path / "out" / "index.html").read_text()
    assert stored["world"] == answer["world"] and stored["world"][0]["measure"] == "permanence"
    assert page.count(MEASURES["permanence"]) == 1 and "codec alone" in page
