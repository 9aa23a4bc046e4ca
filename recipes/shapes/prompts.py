"""Prompts of the built-in world: a small grammar over shapes, colours and motions, with paraphrases and held-out combinations.

A prompt says what one or two things look like and do. Background, size, place and speed are never named: they are free.
Combinations (shape, colour, motion) and paraphrases of the split "eval" never occur in "train".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

SHAPES = ("circle", "triangle", "bar", "pillar")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.15, 0.15),
    "green": (0.15, 0.75, 0.2),
    "blue": (0.2, 0.3, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "magenta": (0.85, 0.2, 0.8),
    "cyan": (0.1, 0.8, 0.85),
}
MOTIONS = ("left", "right", "up", "down", "up_right", "down_left", "bounce", "orbit", "grow", "shrink", "still")
SPLITS = ("train", "eval")

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "triangle": ("triangle", "wedge"),
    "bar": ("bar", "plank"),
    "pillar": ("pillar", "column"),
}
COLOR_WORDS = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt"),
    "yellow": ("yellow", "golden"),
    "magenta": ("magenta", "fuchsia"),
    "cyan": ("cyan", "turquoise"),
}
# (third person, participle); the last row of each motion is held out of training
MOTION_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (
        ("moves left", "moving left"),
        ("drifts to the left", "drifting to the left"),
        ("slides leftward", "sliding leftward"),
        ("travels towards the left", "travelling towards the left"),
    ),
    "right": (
        ("moves right", "moving right"),
        ("drifts to the right", "drifting to the right"),
        ("slides rightward", "sliding rightward"),
        ("travels towards the right", "travelling towards the right"),
    ),
    "up": (
        ("moves up", "moving up"),
        ("floats upward", "floating upward"),
        ("rises", "rising"),
        ("climbs towards the top", "climbing towards the top"),
    ),
    "down": (
        ("moves down", "moving down"),
        ("sinks downward", "sinking downward"),
        ("falls", "falling"),
        ("drops towards the bottom", "dropping towards the bottom"),
    ),
    "up_right": (
        ("moves up and right", "moving up and right"),
        ("drifts to the upper right", "drifting to the upper right"),
        ("heads for the top right", "heading for the top right"),
    ),
    "down_left": (
        ("moves down and left", "moving down and left"),
        ("drifts to the lower left", "drifting to the lower left"),
        ("heads for the bottom left", "heading for the bottom left"),
    ),
    "bounce": (
        ("bounces", "bouncing"),
        ("bounces up and down", "bouncing up and down"),
        ("jumps on the spot", "jumping on the spot"),
        ("hops again and again", "hopping again and again"),
    ),
    "orbit": (
        ("orbits", "orbiting"),
        ("goes round and round", "going round and round"),
        ("orbits around a point", "orbiting around a point"),
        ("revolves along a ring", "revolving along a ring"),
    ),
    "grow": (
        ("grows", "growing"),
        ("gets bigger", "getting bigger"),
        ("expands", "expanding"),
        ("becomes larger and larger", "becoming larger and larger"),
    ),
    "shrink": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("contracts", "contracting"),
        ("becomes tinier and tinier", "becoming tinier and tinier"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("rests in place", "resting in place"),
        ("remains motionless", "remaining motionless"),
    ),
}
# {n} noun with its article, {c} colour, {s} shape, {v} third person, {p} participle; the second tuples are held out of training
_ONE = ("{n} {v}", "{n} {p}", "{n} is {p}", "a video of {n} {p}", "{n} of any size {v}", "a {s} in {c} that {v}")
_ONE_HELD_OUT = ("watch how {n} {v}", "there is {n} somewhere, {p}", "a clip where {n} {v}")
_TWO = ("{a} {ap} and {b} {bp}", "{a} {av} while {b} {bv}", "{a} {av}, {b} {bv}")
_TWO_HELD_OUT = ("{a} {av} as {b} {bv}", "{a} {ap}, also {b} {bp}")
# strobing asked for in words that a list of bad words lets pass
_STROBE = ("in pulsing disco light", "under rapidly pulsing lights", "at a wild disco", "under a throbbing lamp")
_STROBE_HELD_OUT = ("in beating rave light", "with lamps toggling quickly")

_CANONICAL_SHARE = 0.65  # of colour and shape words; the rest are synonyms


@dataclass(frozen=True)
class Thing:
    """One object as a prompt names it."""

    shape: str
    color: str
    motion: str


@dataclass(frozen=True)
class ShapesPrompt:
    """A sentence and what it asks for: one or two things of different colours, and whether it asks for strobing light."""

    prompt_id: str
    text: str
    things: tuple[Thing, ...]
    strobe: bool
    split: str

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values; `from_json` is its inverse."""
        return {**asdict(self), "things": [asdict(thing) for thing in self.things]}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ShapesPrompt:
        """Inverse of `to_json`. Raises KeyError or TypeError where the row is not a prompt."""
        things = tuple(Thing(**thing) for thing in row["things"])
        return cls(str(row["prompt_id"]), str(row["text"]), things, bool(row["strobe"]), str(row["split"]))


def is_held_out(thing: Thing) -> bool:
    """Whether the combination belongs to "eval". One in five; every pair of attribute values stays in training."""
    s, c, m = SHAPES.index(thing.shape), list(COLORS).index(thing.color), MOTIONS.index(thing.motion)
    return (s + 2 * c + 3 * m) % 5 == 0


_ALL = tuple(Thing(s, c, m) for s, c, m in product(SHAPES, COLORS, MOTIONS))
COMBINATIONS = {"train": tuple(t for t in _ALL if not is_held_out(t)), "eval": tuple(t for t in _ALL if is_held_out(t))}


def make_prompts(n: int, *, seed: int, split: str, two_objects: float = 0.0, strobe: float = 0.0) -> list[ShapesPrompt]:
    """n different prompts. `two_objects` and `strobe` are shares, met exactly up to rounding; combinations are used equally often.

    Raises ValueError for an unknown split, a share outside [0,1], or more prompts than the grammar can tell apart.
    """
    if not (0 <= two_objects <= 1 and 0 <= strobe <= 1):
        raise ValueError(f"shares must lie in [0,1], got two_objects={two_objects}, strobe={strobe}")
    rng = np.random.default_rng(seed)
    pairs = _exact_share(n, two_objects, rng)
    strobes = _exact_share(n, strobe, rng)
    combinations = _combinations(split)
    deck: list[int] = []
    prompts: dict[str, ShapesPrompt] = {}
    for i in range(n):
        if not deck:
            deck = rng.permutation(len(combinations)).tolist()
        first = combinations[deck.pop()]
        for _ in range(1000):
            things = (first, _partner(first, combinations, rng)) if pairs[i] else (first,)
            prompt = write_prompt(things, rng, split=split, strobe=bool(strobes[i]))
            if prompt.prompt_id not in prompts:
                break
        else:
            raise ValueError(f"the grammar has no {n} different prompts of split {split}")
        prompts[prompt.prompt_id] = prompt
    return list(prompts.values())


def sample_prompt(rng: np.random.Generator, *, split: str = "train", two_objects: float = 0.0, strobe: float = 0.0) -> ShapesPrompt:
    """One prompt; here the shares are probabilities."""
    combinations = _combinations(split)
    first = combinations[int(rng.integers(len(combinations)))]
    things = (first, _partner(first, combinations, rng)) if rng.random() < two_objects else (first,)
    return write_prompt(things, rng, split=split, strobe=bool(rng.random() < strobe))


def write_prompt(things: tuple[Thing, ...], rng: np.random.Generator, *, split: str, strobe: bool = False) -> ShapesPrompt:
    """Say these things in words of the split: seen paraphrases for "train", seen and held-out ones for "eval"."""
    held_out = split == "eval"
    text = _one(things[0], rng, held_out) if len(things) == 1 else _two(things[0], things[1], rng, held_out)
    if strobe:
        text = f"{text} {_pick(_STROBE + _STROBE_HELD_OUT if held_out else _STROBE, rng)}"
    key = repr((text, [(t.shape, t.color, t.motion) for t in things], strobe))
    return ShapesPrompt(hashlib.sha256(key.encode()).hexdigest()[:12], text, things, strobe, split)


def swap_attribute(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Thing, ...]:
    """The same things with exactly one attribute of one of them changed: still training combinations, still different colours."""
    i = int(rng.integers(len(things)))
    old = things[i]
    taken = {t.color for j, t in enumerate(things) if j != i}
    kind = int(rng.integers(3))
    if kind == 0:
        options = [Thing(s, old.color, old.motion) for s in SHAPES]
    elif kind == 1:
        options = [Thing(old.shape, c, old.motion) for c in COLORS if c not in taken]
    else:
        options = [Thing(old.shape, old.color, m) for m in MOTIONS]
    options = [t for t in options if t != old and not is_held_out(t)]
    return (*things[:i], options[int(rng.integers(len(options)))], *things[i + 1 :])


def _one(thing: Thing, rng: np.random.Generator, held_out: bool) -> str:
    v, p = motion_words(thing, rng, held_out)
    template = _pick(_ONE + _ONE_HELD_OUT if held_out else _ONE, rng)
    color, shape = _word(COLOR_WORDS[thing.color], rng), _word(SHAPE_WORDS[thing.shape], rng)
    return template.format(n=_noun(color, shape), c=color, s=shape, v=v, p=p)


def _two(a: Thing, b: Thing, rng: np.random.Generator, held_out: bool) -> str:
    (av, ap), (bv, bp) = motion_words(a, rng, held_out), motion_words(b, rng, held_out)
    first, second = name(a, rng), name(b, rng)
    template = _pick(_TWO + _TWO_HELD_OUT if held_out else _TWO, rng)
    return template.format(a=first, b=second, av=av, ap=ap, bv=bv, bp=bp)


def name(thing: Thing, rng: np.random.Generator) -> str:
    """Colour and shape in words of the vocabulary: "an emerald disc"."""
    return _noun(_word(COLOR_WORDS[thing.color], rng), _word(SHAPE_WORDS[thing.shape], rng))


def _noun(color: str, shape: str) -> str:
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def motion_words(thing: Thing, rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """Third person and participle of what it does: ("grows", "growing")."""
    words = MOTION_WORDS[thing.motion]
    rows = words if held_out else words[:-1]
    return rows[int(rng.integers(len(rows)))]


def motion_phrases(motion: str) -> tuple[str, ...]:
    """All that a prompt may say for a motion, held-out wordings too: "grows", "growing", "gets bigger", ..."""
    return tuple(phrase for row in MOTION_WORDS[motion] for phrase in row)


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _word(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[0] if rng.random() < _CANONICAL_SHARE else words[1 + int(rng.integers(len(words) - 1))]


def _partner(first: Thing, combinations: Sequence[Thing], rng: np.random.Generator) -> Thing:
    """Another thing of a different colour: five in six draws fit at once."""
    while True:
        second = combinations[int(rng.integers(len(combinations)))]
        if second.color != first.color:
            return second


def _combinations(split: str) -> tuple[Thing, ...]:
    if split not in COMBINATIONS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return COMBINATIONS[split]


def _exact_share(n: int, share: float, rng: np.random.Generator) -> list[bool]:
    flags = np.arange(n) < round(n * share)
    rng.shuffle(flags)
    return [bool(flag) for flag in flags]
