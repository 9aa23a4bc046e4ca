"""Short prompts of the built-in world say what their captions say, and what is held out never meets training."""

import pytest

from recipes.shapes.prompts import MOTIONS, is_held_out
from recipes.shapes.short import MOTION_WORDS, Said, is_pair_held_out, make_shorts, said


def test_every_caption_says_all_that_its_short_prompt_says_by_its_words() -> None:
    for split in ("train", "eval"):
        for short in make_shorts(150, seed=0, split=split):
            assert said(short.long) == (short.thing.shape, short.thing.color, short.thing.motion) and said(short.long).keeps(short)
            known = said(short.text)
            assert (known.shape, known.color) == (short.thing.shape, short.thing.color)
            assert any(word in short.text for word in MOTION_WORDS[short.thing.motion]) or not short.motion_named


def test_held_out_combinations_pairs_and_wordings_are_in_no_training_prompt() -> None:
    train, held_out = make_shorts(4000, seed=1, split="train"), make_shorts(100, seed=1, split="eval")
    assert not any(is_held_out(short.thing) for short in train)
    assert not any(is_pair_held_out(short.thing.shape, short.thing.color) for short in train if not short.motion_named)
    assert all(is_held_out(short.thing) if short.motion_named else is_pair_held_out(short.thing.shape, short.thing.color) for short in held_out)
    assert not {short.text for short in train} & {short.text for short in held_out}
    assert len({short.text for short in held_out}) == 100 and sum(short.motion_named for short in held_out) == 50
    assert {short.thing.motion for short in train} == set(MOTIONS) == set(MOTION_WORDS)


def test_the_same_seed_draws_the_same_prompts() -> None:
    assert make_shorts(20, seed=3, split="train") == make_shorts(20, seed=3, split="train") != make_shorts(20, seed=4, split="train")


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("a crimson disc moves up and right.", ("circle", "red", "up_right")),
        ("a red circle moves up", ("circle", "red", "up")),
        ("a red circle and a blue bar", ("", "", "")),
        ("a kitten", ("", "", "")),
        ("a column in cobalt that bounces up and down", ("pillar", "blue", "bounce")),
        ("a redder circle", ("circle", "", "")),
    ],
)
def test_what_a_text_says_is_read_word_by_word(text: str, known: tuple[str, str, str]) -> None:
    assert said(text) == Said(*known)


def test_impossible_wishes_are_refused() -> None:
    for wish in ({"n": 4, "split": "test"}, {"n": 4, "split": "eval", "named": 1.5}, {"n": 100_000, "split": "eval"}):
        with pytest.raises(ValueError):
            make_shorts(seed=0, **wish)  # type: ignore[arg-type]
