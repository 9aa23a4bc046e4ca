"""Whom to ask what: the next tasks of a person, as a mixture of the most worthwhile, any, those with a known answer and repeats. Numpy alone, so that the app starts at once."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["active", "random", "gold", "repeat", "mirrored"]


class Candidate(NamedTuple):
    """A task that could be given: clips of one prompt to be ranked."""

    prompt_id: str
    clip_ids: tuple[str, ...]


class Given(NamedTuple):
    """A task that was, or is to be, given to a person. shown_order[i] is the place of clip i on the screen, 0 = first."""

    person: str
    prompt_id: str
    clip_ids: tuple[str, ...]
    shown_order: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class Mix:
    """What the tasks of a person are made of, as shares that add up to 1.

    active: the best candidates. random: any candidate, so that what was chosen for a model does not decide all that is known. gold: tasks whose answer is known. repeat: an earlier
    task of this person as it was. mirrored: one with the places on the screen reversed, which shows who goes by the place.
    """

    active: float = 0.6
    random: float = 0.25
    gold: float = 0.05
    repeat: float = 0.05
    mirrored: float = 0.05
    most: int = 200
    """Tasks that a person is given in all."""
    people: int = 1
    """Persons that a candidate is given to."""
    apart: int = 5
    """A task comes again after at least as many others."""

    def __post_init__(self) -> None:
        if not (min(self.shares) >= 0 and abs(sum(self.shares) - 1) < 1e-6):
            raise ValueError(f"the shares of a mix are not negative and add up to 1, got {self.shares}")

    @property
    def shares(self) -> tuple[float, ...]:
        return self.active, self.random, self.gold, self.repeat, self.mirrored


def next_tasks(
    person: str, number: int, candidates: Sequence[Candidate], given: Sequence[Given], *, gold: Sequence[Candidate] = (), mix: Mix | None = None, seed: int = 0
) -> list[Given]:
    """The next tasks of a person: the whole of it in memory; the app asks its tables (`app/choosing.py`).

    candidates: the best first, as `best_first` orders them. given: all that was given so far, to anybody, answered or not; hand what this returns back in it. Nobody gets a set
    of clips twice but as a repeat, or more than `mix.most` tasks. Fewer than `number` come back where nothing is left; a kind with nothing to give leaves its turn to a candidate.
    The same arguments give the same tasks, and asking for five and then five more gives the ten of asking for ten.
    """
    mix = mix or Mix()
    mine = [each for each in given if each.person == person]
    seen = {frozenset(each.clip_ids) for each in mine}
    people = Counter(clips for _, clips in {(each.person, frozenset(each.clip_ids)) for each in given if each.kind != "gold"})
    out: list[Given] = []
    for slot in range(len(mine), min(len(mine) + number, mix.most)):
        rng = np.random.default_rng([seed, _number(person), slot])
        kind = kind_at(mix, person, slot, seed)
        found = _again(mine, kind, mix.apart, rng) if kind in ("repeat", "mirrored") else _fresh(kind, candidates, gold, seen, people, mix.people, rng)
        if found is None:
            kind = "active" if mix.active > 0 else "random"
            found = _fresh(kind, candidates, gold, seen, people, mix.people, rng)
        if found is None:
            break
        order = found.shown_order if isinstance(found, Given) else tuple(int(i) for i in rng.permutation(len(found.clip_ids)))
        task = Given(person, found.prompt_id, found.clip_ids, order, kind)
        key = frozenset(task.clip_ids)
        if key not in seen and kind != "gold":
            people[key] += 1
        seen.add(key)
        mine.append(task)
        out.append(task)
    return out


def kind_at(mix: Mix, person: str, slot: int, seed: int) -> Kind:
    """The slot's kind: a point that walks round the circle by the golden ratio falls into each share as often as it is large, also among a few slots."""
    kinds: tuple[Kind, ...] = ("active", "random", "gold", "repeat", "mirrored")
    start = np.random.default_rng([seed, _number(person)]).random()
    point = (start + slot * (math.sqrt(5) - 1) / 2) % 1
    bounds = np.cumsum(mix.shares)
    return kinds[min(int(np.searchsorted(bounds, point, side="right")), max(i for i, share in enumerate(mix.shares) if share > 0))]


def _fresh(
    kind: Kind, candidates: Sequence[Candidate], gold: Sequence[Candidate], seen: set[frozenset[str]], people: Counter[frozenset[str]], most: int, rng: np.random.Generator
) -> Candidate | None:
    """A task that the person has not seen: the best candidate, any candidate, or any gold task."""
    if kind == "gold":
        open_tasks = [each for each in gold if frozenset(each.clip_ids) not in seen]
    else:
        free = (each for each in candidates if frozenset(each.clip_ids) not in seen and people[frozenset(each.clip_ids)] < most)
        open_tasks = list(itertools.islice(free, 1)) if kind == "active" else list(free)
    return open_tasks[int(rng.integers(len(open_tasks)))] if open_tasks else None


def _again(mine: Sequence[Given], kind: Kind, apart: int, rng: np.random.Generator) -> Given | None:
    """A task of this person that comes again once, at least `apart` others later; gold is its own check."""
    repeated = {frozenset(each.clip_ids) for each in mine if each.kind in ("repeat", "mirrored")}
    early = [each for each in mine[: max(0, len(mine) - apart)] if each.kind in ("active", "random") and frozenset(each.clip_ids) not in repeated]
    if not early:
        return None
    task = early[int(rng.integers(len(early)))]
    last = len(task.clip_ids) - 1
    return task if kind == "repeat" else task._replace(shown_order=tuple(last - place for place in task.shown_order))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
