"""What somebody in a hurry types, in the built-in world: a colour and a shape, now and then what it does, in no order that a caption has.

Beside each stands a caption of the world, one that the base model was trained on. Held out ("eval") are the combinations that `prompts.py` holds out, where the motion is named;
one pair in four of shape and colour, where it is left open; and the last wordings of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from recipes.shapes.prompts import COLOR_WORDS, COLORS, COMBINATIONS, MOTIONS, SHAPE_WORDS, SHAPES, Thing, motion_phrases, name, write_prompt

MOTION_WORDS = {
    "left": ("left", "to left"),
    "right": ("right", "to right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up_right": ("up right", "top right"),
    "down_left": ("down left", "bottom left"),
    "bounce": ("bounce", "bouncy"),
    "orbit": ("orbit", "circling"),
    "grow": ("grow", "bigger"),
    "shrink": ("shrink", "smaller"),
    "still": ("still", "static"),
}
# {n} noun with its article, {c} colour, {s} shape, {m} motion; the second tuples are held out of training
_OPEN = ("{n}", "{c} {s}", "{s} {c}", "{s}, {c}")
_OPEN_HELD_OUT = ("{c}, {s}", "{c} {s} video")
_NAMED = ("{c} {s} {m}", "{s} {c} {m}", "{n}, {m}", "{m}, {c} {s}")
_NAMED_HELD_OUT = ("{m} {s} {c}", "{s} {m}, {c}")


class Short(NamedTuple):
    """A short prompt and a caption that says as much and more."""

    text: str
    long: str  # of the world's grammar, in words of the split "train"
    thing: Thing  # what `long` says
    motion_named: bool  # whether the short text says what it does


class Said(NamedTuple):
    """What a text says, by the world's words; "" where it says none of an attribute, or more than one."""

    shape: str
    color: str
    motion: str

    def keeps(self, short: Short) -> bool:
        """Whether it says all that the short prompt says."""
        return (self.shape, self.color) == (short.thing.shape, short.thing.color) and (not short.motion_named or self.motion == short.thing.motion)


def make_shorts(n: int, *, seed: int, split: str, named: float = 0.5) -> list[Short]:
    """n short prompts with their captions, drawn with replacement in "train" and all different in "eval". named: share of them that say what the thing does.

    Raises ValueError for an unknown split, a share outside [0,1], or more different prompts than there are.
    """
    if split not in COMBINATIONS or not 0 <= named <= 1:
        raise ValueError(f"a split of {tuple(COMBINATIONS)} and a share in [0,1] expected, got {split!r} and {named}")
    rng = np.random.default_rng(seed)
    found: dict[str, Short] = {}
    many = round(n * named)
    for k in range(n):
        for _ in range(1000):
            short = _draw(rng, split, named=k < many)
            if split == "train" or short.text not in found:
                break
        else:
            raise ValueError(f"there are no {n} different short prompts of split {split}")
        found[short.text if split == "eval" else str(k)] = short
    return [list(found.values())[k] for k in rng.permutation(n)]


def is_pair_held_out(shape: str, color: str) -> bool:
    """Whether a colour and a shape without a motion belong to "eval": six pairs of 24, every shape and every colour among them or among the others."""
    return (SHAPES.index(shape) + list(COLORS).index(color)) % 4 == 0


def said(text: str) -> Said:
    """What a caption of the world says, by its words alone."""
    words = " ".join(text.lower().replace(",", " ").replace(".", " ").split())
    shapes = {shape for shape, names in SHAPE_WORDS.items() if _holds_any(words, names)}
    colors = {color for color, names in COLOR_WORDS.items() if _holds_any(words, names)}
    motions = sorted(((len(phrase), motion) for motion in MOTIONS for phrase in motion_phrases(motion) if _holds_any(words, (phrase,))), reverse=True)
    longest = {motion for length, motion in motions if length == motions[0][0]}
    return Said(_only(shapes), _only(colors), _only(longest))


def _draw(rng: np.random.Generator, split: str, *, named: bool) -> Short:
    options = COMBINATIONS[split] if named else _OPEN_THINGS[split]
    thing = options[int(rng.integers(len(options)))]
    forms = (_NAMED, _NAMED_HELD_OUT) if named else (_OPEN, _OPEN_HELD_OUT)
    form = _pick(forms[0] if split == "train" else forms[0] + forms[1], rng)
    noun = name(thing, rng)  # "an emerald disc"
    _, color, shape = noun.split(" ")
    return Short(form.format(n=noun, c=color, s=shape, m=_pick(MOTION_WORDS[thing.motion], rng)), write_prompt((thing,), rng, split="train").text, thing, named)


_OPEN_THINGS = {
    split: tuple(Thing(s, c, m) for s, c, m in product(SHAPES, COLORS, MOTIONS) if is_pair_held_out(s, c) == (split == "eval") and Thing(s, c, m) in COMBINATIONS["train"])
    for split in COMBINATIONS
}


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _holds_any(words: str, phrases: Sequence[str]) -> bool:
    return any(f" {phrase} " in f" {words} " for phrase in phrases)


def _only(found: set[str]) -> str:
    return next(iter(found)) if len(found) == 1 else ""
