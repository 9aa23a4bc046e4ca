"""The prompts of a bias audit: what they leave open, what sets differ in, and drawn clips that show what was planted."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from recipes.shapes.bank import VALUES, Attribute, Open, counterfactual_sets, draw, keeps, leave_open, open_prompts, scene_in_all_values, shown, skewed_pairs
from recipes.shapes.prompts import COLOR_WORDS, SHAPE_WORDS, Thing
from recipes.shapes.render import DEMO_CLIP, render

WORDS = {"colour": COLOR_WORDS, "shape": SHAPE_WORDS}


def said(text: str, attribute: Attribute) -> list[str]:
    """Words of the attribute's vocabulary in a sentence."""
    known = {word for row in WORDS[attribute].values() for word in row}
    return [word for word in text.replace(",", " ").split() if word in known]


@pytest.mark.parametrize("attribute", ["colour", "shape"])
def test_open_prompts_differ_and_say_nothing_of_the_attribute(attribute: Attribute) -> None:
    found = open_prompts(120, attribute, seed=3)
    assert len({asked.text for asked in found}) == 120 and not any(said(asked.text, attribute) for asked in found)
    other: Attribute = "shape" if attribute == "colour" else "colour"
    assert all(len(said(asked.text, other)) == 1 for asked in found), "what is not left open is still said"
    assert open_prompts(40, attribute, seed=3) == found[:40] and open_prompts(40, attribute, seed=4) != found[:40]
    assert not any(" a a" in asked.text or "  " in asked.text for asked in found)
    assert attribute == "shape" or not any(" an " in f" {asked.text} " for asked in found), "no shape begins with a vowel"


def test_sentences_stay_sentences() -> None:
    assert leave_open("watch how an emerald disc rises", "colour") == "watch how a disc rises"
    assert leave_open("a circle in red that grows", "colour") == "a circle that grows"
    assert leave_open("an emerald disc rises", "shape") == "an emerald thing rises"


@pytest.mark.parametrize("attribute", ["colour", "shape"])
def test_prompts_of_a_set_differ_in_the_attribute_alone(attribute: Attribute) -> None:
    for prompts in counterfactual_sets(20, attribute, seed=0):
        assert len({leave_open(prompt.text, attribute) for prompt in prompts}) == 1
        values = [prompt.things[0].color if attribute == "colour" else prompt.things[0].shape for prompt in prompts]
        assert tuple(values) == VALUES[attribute]


def test_the_judge_reads_what_was_drawn_and_that_it_stays() -> None:
    rng = np.random.default_rng(0)
    asked = Open("a circle moves left", Thing("circle", "blue", "left"))
    clip = draw(asked, rng)
    assert shown(clip, "colour") == "blue" and shown(clip, "shape") == "circle" and keeps(clip, "colour") == 1
    scenes = [render(scene, DEMO_CLIP) for scene in scene_in_all_values(asked, "colour", rng)]
    assert [shown(each, "colour") for each in scenes] == list(VALUES["colour"])
    turning = torch.cat([scenes[0][:7], scenes[2][7:]])
    assert keeps(turning, "colour") == 0, "red turns blue half way"
    blank = torch.full_like(clip, 0.3)
    assert shown(blank, "colour") == "nothing" and math.isnan(keeps(blank, "colour"))


def test_planted_shares_are_in_the_clips_of_captions_that_leave_them_open() -> None:
    clips = skewed_pairs(240, {"red": 0.7, "blue": 0.3}, "colour", seed=0)
    seen: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for text, video in zip(clips.texts, clips.videos, strict=True):
        seen[not said(text, "colour")][shown(video.float() / 255, "colour")] += 1
    total = sum(seen[True].values())
    assert 90 <= total <= 150 and set(seen[True]) <= {"red", "blue"} and seen[True]["red"] / total == pytest.approx(0.7, abs=0.13)
    assert len(set(seen[False]) & set(VALUES["colour"])) == 6, "captions that name a colour name all of them"
    assert skewed_pairs(5, {"red": 0.7, "blue": 0.3}, "colour", seed=0).texts == clips.texts[:5]
