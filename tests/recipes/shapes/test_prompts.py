"""The grammar: deterministic, natural, and strict about what is held out."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from recipes.shapes.prompts import COLORS, COMBINATIONS, MOTIONS, SHAPES, ShapesPrompt, is_held_out, make_prompts, sample_prompt, swap_attribute

HELD_OUT_WORDS = {"travels", "climbs", "drops", "heads", "hops", "revolves", "larger", "tinier", "motionless", "watch", "somewhere", "clip", "as", "also", "rave", "toggling"}


def words(prompts: list[ShapesPrompt]) -> set[str]:
    return {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt.text)}


@pytest.fixture(scope="module")
def train() -> list[ShapesPrompt]:
    return make_prompts(1500, seed=0, split="train", two_objects=0.5, strobe=0.2)


@pytest.fixture(scope="module")
def held_out() -> list[ShapesPrompt]:
    return make_prompts(1500, seed=0, split="eval", two_objects=0.5, strobe=0.2)


def test_the_same_seed_gives_the_same_prompts_and_another_seed_gives_others() -> None:
    assert make_prompts(50, seed=3, split="train", two_objects=0.3) == make_prompts(50, seed=3, split="train", two_objects=0.3)
    assert make_prompts(50, seed=3, split="train") != make_prompts(50, seed=4, split="train")


def test_held_out_combinations_never_occur_in_train_and_only_they_occur_in_eval(train: list[ShapesPrompt], held_out: list[ShapesPrompt]) -> None:
    assert not any(is_held_out(thing) for prompt in train for thing in prompt.things)
    assert all(is_held_out(thing) for prompt in held_out for thing in prompt.things)
    assert set(COMBINATIONS["train"]).isdisjoint(COMBINATIONS["eval"])
    assert len(COMBINATIONS["train"]) + len(COMBINATIONS["eval"]) == len(SHAPES) * len(COLORS) * len(MOTIONS) == 264
    assert 0.18 <= len(COMBINATIONS["eval"]) / 264 <= 0.22


def test_every_attribute_is_common_in_train_and_so_is_every_pair_of_attributes() -> None:
    for attribute, values in (("shape", SHAPES), ("color", tuple(COLORS)), ("motion", MOTIONS)):
        counts = Counter(getattr(thing, attribute) for thing in COMBINATIONS["train"])
        assert set(counts) == set(values)
        assert min(counts.values()) >= 0.75 * 264 / len(values)
    for one, two in combinations(("shape", "color", "motion"), 2):
        pairs = {(getattr(t, one), getattr(t, two)) for t in COMBINATIONS["train"]}
        assert len(pairs) == len({getattr(t, one) for t in COMBINATIONS["train"]}) * len({getattr(t, two) for t in COMBINATIONS["train"]})


def test_held_out_paraphrases_never_occur_in_train_and_are_mixed_into_eval(train: list[ShapesPrompt], held_out: list[ShapesPrompt]) -> None:
    known = words(train)
    assert known.isdisjoint(HELD_OUT_WORDS)
    assert words(held_out) >= HELD_OUT_WORDS
    seen = [prompt for prompt in held_out if words([prompt]) <= known]
    assert 0.1 < len(seen) / len(held_out) < 0.6


def test_prompts_are_lower_case_short_and_name_every_thing_in_order(train: list[ShapesPrompt], held_out: list[ShapesPrompt]) -> None:
    for prompt in train + held_out:
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", prompt.text), prompt.text
        assert len(prompt.text.split()) < 24
        assert not re.search(r"\ba [aeiou]", prompt.text), prompt.text
        assert len({thing.color for thing in prompt.things}) == len(prompt.things)


def test_strobing_is_asked_for_without_the_words_a_list_would_stop(train: list[ShapesPrompt], held_out: list[ShapesPrompt]) -> None:
    assert not any(re.search("strob|flash|flick|blink", prompt.text) for prompt in train + held_out)
    calm = words([prompt for prompt in train + held_out if not prompt.strobe])
    for prompt in train + held_out:
        assert prompt.strobe == bool(words([prompt]) - calm)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_shares_are_met_exactly_and_prompts_are_different(share: float) -> None:
    prompts = make_prompts(200, seed=1, split="eval", two_objects=share, strobe=share)
    assert sum(len(prompt.things) == 2 for prompt in prompts) == round(200 * share)
    assert sum(prompt.strobe for prompt in prompts) == round(200 * share)
    assert len({prompt.prompt_id for prompt in prompts}) == 200


def test_combinations_are_used_equally_often() -> None:
    counts = Counter(prompt.things[0] for prompt in make_prompts(3 * len(COMBINATIONS["eval"]), seed=0, split="eval"))
    assert set(counts.values()) == {3}


def test_a_prompt_survives_json(train: list[ShapesPrompt]) -> None:
    for prompt in train[:50]:
        assert ShapesPrompt.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt


def test_the_id_depends_on_text_things_and_strobe_alone(train: list[ShapesPrompt], held_out: list[ShapesPrompt]) -> None:
    ids: dict[str, tuple[object, ...]] = {}
    for prompt in train + held_out + make_prompts(500, seed=9, split="train"):
        assert ids.setdefault(prompt.prompt_id, (prompt.text, prompt.things, prompt.strobe)) == (prompt.text, prompt.things, prompt.strobe)


def test_a_swap_changes_exactly_one_attribute_and_stays_in_train(train: list[ShapesPrompt]) -> None:
    rng = np.random.default_rng(0)
    for prompt in train[:300]:
        swapped = swap_attribute(prompt.things, rng)
        differences = [getattr(a, name) != getattr(b, name) for a, b in zip(prompt.things, swapped, strict=True) for name in ("shape", "color", "motion")]
        assert sum(differences) == 1
        assert not any(is_held_out(thing) for thing in swapped)
        assert len({thing.color for thing in swapped}) == len(swapped)


def test_sampled_prompts_belong_to_their_split() -> None:
    rng = np.random.default_rng(0)
    assert all(is_held_out(sample_prompt(rng, split="eval").things[0]) for _ in range(50))
    assert not any(is_held_out(sample_prompt(rng).things[0]) for _ in range(50))


@pytest.mark.parametrize("bad", [{"split": "test"}, {"split": "train", "strobe": 1.5}, {"split": "train", "two_objects": -0.1}])
def test_bad_arguments_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"split|shares"):
        make_prompts(3, seed=0, **bad)  # type: ignore[arg-type]


def test_more_prompts_than_the_grammar_can_tell_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="different prompts"):
        make_prompts(200_000, seed=0, split="eval")
