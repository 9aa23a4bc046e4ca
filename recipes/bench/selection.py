"""Which clips to rank next: how many rankings do chosen tasks save against random ones, for the same accuracy on held-out prompts?

A pool is drawn first and is the same for every method and seed: clips of the built-in world, right or with up to three attributes wrong, some blurred or flashing, each with the 26
inputs of the reward model. The simulated labelers of `recipes/shapes/labelers.py` rank. All methods of a seed begin with the same few random rankings and add as many a round;
a share of every round, the floor, is drawn at random also where the rest is chosen, and counts. What is learned is a linear score (`reward/selection.py`). The truth it is held
against is what the panel prefers on average, without noise and habits, on prompts that nobody ranked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import isotonic_regression
from torch import Tensor

from align.config import Count, Positive, Share
from base_model.errors import UserError
from recipes.bench._people import panel_worth, perceived
from recipes.bench._pool import kept_pool, pool_settings
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._trained import Pace, Seeds, kept
from recipes.shapes.eye import Perception
from recipes.shapes.labelers import REWARD_PANEL, rank
from reward.asking import Candidate, Given, Mix, next_tasks
from reward.ranking import pair_outcomes, tie_parameter
from reward.selection import METHODS, Method, best_first, laplace_posterior, prior

VERSION = 1
"""Of what a curve means. One more wherever that changes: what was kept before is then refused, not read."""
CLOSE = 0.25
"""Clips of the held-out prompts whose worth differs by less ask nothing."""
TARGETS = (0.5, 0.75, 0.9)
"""Accuracies asked for, as shares of what random tasks gain from the first rankings to the last."""
GOAL = 0.6
DRAWS = 2000
Array = NDArray[np.float64]


class Config(Bench):
    out: Path = Path("runs/bench-selection")
    """Folder of the pool and of finished curves, which are not computed again. `quick` keeps nothing."""
    seeds: Seeds = tuple(range(20))
    """Seeds of people's noise, first rankings and random tasks; five say little. `quick` takes at most two."""
    methods: tuple[Method, ...] = METHODS
    """What is compared; ratios are to `random`."""
    sizes: Annotated[tuple[Annotated[int, Field(ge=2, le=4)], ...], Field(min_length=1)] = (2, 4)
    """Clips a task, one table for each."""
    prompts: Count = 240
    """Prompts of the pool. `quick` takes at most 12."""
    held_out: Count = 120
    """Prompts that accuracy is measured on. `quick` takes at most 8."""
    clips: Annotated[int, Field(ge=4, le=12)] = 6
    """Clips a prompt; a task is any set of them."""
    rankings: Annotated[tuple[Count, ...], Field(min_length=2)] = (240, 120)
    """Rankings in all, for the smallest and for larger tasks."""
    start: Count = 6
    """Rankings that all methods begin with."""
    round: Count = 6
    """Rankings added before the next are chosen."""
    floor: Share = 0.25
    """Share of them that is random whatever the method."""
    candidates: Count = 1_500
    """Tasks looked at in each round, drawn anew. `quick` takes at most 60."""
    precision: Positive = 1.0
    """Prior of the weights of standardised inputs: N(0, 1 / precision)."""


# The pool


@dataclass(frozen=True)
class Pool:
    """C clips of P prompts, as many a prompt; those of the last prompts are held out."""

    inputs: Tensor  # [C,26] standardised on the clips that may be ranked
    perception: Perception  # of C clips
    clips: int  # a prompt
    ranked: int  # prompts that may be ranked

    def tasks(self, k: int) -> Tensor:
        """Every set of k clips of every prompt that may be ranked, rows of `inputs` [N,k]."""
        sets = torch.tensor(list(combinations(range(self.clips), k)))
        return (torch.arange(self.ranked)[:, None, None] * self.clips + sets).flatten(0, 1)

    def held_out_pairs(self) -> tuple[Tensor, Array]:
        """Pairs of clips of held-out prompts that are not close [P,2], and which is better [P]: +1 the first, -1 the second."""
        sets = torch.tensor(list(combinations(range(self.clips), 2)))
        first = torch.arange(self.ranked, len(self.inputs) // self.clips)[:, None, None] * self.clips
        pairs = (first + sets).flatten(0, 1)
        worth = panel_worth(REWARD_PANEL, self.perception)[pairs.numpy()]  # [P,2]
        difference = worth[:, 0] - worth[:, 1]
        decided = np.abs(difference) >= CLOSE
        return pairs[torch.from_numpy(decided)], np.sign(difference[decided])


def pool_of(inputs: Tensor, seen: Tensor, clips: int, ranked: int) -> Pool:
    """Out of what `make_pool` says."""
    known = inputs[: ranked * clips]
    standard = ((inputs - known.mean(0)) / known.std(0).clamp(min=1e-4)).clamp(-3, 3)
    return Pool(standard.double(), perceived(seen), clips, ranked)


def the_pool(cfg: Config, out: Path) -> Pool:
    """The pool, drawn once for its settings."""
    tensors = kept_pool(out, "drawn", cfg.prompts + cfg.held_out, cfg.clips)
    return pool_of(tensors["inputs"], tensors["seen"], cfg.clips, cfg.prompts)


# One way from the first rankings to the last


@dataclass
class Answers:
    """Rankings so far, on rows of the pool."""

    index: list[list[int]]
    ranks: list[list[int]]

    def tensors(self, k: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.index, dtype=torch.long).reshape(-1, k), torch.tensor(self.ranks, dtype=torch.long).reshape(-1, k)


def ask(pool: Pool, task: Given, seed: int, answers: Answers) -> None:
    """A person's ranking. It depends on the seed, the person and the clips alone: whoever chose the task."""
    rows = [int(clip_id) for clip_id in task.clip_ids]
    person = next(each for each in REWARD_PANEL if each.annotator_id == task.person)
    rng = np.random.default_rng([seed, REWARD_PANEL.index(person), *rows])
    answers.index.append(rows)
    answers.ranks.append(rank(person, pool.perception[rows], task.shown_order, rng))


def tie_parameters(ranks: Tensor) -> Tensor:
    """Log tie parameters [K-1] from the share of ties among the pairs, as `rushes reward-model` begins."""
    outcome, both = pair_outcomes(ranks)
    share = float((outcome[both] == 0).double().mean())
    return tie_parameter(min(max(share, 0.02), 0.6)) - torch.arange(ranks.shape[1] - 1).double()


def curve(cfg: Config, pool: Pool, k: int, total: int, method: Method, seed: int) -> dict[str, Any]:
    """Accuracy on held-out prompts after the first rankings and after every round, and how many of all rankings were of random tasks."""
    tasks = pool.tasks(k)
    row = {tuple(map(str, task)): number for number, task in enumerate(tasks.tolist())}
    candidates = [Candidate(str(rows[0] // pool.clips), tuple(map(str, rows))) for rows in tasks.tolist()]
    people = [person.annotator_id for person in REWARD_PANEL]
    pairs, truth = pool.held_out_pairs()
    given: list[Given] = []
    answers = Answers([], [])
    numbers, accuracy = [], []
    while True:
        first = not given
        rng = np.random.default_rng([seed, k, len(given)])
        open_rows = np.setdiff1d(np.arange(len(tasks)), [row[each.clip_ids] for each in given])
        some = np.sort(rng.permutation(open_rows)[: cfg.candidates])
        want = min(cfg.start if first else cfg.round, total - len(given))
        index, ranks = answers.tensors(k)
        order = list(range(len(some)))
        if not first:
            log_tie = tie_parameters(ranks)
            posterior = laplace_posterior(prior(pool.inputs.shape[1], cfg.precision), pool.inputs, index, ranks, log_tie)
            score, _ = posterior.scores(pool.inputs)
            numbers.append(len(given))
            accuracy.append(accuracy_of(score.numpy()[pairs.numpy()], truth))
            if want < 1 or not len(some):
                return {"numbers": numbers, "accuracy": accuracy, "random": sum(each.kind == "random" for each in given)}
            order = best_first(method, posterior, pool.inputs, tasks[some], log_tie, number=want, seed=seed)
        offered = [candidates[some[place]] for place in order]
        floor = 1.0 if first or method == "random" else cfg.floor
        for turn, number in enumerate(np.bincount(np.arange(want) % len(people), minlength=len(people)).tolist()):
            new = next_tasks(people[turn], number, offered, given, mix=Mix(1 - floor, floor, 0, 0, 0, most=total), seed=seed)
            given += new
            for task in new:
                ask(pool, task, seed, answers)


def accuracy_of(scores: Array, truth: Array) -> float:
    """Scores of pairs [P,2] against which is better [P]; equal ones earn one half."""
    return float((np.sign(scores[:, 0] - scores[:, 1]) * truth / 2 + 0.5).mean())


def everything(cfg: Config, pool: Pool, k: int) -> dict[str, Any]:
    """Accuracy of the linear score once every task of the pool has been ranked by somebody, of the matcher alone, and the share of ties."""
    answers = Answers([], [])
    for number, rows in enumerate(pool.tasks(k).tolist()):
        order = np.random.default_rng([0, number]).permutation(k).tolist()
        ask(pool, Given(REWARD_PANEL[number % len(REWARD_PANEL)].annotator_id, "", tuple(map(str, rows)), tuple(order), "random"), 0, answers)
    index, ranks = answers.tensors(k)
    posterior = laplace_posterior(prior(pool.inputs.shape[1], cfg.precision), pool.inputs, index, ranks, tie_parameters(ranks))
    pairs, truth = pool.held_out_pairs()
    outcome, both = pair_outcomes(ranks)
    matched = pool.inputs[:, :3].sum(1)
    return {
        "clips_a_task": k,
        "clips": len(pool.inputs),
        "tasks": len(index),
        "held_out_pairs": len(pairs),
        "tied_share": float((outcome[both] == 0).double().mean()),
        "accuracy_of_everything": accuracy_of(posterior.scores(pool.inputs)[0].numpy()[pairs.numpy()], truth),
        "accuracy_of_matcher": accuracy_of(matched.numpy()[pairs.numpy()], truth),
    }


# Ratios


def needed(numbers: Array, accuracy: Array, target: float) -> float:
    """Rankings at which a mean curve [n], made monotone (isotonic regression), reaches the target, between rounds by interpolation; inf where it does not."""
    smooth = isotonic_regression(accuracy).x
    if smooth[-1] < target:
        return float("inf")
    at = int(np.argmax(smooth >= target))
    if at == 0 or smooth[at] == smooth[at - 1]:
        return float(numbers[at])
    return float(numbers[at - 1] + (numbers[at] - numbers[at - 1]) * (target - smooth[at - 1]) / (smooth[at] - smooth[at - 1]))


def targets_of(random: Array) -> list[float]:
    """The accuracies asked for, from the mean curve of random tasks [n]."""
    smooth = isotonic_regression(random).x
    return [float(smooth[0] + share * (smooth[-1] - smooth[0])) for share in TARGETS]


def compare(numbers: Array, method: Array, random: Array, *, draws: int = DRAWS) -> list[Row]:
    """Curves [seeds,n] of a method and of random tasks -> a row a target; the interval resamples the seeds, both curves of a seed together."""

    def ratios(rows: NDArray[np.int64]) -> list[tuple[float, float]]:
        mine, theirs = method[rows].mean(0), random[rows].mean(0)
        return [(needed(numbers, mine, target), needed(numbers, theirs, target)) for target in targets_of(theirs)]

    every = np.arange(len(random))
    found = ratios(every)
    rng = np.random.default_rng(0)
    drawn = np.array([[a / b for a, b in ratios(rng.choice(every, len(every)))] for _ in range(draws)])  # [draws,targets]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0, method="nearest")
    return [
        {
            "gain_of_random": share,
            "accuracy": target,
            "rankings": mine,
            "rankings_random": theirs,
            **columns("ratio", (mine / theirs, float(low[n]), float(high[n]))),
            "goal_met": bool(high[n] <= GOAL),
        }
        for n, (share, target, (mine, theirs)) in enumerate(zip(TARGETS, targets_of(random.mean(0)), found, strict=True))
    ]


def known(row: Row) -> Row:
    """What was never reached is null."""
    return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in row.items()}


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    less = {"prompts": min(12, cfg.prompts), "held_out": min(8, cfg.held_out), "candidates": min(60, cfg.candidates), "rankings": (24, 24), "seeds": cfg.seeds[:2], "clips": 4}
    return cfg.model_copy(update=less)


def measure(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    if "random" not in cfg.methods:
        raise UserError("methods: ratios are to `random`, which is not among them. Add it to --methods")
    pool = the_pool(cfg, out)
    pace = Pace("selection", len(cfg.sizes) * len(cfg.methods) * len(cfg.seeds))
    ratios: list[Row] = []
    accuracies: list[Row] = []
    told: list[Row] = []
    for at, k in enumerate(cfg.sizes):
        total = cfg.rankings[min(at, len(cfg.rankings) - 1)]
        curves: dict[Method, list[dict[str, Any]]] = {}
        for method in cfg.methods:
            for seed in cfg.seeds:
                file = out / f"{k}-clips" / f"{method}-{seed}.json"
                rest = {"start": cfg.start, "round": cfg.round, "floor": cfg.floor, "candidates": cfg.candidates, "precision": cfg.precision}
                clips = {"pool": pool_settings("drawn", cfg.prompts + cfg.held_out, cfg.clips), "ranked": cfg.prompts}
                settings = {"version": VERSION, **clips, "k": k, "total": total, "method": method, "seed": seed, **rest}
                fresh = not file.exists()
                curves.setdefault(method, []).append(kept(file, settings, lambda: curve(cfg, pool, k, total, method, seed)))  # noqa: B023
                pace.advance(f"{k} clips, {method}, seed {seed}", 1, fresh=fresh)
        numbers = np.array(curves["random"][0]["numbers"], dtype=np.float64)
        tables = {method: np.array([each["accuracy"] for each in found]) for method, found in curves.items()}  # [seeds,n]
        told.append(everything(cfg, pool, k))
        accuracies += accuracies_of(k, numbers, tables)
        for method in (each for each in cfg.methods if each != "random"):
            share = float(np.mean([each["random"] for each in curves[method]]) / numbers[-1])
            ratios += [known({"clips_a_task": k, "method": method, "random_share": share, **row}) for row in compare(numbers, tables[method], tables["random"])]
    return {"ratios": ratios, "accuracy": accuracies, "pool": told}


def accuracies_of(k: int, numbers: Array, tables: dict[Method, Array]) -> list[Row]:
    """The mean accuracy of each method over the seeds, after the first rankings and after each fifth of the others."""
    places = sorted({round(share * (len(numbers) - 1)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)})
    return [{"clips_a_task": k, "rankings": int(numbers[at]), **{method: float(table[:, at].mean()) for method, table in tables.items()}} for at in places]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = measure(small, out)
    if cfg.write:
        remarks = [
            f"{len(small.seeds)} seeds. `ratio`: rankings a method needs over those that random tasks need for the same accuracy on held-out prompts, the random floor of "
            f"{cfg.floor:.0%} counted; `low` and `high` are 95 % bootstraps over seeds. `gain of random`: the accuracy asked for, as a share of what random tasks gain "
            f"from the first rankings to the last. The goal, {GOAL:.0%}, is met where the whole interval is not above it; a ratio that is left out was not reached.",
        ]
        write(cfg, "selection", here("selection", cfg), "Which clips to rank next", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
