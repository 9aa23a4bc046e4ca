"""Simulated people who rank clips of known worth, in two worlds: one that follows a likelihood exactly, and one that follows none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.shapes.eye import Perception, Signals
from recipes.shapes.labelers import REWARD_PANEL, Labeler, rank_by, utility

Floats = NDArray[np.float64]

CLIPS = 4
"""The most clips on a screen."""
SPREAD = 1.2
"""Standard deviation of the true log-worth over the clips of a prompt."""
NOISE = 0.3
"""Simulated labelers: a log-worth of 1 is a utility of 0.3, about their noise."""
LOG_TIE = (-0.3, -1.0, -1.5)
"""Model's world: log delta_2, delta_3, delta_4; equal clips tie in 27 % of pairs."""
LOG_TIE_CARELESS = -2.0
"""Model's world: the same of careless answers, for every order."""
PLACE_CARELESS = 0.8
"""Model's world: what the first place gains in careless answers, in log-odds."""


class Answers(NamedTuple):
    """N answers on up to K clips; a clip that was not there has rank 0 and place -1."""

    features: Tensor  # [N,K,F] float64
    ranks: Tensor  # [N,K]
    shown: Tensor  # [N,K] place on the screen; all -1: of no matter
    people: Tensor  # [N] index into the panel; -1: somebody who always looks and has no habit
    prompts: Tensor  # [N]


class World(NamedTuple):
    """How somebody, None for one who always looks and has no habit, ranks clips of known log-worth [K] that stand at known places."""

    name: str
    rank: Callable[[Floats, int | None, Sequence[int], np.random.Generator], list[int]]


def model_rank(worth: Floats, person: int | None, shown: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Drawn from Davidson-Luce with a habit of place and a share of careless answers, written as the choices they describe."""
    height = 1 - np.asarray(shown) / (len(worth) - 1)
    if person is None:
        return choose(worth, LOG_TIE, rng)
    if rng.random() < REWARD_PANEL[person].careless:
        return choose(PLACE_CARELESS * height, (LOG_TIE_CARELESS,) * (CLIPS - 1), rng)
    return choose(worth + advantage_of(REWARD_PANEL[person]) * height, LOG_TIE, rng)


def advantage_of(person: Labeler) -> float:
    """What the first place gains over the last, in log-odds."""
    return person.position / person.noise


def choose(worth: Floats, log_tie: Sequence[float], rng: np.random.Generator) -> list[int]:
    """One ranking of Davidson-Luce: the set that shares the next place is drawn from all sets that remain."""
    ranks, left, place = [0] * len(worth), list(range(len(worth))), 0
    while left:
        sets = [each for size in range(1, len(left) + 1) for each in combinations(left, size)]
        logits = np.array([(0, *log_tie)[len(each) - 1] + worth[list(each)].mean() for each in sets])
        chance = np.exp(logits - logits.max())
        place += 1
        for clip in sets[int(rng.choice(len(sets), p=chance / chance.sum()))]:
            ranks[clip] = place
            left.remove(clip)
    return ranks


def labeler_rank(worth: Floats, person: int | None, shown: Sequence[int], rng: np.random.Generator) -> list[int]:
    """By a simulated labeler."""
    looks = Labeler("simulated-test", noise=NOISE, tie=NOISE, position=0.0, careless=0.0)
    return rank_by(looks if person is None else REWARD_PANEL[person], NOISE * worth, shown, rng)


MODELS, LABELERS = "the model's", "simulated labelers'"
WORLDS = (World(MODELS, model_rank), World(LABELERS, labeler_rank))


def true_weights(features: int) -> Floats:
    weights = np.random.default_rng(1).normal(size=features)
    return SPREAD * weights / np.linalg.norm(weights)


def draw(world: World, screens: Sequence[tuple[int, Floats, int | None]], rng: np.random.Generator) -> Answers:
    """One answer a screen (prompt, features [K,F], person)."""
    weights = true_weights(screens[0][1].shape[1])
    most = max(len(features) for _, features, _ in screens)
    rows = []
    for _, features, person in screens:
        shown = rng.permutation(len(features)).tolist()
        ranks = world.rank(features @ weights, person, shown, rng)
        empty = most - len(features)
        rows.append((np.pad(features, ((0, empty), (0, 0))), ranks + [0] * empty, (shown if person is not None else [-1] * len(shown)) + [-1] * empty))
    filled, ranked, places = (torch.from_numpy(np.array(column)) for column in zip(*rows, strict=True))
    return Answers(filled, ranked, places, torch.tensor([-1 if who is None else who for _, _, who in screens]), torch.tensor([prompt for prompt, _, _ in screens]))


def training_answers(world: World, prompts: int, features: int, seed: int) -> Answers:
    """One screen of two, three or four clips a prompt, ranked by two people."""
    rng = np.random.default_rng([seed, 2])
    screens: list[tuple[int, Floats, int | None]] = []
    for prompt in range(prompts):
        clips = rng.normal(size=(int(rng.integers(2, CLIPS + 1)), features))
        screens += [(prompt, clips, int(person)) for person in rng.permutation(len(REWARD_PANEL))[:2]]
    return draw(world, screens, rng)


def held_out_answers(world: World, prompts: int, features: int, *, panel: bool) -> Answers:
    """Every pair of every held-out prompt, asked once of the panel or of one who always looks; ties are left out."""
    rng = np.random.default_rng([3, panel])
    clips = np.random.default_rng(4).normal(size=(prompts, CLIPS, features))
    pairs = [(prompt, clips[prompt, list(pair)]) for prompt in range(prompts) for pair in combinations(range(CLIPS), 2)]
    answers = draw(world, [(prompt, pair, int(rng.integers(len(REWARD_PANEL))) if panel else None) for prompt, pair in pairs], rng)
    strict = answers.ranks[:, 0] != answers.ranks[:, 1]
    return Answers(*(part[strict] for part in answers))


# Clips of the built-in world, as a benchmark keeps them


def to_tensor(seen: Perception) -> Tensor:
    """[C,11]; `perceived` gives the perception back."""
    return torch.from_numpy(np.concatenate([seen.color, seen.shape, seen.motion, seen.extra[:, None], np.stack(seen.signals, axis=1)], axis=1))


def perceived(seen: Tensor) -> Perception:
    """[C,11] of `to_tensor` -> the perception of C clips."""
    color, shape, motion, extra, signals = (part.numpy() for part in seen.split([2, 2, 2, 1, len(Signals._fields)], dim=1))
    return Perception(color, shape, motion, extra[:, 0], Signals(*signals.T))


def panel_worth(panel: Sequence[Labeler], seen: Perception) -> Floats:
    """What a panel thinks of every clip, on average, before noise and habits [C]."""
    worth: Floats = np.mean([utility(person, seen) for person in panel], axis=0)
    return worth
