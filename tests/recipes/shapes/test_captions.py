"""Captions of the built-in world: what is read out of a text is what the grammar put into it, and no held-out combination is ever taught."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from base_model.prompts.caption import take_frames
from base_model.video.files import from_uint8
from recipes.shapes.captions import LONGEST, SIGHT, Drawn, Said, caption_of, read_caption, right, tiny_vlm
from recipes.shapes.judge import read
from recipes.shapes.prompts import COMBINATIONS, Thing, write_prompt


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_paraphrase_of_the_grammar_is_read_as_the_thing_it_was_written_for(split: str) -> None:
    for number, thing in enumerate(COMBINATIONS[split]):
        for turn in range(8):
            text = write_prompt((thing,), np.random.default_rng([number, turn]), split=split).text
            assert read_caption(text) == Said(thing.shape, thing.color, thing.motion), text
        assert read_caption(caption_of(thing)) == Said(thing.shape, thing.color, thing.motion)


def test_what_is_not_said_or_said_twice_is_unknown() -> None:
    assert read_caption("A dog runs.") == Said(None, None, None)
    assert read_caption("A red or blue circle.") == Said("circle", None, None)
    assert read_caption("A red ball, a red disc, moves up and right.") == Said("circle", "red", "up_right")
    assert read_caption("It moves up") == Said(None, None, "up") and read_caption("It bounces up and down") == Said(None, None, "bounce")
    assert read_caption("a featured barrel") == Said(None, None, None), "parts of words are not words"
    thing = Thing("circle", "red", "left")
    assert right("A red circle moves left.", thing) == {"shape": True, "colour": True, "motion": True, "all": True}
    assert right("A red circle moves right.", thing) == {"shape": True, "colour": True, "motion": False, "all": False}


def test_clips_show_what_their_captions_say_and_the_splits_share_no_combination() -> None:
    for split in ("train", "eval"):
        drawn = Drawn(24, seed=3, split=split)
        assert all(thing in COMBINATIONS[split] for thing in drawn.things) and len(set(drawn.things)) == 24
        seen = [read(from_uint8(drawn.video(row))) for row in range(24)]
        agree = sum([Thing(r.shape, r.color, r.motion) for r in readings] == [thing] for readings, thing in zip(seen, drawn.things, strict=True))
        print(f"{split}: the judge sees what the caption says in {agree} of 24")
        assert agree >= 21
    assert np.array_equal(Drawn(2, seed=3, split="eval").video(1), drawn.video(1)), "clip i is the same however many there are"
    assert not set(COMBINATIONS["train"]) & set(COMBINATIONS["eval"])


def test_the_tiny_model_is_small_knows_each_word_as_one_token_and_sees_eight_frames() -> None:
    vlm = tiny_vlm(seed=0)
    parameters = sum(parameter.numel() for parameter in vlm.network.parameters())
    print(f"{parameters:,} parameters")
    assert parameters < 500_000 and vlm.family == "qwen3_vl"
    for thing in COMBINATIONS["train"]:
        ids = vlm.tokenizer(caption_of(thing), add_special_tokens=False)["input_ids"]
        assert len(ids) == len(caption_of(thing).split()) + 1 < LONGEST and vlm.tokenizer.decode(ids) == caption_of(thing)
    taken = take_frames(Drawn(1, seed=0, split="train").frames(0), SIGHT, vlm.patches)
    assert taken.frames.shape == (8, 3, 32, 32)
    other = tiny_vlm(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(vlm.network.parameters(), other.network.parameters(), strict=True)), "the same weights for the same seed"
