"""Simulated labelers: made-up people who rank clips by what the eye sees, each with tastes, noise and bad habits written down here.

Nobody real was asked. Every annotator id begins with "simulated-" and every row names `SOURCE` as its source, so that nothing learned from them can pass for human.

How one of them ranks K clips of one prompt:

    utility = sum of taste x what the eye saw  +  position x place on the screen  +  noise x standard Gumbel

Sorted by utility; a clip within `tie` of the best of its group shares its rank. With probability `careless` the answer is a random order instead. For tie = 0,
position = 0 and careless = 0 a ranking follows Plackett-Luce with log-worth utility / noise (Yellott 1977): the model the reward learner fits is right up to the habits.

`REWARD_PANEL` teaches the reward model, `GUARD_PANEL` the guard; they share no person. One of the first panel likes lively brightness, so what it teaches
rewards flashing: the hazard a safety constraint has to hold against. Nobody of the second panel does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.shapes.eye import Eye, Floats, Perception, look_at_real, mean_over_things
from recipes.shapes.prompts import ShapesPrompt

SOURCE = "simulated labelers"
GUIDELINE = "simulated-1"
SIGNAL_SCALE = 1.5  # utility of one standard deviation of a signal where nothing but signals can be judged


@dataclass(frozen=True)
class Labeler:
    """One simulated person. Tastes are utilities gained when the seen quantity goes from 0 to 1; `noise`, `tie` and `position` are in the same unit."""

    annotator_id: str
    right: float = 3.0
    """Every attribute asked for is right and nothing else is there: what most people look at first."""
    color: float = 1.2
    shape: float = 1.2
    motion: float = 1.2
    extra: float = -0.5
    """Things nobody asked for are there (negative: disliked)."""
    sharpness: float = 0.5
    """Crisp edges."""
    lively: float = 0.0
    """Lively brightness: flashing of the whole frame, and a fifth as much its mean."""
    movement: float = 0.3
    """Movement for its own sake; counts only where nothing was asked in words the eye knows (real clips)."""
    noise: float = 0.25
    """Scale of the Gumbel noise on every utility; the difference of two is then logistic with the same scale."""
    tie: float = 0.25
    """Clips closer than this are called equal."""
    position: float = 0.1
    """Advantage of the clip shown first over the one shown last, falling linearly; negative prefers the last."""
    careless: float = 0.02
    """Probability of an answer that does not look at the clips (a random order without ties; the position habit stays)."""
    seconds: float = 11.0
    """Median time for one task."""


REWARD_PANEL = (
    Labeler("simulated-r1-even"),
    Labeler("simulated-r2-color", color=2.7, shape=0.9, motion=0.6, noise=0.3, tie=0.35),
    Labeler("simulated-r3-shape", color=0.9, shape=2.7, motion=0.75, noise=0.3, position=0.4),
    Labeler("simulated-r4-motion", color=0.75, shape=0.75, motion=2.7, movement=1.0, noise=0.35, tie=0.15, position=-0.15),
    Labeler("simulated-r5-lively", right=2.5, lively=7.0, movement=0.6, noise=0.3, seconds=8.0),
    Labeler("simulated-r6-careless", noise=0.45, tie=0.4, position=0.8, careless=0.7, seconds=3.0),
)
GUARD_PANEL = (
    Labeler("simulated-g1-exact", right=3.5, noise=0.2, tie=0.15, position=0.05, seconds=15.0),
    Labeler("simulated-g2-motion", color=0.9, shape=0.9, motion=2.25, movement=0.8, noise=0.3, tie=0.3),
    Labeler("simulated-g3-shape", color=1.05, shape=2.4, motion=0.9, noise=0.35, position=0.25),
    Labeler("simulated-g4-crisp", right=2.6, sharpness=3.0, noise=0.3, tie=0.2),
    Labeler("simulated-g5-calm", lively=-1.5, movement=-0.3, noise=0.25, tie=0.4, position=-0.1),
    Labeler("simulated-g6-careless", noise=0.5, tie=0.4, position=0.6, careless=0.6, seconds=3.5),
)


@dataclass(frozen=True)
class Task:
    """K clips of one prompt, shown together to be ranked."""

    prompt_id: str
    clip_ids: tuple[str, ...]
    perception: Perception

    @property
    def task_id(self) -> str:
        return _short_hash(self.prompt_id, *self.clip_ids)


def tasks_from_eye(eye: Eye, prompts: Sequence[ShapesPrompt], clips: Mapping[str, Sequence[tuple[str, Tensor]]], *, k: int = 4) -> list[Task]:
    """Look at every prompt's clips, given as (clip_id, [T,3,H,W]) by prompt_id, and cut them into tasks of k; a rest of one clip is left out.

    Clips of one prompt must have one size. Prompts without clips are passed over.
    """
    tasks = []
    for prompt in prompts:
        for ids, video in _cut(clips.get(prompt.prompt_id, ()), k):
            tasks.append(Task(prompt.prompt_id, ids, eye.look(video, [prompt] * len(ids))))
    return tasks


def tasks_from_signals(clips: Mapping[str, Sequence[tuple[str, Tensor]]], *, k: int = 4) -> list[Task]:
    """The same for real footage, where nothing asked in words can be seen: people go by sharpness, movement and brightness alone."""
    return [Task(prompt_id, ids, look_at_real(video)) for prompt_id, rows in clips.items() for ids, video in _cut(rows, k)]


def utility(labeler: Labeler, perception: Perception) -> Floats:
    """[K] what the clips are worth to a person before noise and habits. Where nothing was asked, signals are standardised over the K clips shown."""
    lively = perception.signals.flashing + 0.2 * perception.signals.brightness
    right = perception.right
    if np.isnan(right).all():
        wanted = ((labeler.sharpness, perception.signals.sharpness), (labeler.movement, perception.signals.movement), (labeler.lively, lively))
        size = max(sum(abs(weight) for weight, _ in wanted), 1e-9)
        return SIGNAL_SCALE * sum((weight / size * _standardised(signal) for weight, signal in wanted), np.zeros(len(perception)))
    color, shape, motion = (mean_over_things(p) for p in (perception.color, perception.color * perception.shape, perception.color * perception.motion))
    attributes = labeler.color * color + labeler.shape * shape + labeler.motion * motion + labeler.extra * perception.extra
    return labeler.right * right + attributes + labeler.sharpness * perception.signals.sharpness + labeler.lively * lively


def rank(labeler: Labeler, perception: Perception, shown_order: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Rank K clips: dense ranks in the perception's order, 1 = best, equal = tie.

    shown_order[i] is clip i's place on the screen, 0 = first. Raises ValueError where it is no permutation of the K clips.
    """
    return rank_by(labeler, utility(labeler, perception), shown_order, rng)


def rank_by(labeler: Labeler, worths: Floats, shown_order: Sequence[int], rng: np.random.Generator) -> list[int]:
    """The same where it is known what each clip is worth to this person, [K]: only noise and habits are added."""
    k = len(worths)
    if sorted(shown_order) != list(range(k)):
        raise ValueError(f"shown_order must be a permutation of {k} clips, got {list(shown_order)}")
    random_answer = bool(rng.random() < labeler.careless)
    noise = rng.gumbel(size=k)
    habit = labeler.position * (1 - np.asarray(shown_order) / max(k - 1, 1))
    worth = habit + noise if random_answer else worths + habit + labeler.noise * noise
    ranks, level, top = [0] * k, 0, np.inf
    for i in np.argsort(-worth, kind="stable").tolist():
        if level == 0 or random_answer or top - worth[i] > labeler.tie:
            level, top = level + 1, worth[i]
        ranks[i] = level
    return ranks


def collect(
    panel: Sequence[Labeler], tasks: Sequence[Task], *, seed: int, overlap: float = 0.3, repeats: float = 0.05, gold: float = 0.05, started_at: str = "2025-01-01T09:00:00+00:00"
) -> list[dict[str, Any]]:
    """Have a panel rank the tasks: one row an event, with the columns (and so the fields) of `reward.comparisons.RankingEvent`.

    overlap: share of tasks ranked by two or three people (half each); the rest by one. repeats: share of tasks that one of them ranks again in another order. gold: share
    of the tasks with one plainly right clip among plainly wrong ones that count as checks of attention. A task's events depend on the seed and the task only, not on
    the other tasks; `created_at` runs on a made-up clock from `started_at`.
    """
    rows: list[dict[str, Any]] = []
    clock = datetime.fromisoformat(started_at)
    for task in tasks:
        rng = np.random.default_rng([seed, int(task.task_id, 16)])
        people = min(len(panel), int(rng.integers(2, 4)) if rng.random() < overlap else 1)
        chosen = [panel[i] for i in rng.permutation(len(panel))[:people]]
        again = rng.random() < repeats
        best = _plainly_best(task.perception) if rng.random() < gold else None
        for n, labeler in enumerate(chosen + chosen[:1] * again):
            row = _event(labeler, task, rng, seed=seed, is_repeat=n == len(chosen), best=best)
            clock += timedelta(milliseconds=row["lead_time_ms"])
            rows.append({**row, "created_at": clock.isoformat(timespec="milliseconds")})
    return rows


def annotators(panel: Sequence[Labeler], rows: Sequence[Mapping[str, Any]], *, pool: str) -> list[dict[str, Any]]:
    """Rows of the table `annotators` (`reward.comparisons.Annotator`). Unlike for people, reliability and biases are known: they are the settings above."""
    counts = {labeler.annotator_id: 0 for labeler in panel}
    for row in rows:
        counts[row["annotator_id"]] += 1
    return [
        {
            "annotator_id": person.annotator_id,
            "pool": pool,
            "locale": "",
            "qualified_at": "",
            "reliability": 1 - person.careless,
            "tie_bias": person.tie,
            "position_bias": person.position,
            "n_events": counts[person.annotator_id],
        }
        for person in panel
    ]


def _event(labeler: Labeler, task: Task, rng: np.random.Generator, *, seed: int, is_repeat: bool, best: int | None) -> dict[str, Any]:
    shown = [int(i) for i in rng.permutation(len(task.clip_ids))]
    ranks = rank(labeler, task.perception, shown, rng)
    lead = int(1000 * labeler.seconds * rng.lognormal(0.0, 0.4))
    return {
        "event_id": _short_hash(str(seed), task.task_id, labeler.annotator_id, str(is_repeat)),
        "task_id": task.task_id,
        "prompt_id": task.prompt_id,
        "annotator_id": labeler.annotator_id,
        "dimension": "overall",
        "kind": "rank",
        "clip_ids": task.clip_ids,
        "ranks": tuple(ranks),
        "choice": None,
        "likert": (),
        "confidence": None,
        "is_gold": best is not None,
        "gold_ok": None if best is None else ranks[best] == 1 and ranks.count(1) == 1,
        "is_repeat": is_repeat,
        "shown_order": tuple(shown),
        "model_hint_shown": False,
        "watch_ms": (),
        "lead_time_ms": lead,
        "skipped_reason": None,
        "flags": (),
        "guideline_version": GUIDELINE,
        "app_version": "",
        "source_dataset": SOURCE,
        "licence": "Apache-2.0",
    }


def _plainly_best(perception: Perception) -> int | None:
    """The clip that is right (> 90 %) while all others are wrong (< 10 %), if there is one."""
    right = perception.right
    best = int(np.argmax(np.nan_to_num(right)))
    others = np.delete(right, best)
    return best if right[best] > 0.9 and bool((others < 0.1).all()) else None


def _cut(rows: Sequence[tuple[str, Tensor]], k: int) -> list[tuple[tuple[str, ...], Tensor]]:
    parts = [rows[i : i + k] for i in range(0, len(rows), k)]
    return [(tuple(clip_id for clip_id, _ in part), torch.stack([video for _, video in part])) for part in parts if len(part) > 1]


def _standardised(signal: Floats) -> Floats:
    return (signal - signal.mean()) / max(float(signal.std()), 1e-6)


def _short_hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
