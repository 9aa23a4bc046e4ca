"""Can the default reward model be believed: do its probabilities come true, and do its intervals hold what clips are really worth to people?

Clips of the built-in world, sampled by the shipped base or drawn with faults planted, are ranked by the simulated labelers of `recipes/shapes/labelers.py`, so what each clip is
worth to each of them is known. They are asked about three things: `overall`, as they are, and `motion` and `quality`, for which they go by that alone. A reward model learns from
the rankings of as many prompts as the demo's, is calibrated on those of other prompts, and is judged on still others. A seed draws which prompts are which, who ranks what, and
people's noise.

The truth is the panel's mean utility, before noise and habits. Utilities have another unit than log-odds, so one slope is fitted on the validation prompts; then an interval of
90 % around a difference of two scores should hold the difference of their utilities nine times in ten.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from align.config import Several, Share
from align.progress import Progress
from base_model.prompts.text import TextEncoder
from recipes import reward_model
from recipes.bench._people import panel_worth, perceived
from recipes.bench._pool import Source, asked, kept_pool
from recipes.bench._results import Bench, Row, check_can_end, flat, here, place, write
from recipes.bench._trained import Seeds
from recipes.match import SHIPPED
from recipes.quality import SHIPPED as QUALITY
from recipes.reward_model import ByClip, Table, as_tensors, fit_doubt, fit_head, fit_standard, penalty_of, prior_precision, start_log_tie
from recipes.shapes.eye import Perception
from recipes.shapes.labelers import REWARD_PANEL, Labeler, Task, collect
from recipes.statistics import bootstrap_crossed
from reward.accuracy import Signs, answers_of, differences, without_ties
from reward.agreement import pairs_of
from reward.calibration import brier, calibrated_error, decided, expected_calibration_error, fit_calibration, from_favourite, log_loss, probabilities
from reward.comparisons import RankingEvent
from reward.matcher import load_matcher
from reward.model import RewardModel
from reward.quality import load_quality
from reward.selection import derivatives

CLIPS = 4
"""Of a prompt, ranked together."""
HEADS = 5
"""Of the ensemble, each fitted to its own bootstrap of the rankings."""
Z = 1.645
"""Standard deviations on either side of an interval of 90 %."""
ASKED_ECE, ASKED_COVERAGE = 0.05, (0.85, 0.95)
Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def _only(person: Labeler, *, motion: float = 0.0, sharpness: float = 0.0, lively: float = 0.0) -> Labeler:
    """The same person, who goes by nothing else."""
    return replace(person, right=0.0, color=0.0, shape=0.0, extra=0.0, motion=motion, sharpness=sharpness, lively=lively)


PANELS: Mapping[str, tuple[Labeler, ...]] = {
    "overall": REWARD_PANEL,
    "motion": tuple(_only(person, motion=2 * person.motion) for person in REWARD_PANEL),
    "quality": tuple(_only(person, sharpness=4 + 2 * person.sharpness, lively=person.lively - 3) for person in REWARD_PANEL),  # crisp, and but for one not flashing
}
DIMS = tuple(PANELS)
ALL = "all"


class Config(Bench):
    out: Path = Path("runs/bench-calibration")
    """Folder of the clips, which are made once. `quick` keeps nothing."""
    seeds: Seeds = tuple(range(10))
    """Which prompts are which, who ranks what, and people's noise. `quick` takes two."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)] = ("sampled", "drawn")
    """Where clips come from: the shipped base, or the renderer with faults planted."""
    train: Several = 256
    """Prompts whose rankings are learned from, each of four clips. `quick` takes at most 32."""
    validation: Several = 64
    """Prompts that temperature, tie parameters and the slope are fitted on. `quick` takes at most 16."""
    test: Several = 680
    """Prompts to judge by, six pairs each. `quick` takes at most 40."""
    overlap: Share = 0.4
    """Share of the learned prompts that two or three people rank: what is known of the misfit is known from these."""


# A world


@dataclass(frozen=True)
class World:
    """Clips of P prompts, and what they are worth."""

    source: Source
    inputs: Tensor  # [4P,26]
    perception: Perception  # of 4P clips
    prompt_ids: tuple[str, ...]  # P

    def clip_ids(self, prompt: int) -> tuple[str, ...]:
        return tuple(str(CLIPS * prompt + i) for i in range(CLIPS))  # a clip is known by its row

    def worth(self, dim: str) -> Array:
        """[4P]."""
        return panel_worth(PANELS[dim], self.perception)

    def ranked(self, prompts: Indices, dim: str, *, overlap: float, seed: int) -> list[RankingEvent]:
        tasks = [Task(self.prompt_ids[p], self.clip_ids(p), self.perception[slice(CLIPS * p, CLIPS * p + CLIPS)]) for p in prompts.tolist()]
        return [RankingEvent.of({**row, "dimension": dim}) for row in collect(PANELS[dim], tasks, seed=seed, overlap=overlap)]


def the_world(cfg: Config, source: Source, out: Path) -> World:
    prompts = cfg.train + cfg.validation + cfg.test
    tensors = kept_pool(out, source, prompts, CLIPS)
    return World(source, tensors["inputs"], perceived(tensors["seen"]), tuple(prompt.prompt_id for prompt in asked(prompts)))


def clips_of(prompts: Indices) -> Indices:
    """Rows of the clips of prompts [P], [P,4]."""
    return CLIPS * prompts[:, None] + np.arange(CLIPS)


def pairs_within(prompts: Indices) -> tuple[Indices, Indices]:
    """The first and the second clip of every pair of every prompt, [6P] each, prompt by prompt."""
    first, second = np.array(list(combinations(range(CLIPS), 2))).T
    rows = clips_of(prompts)
    return rows[:, first].ravel(), rows[:, second].ravel()


def pairs_between(prompts: Indices) -> tuple[Indices, Indices]:
    """Every clip and one of the next prompt, [4P] each, prompt by prompt."""
    return clips_of(prompts).ravel(), clips_of(np.roll(prompts, -1)).ravel()


# One training


class Learned(NamedTuple):
    """What one seed's rankings made, on all clips of the world."""

    model: RewardModel
    x: Tensor  # [C,26] what the head sees
    curvature: Tensor  # [R,26,26] covariance of the head's weights by the curvature alone, before the temperature
    heads: Tensor  # [M,C,R] scores of the heads of the ensemble
    train: list[RankingEvent]
    validation: list[RankingEvent]
    test: list[RankingEvent]


def learn(cfg: Config, world: World, parts: Sequence[Indices], encode: TextEncoder, seed: int) -> Learned:
    """parts: the prompts of train, validation and test."""
    by_part = [
        [event for r, dim in enumerate(DIMS) for event in world.ranked(part, dim, overlap=overlap, seed=100 * seed + 10 * k + r)]
        for k, (part, overlap) in enumerate(zip(parts, (cfg.overlap, cfg.overlap, 0.0), strict=True))
    ]
    settings = reward_model.Config()
    model = RewardModel(load_matcher(SHIPPED["reward"]), load_quality(QUALITY["reward"]), DIMS, encode, most_clips=CLIPS).eval()
    fit_standard(model, world.inputs[clips_of(parts[0]).ravel()])
    x = model.standardised(world.inputs)  # [C,26]
    train, validation = (table_of(x, events) for events in by_part[:2])
    with torch.no_grad():
        model.log_tie.copy_(start_log_tie([train], CLIPS))
    generator = torch.Generator().manual_seed(seed)
    heads = [bootstrapped(settings, model, train, generator) for _ in range(HEADS)]
    fit_head(settings, model, train)
    score = model.head(x).detach()  # [C,R]
    fit_doubt(settings, model, train, pairs_of(by_part[0]), scores_by_clip(score))
    reward_model.calibrate(model, score[None], validation)
    return Learned(model, x, curvature_alone(settings, model, train), torch.stack([head(x).detach() for head in heads]), *by_part)


def table_of(x: Tensor, events: Sequence[RankingEvent]) -> Table:
    rows = {clip_id: int(clip_id) for event in events for clip_id in event.clip_ids}
    return Table(x, *as_tensors(events, rows, DIMS, CLIPS, Counter(event.prompt_id for event in events)))


def scores_by_clip(score: Tensor) -> ByClip:
    return {(dim, str(row)): value for row, values in enumerate(score.tolist()) for dim, value in zip(DIMS, values, strict=True)}


def bootstrapped(settings: reward_model.Config, model: RewardModel, train: Table, generator: torch.Generator) -> torch.nn.Linear:
    """A head that learns from rankings counted as often as a bootstrap would draw them (Poisson)."""
    other = copy.deepcopy(model)
    fit_head(settings, other, replace(train, weight=train.weight * torch.poisson(torch.ones_like(train.weight), generator=generator)))
    return other.head


def curvature_alone(settings: reward_model.Config, model: RewardModel, train: Table) -> Tensor:
    """Laplace's covariance, as if the weighted likelihood were a likelihood, [R,26,26]."""
    precision, found = prior_precision(*penalty_of(settings, model)), []
    for r in range(len(DIMS)):
        mine = train.dim == r
        rows = train.inputs.double()[train.index[mine]]  # [E,K,26]
        _, _, curve = derivatives(rows @ model.head.weight[r].detach().double(), train.ranks[mine], model.log_tie[r].detach().double())
        found.append(torch.linalg.inv(precision + torch.einsum("e,ekd,ekl,elf->df", train.weight[mine].double(), rows, curve, rows)))
    return torch.stack(found)


# Coverage

Doubt = Callable[[Indices, Indices], tuple[Array, Array]]
"""Clips [N] and clips [N] -> the difference of their scores and its standard deviation, [N] each."""
MODEL = "weights and misfit"
"""What `RewardModel` says."""


def doubts(one: Learned, r: int) -> dict[str, Doubt]:
    """What several ways to say how uncertain a score is say of a difference, in one dimension; uncalibrated, since a factor on score and doubt changes no coverage."""
    score, misfit = one.model.head(one.x).detach()[:, r], float(one.model.misfit[r])
    heads = one.heads[:, :, r]  # [M,C]

    def by_weights(covariance: Tensor, tau: float = 0.0) -> Doubt:
        def doubt(first: Indices, second: Indices) -> tuple[Array, Array]:
            away = (one.x[first] - one.x[second]).double()
            return (score[first] - score[second]).double().numpy(), (((away @ covariance.double()) * away).sum(1) + 2 * tau**2).sqrt().numpy()

        return doubt

    def of_clips(first: Indices, second: Indices) -> tuple[Array, Array]:
        spread = heads.std(0, correction=0)
        return (heads.mean(0)[first] - heads.mean(0)[second]).double().numpy(), (spread[first].square() + spread[second].square()).sqrt().double().numpy()

    def of_differences(first: Indices, second: Indices) -> tuple[Array, Array]:
        away = heads[:, first] - heads[:, second]
        return away.mean(0).double().numpy(), away.std(0, correction=0).double().numpy()

    return {
        f"{HEADS} heads, clip by clip": of_clips,
        f"{HEADS} heads": of_differences,
        "weights, by curvature": by_weights(one.curvature[r]),
        "weights": by_weights(one.model.covariance[r]),
        MODEL: by_weights(one.model.covariance[r], misfit),
    }


class Held(NamedTuple):
    """Pairs of one seed."""

    inside: Array  # [N] 1 where the interval holds the truth
    error: Array  # [N] how far the truth is from the score's difference, in the unit of the score
    said: Array  # [N] the standard deviation


def held(doubt: Doubt, worth: Array, slope: float, first: Indices, second: Indices) -> Held:
    difference, deviation = doubt(first, second)
    error = (worth[first] - worth[second]) / slope - difference
    return Held((np.abs(error) <= Z * deviation).astype(np.float64), error, deviation)


def slope_within(doubt: Doubt, worth: Array, prompts: Indices) -> float:
    """Of utility on score by least squares over the differences within prompts: the intercept cancels."""
    first, second = pairs_within(prompts)
    difference, _ = doubt(first, second)
    return float(difference @ (worth[first] - worth[second]) / (difference @ difference))


def slope_over_clips(doubt: Doubt, worth: Array, prompts: Indices) -> float:
    """Of utility on score by least squares over clips, differences between prompts included."""
    rows = clips_of(prompts).ravel()
    score, _ = doubt(rows, np.full_like(rows, rows[0]))
    slope, _ = np.polyfit(score, worth[rows], 1)
    return float(slope)


class Way(NamedTuple):
    """How coverage was measured."""

    method: str
    slope: str  # fitted on differences "within prompts", or "over clips"
    compared: str  # clips "within prompts" or "between prompts"


def ways_of(one: Learned, world: World, dim: str, parts: Sequence[Indices]) -> dict[Way, Held]:
    """Every way, on pairs of the test prompts."""
    _, validation, test = parts
    worth, by_method = world.worth(dim), doubts(one, DIMS.index(dim))
    within, between = pairs_within(test), pairs_between(test)
    found = {Way(name, "within prompts", "within prompts"): held(doubt, worth, slope_within(doubt, worth, validation), *within) for name, doubt in by_method.items()}
    mine = by_method[MODEL]
    over = slope_over_clips(mine, worth, validation)
    return found | {Way(MODEL, "over clips", "within prompts"): held(mine, worth, over, *within), Way(MODEL, "over clips", "between prompts"): held(mine, worth, over, *between)}


def coverage_rows(source: Source, found: Mapping[str, Sequence[dict[Way, tuple[Held, Indices]]]], prompts: int) -> list[Row]:
    """found: dimension -> for each seed, what every way held, and the prompts of the test. Intervals resample seeds and prompts."""
    rows: list[Row] = []
    ways = list(next(iter(found.values()))[0])
    for way in ways:
        tables = {}
        for dim, seeds in found.items():
            table = np.full((len(seeds), prompts), np.nan)
            for s, one in enumerate(seeds):
                inside, test = one[way][0].inside, one[way][1]
                table[s, test] = inside.reshape(len(test), -1).mean(1)
            tables[dim] = table
        for dim in (ALL, *found):
            chosen = list(found) if dim == ALL else [dim]
            value = bootstrap_crossed(np.mean([tables[each] for each in chosen], axis=0), draws=2_000)
            mine = [one[way][0] for each in chosen for one in found[each]]
            said, error = (None, None) if dim == ALL else (float(np.sqrt(np.mean([getattr(each, name) ** 2 for each in mine]))) for name in ("said", "error"))
            row: Row = {"clips": source, "dimension": dim, **way._asdict(), "coverage": value.mean, "low": value.low, "high": value.high}
            rows.append(row | {"said": said, "error": error})
    return rows


# Calibration

Probabilities = Callable[[Array], Array]
"""Differences [N] -> probabilities of first better, tie, second better [N,3]."""
HEAD, ALL_LOOK = "one head", "one head, as if nobody were careless"


def calibrated(answer: Signs, difference: Array, *, careless: bool = True) -> Probabilities:
    """As `rushes evaluate-reward` calibrates, or as if nobody were careless."""
    return partial(probabilities, calibration=fit_calibration(answer, difference, careless=careless))


def calibration_rows(source: Source, dim: str, learned: Sequence[Learned]) -> list[Row]:
    """One row a score: means over the seeds, and the largest calibration error of a seed."""
    r = DIMS.index(dim)
    head, ensemble = [one.model.head(one.x).detach()[:, r] for one in learned], [one.heads[:, :, r].mean(0) for one in learned]
    rows: list[Row] = []
    for name, scores, calibrate in ((HEAD, head, calibrated), (f"{HEADS} heads", ensemble, calibrated), (ALL_LOOK, head, partial(calibrated, careless=False))):
        each = [judged(score, one, dim, calibrate, seed) for seed, (score, one) in enumerate(zip(scores, learned, strict=True))]
        row: Row = {"clips": source, "dimension": dim, "score": name}
        row |= {key: float(np.mean([one[key] for one in each])) for key in each[0]}
        rows.append(row | {"ece_largest": max(one["ece"] for one in each)})
    return rows


def judged(score: Tensor, one: Learned, dim: str, calibrate: Callable[[Signs, Array], Probabilities], seed: int) -> dict[str, float]:
    """Of scores [C], calibrated on validation: accuracy without ties, and how the probabilities of {favourite better, tie, other better} compare with what happened."""
    values = {str(row): value for row, value in enumerate(score.tolist())}
    pairs = [pairs_of(event for event in events if event.dimension == dim) for events in (one.validation, one.test)]
    fitted, told = (answers_of(some, {pair.prompt_id: pair.prompt_id for pair in some}) for some in pairs)
    known, gap = (differences(some, values)[told.pair] for some, told in zip(pairs, (fitted, told), strict=True))
    three = from_favourite(calibrate(fitted.answer, known)(gap), told.answer)
    two = decided(*three)
    return {
        "prompts": float(len({pair.prompt_id for pair in pairs[1]})),
        "answers": float(len(told.answer)),
        "accuracy": without_ties(told.answer, gap, told.cluster).mean,
        "nll": log_loss(*three),
        "brier": brier(*three),
        "ece": expected_calibration_error(*three),
        "ece_if_right": calibrated_error(three[0], seed=seed).mean,
        "ece_decided": expected_calibration_error(*two),
        "ece_decided_if_right": calibrated_error(two[0], seed=seed).mean,
    }


# Rows


def claims(parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """What was asked for before anything was measured, and whether it holds."""
    rows: list[Row] = []
    for row in parts["calibration"]:
        if row["score"] == HEAD:
            found = f"up to {row['ece_largest']:.3f}, mean {row['ece']:.3f}; right probabilities {row['ece_if_right']:.3f}"
            rows.append(claim(row, f"ECE of every seed at most {ASKED_ECE:g}", found, row["ece_largest"] <= ASKED_ECE))
    low, high = ASKED_COVERAGE
    for row in parts["coverage"]:
        if (row["method"], row["slope"]) == (MODEL, "within prompts"):
            found = f"{row['coverage']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            rows.append(claim(row, f"intervals of 90 % hold between {low:g} and {high:g}", found, low <= row["coverage"] <= high))
    return rows


def claim(row: Row, asked: str, found: str, holds: bool) -> Row:
    return {"clips": row["clips"], "dimension": row["dimension"], "asked": asked, "found": found, "holds": bool(holds)}


# The command


def measure(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    prompts, encode = cfg.train + cfg.validation + cfg.test, TextEncoder()
    parts: dict[str, list[Row]] = {"calibration": [], "coverage": []}
    for source in cfg.sources:
        world = the_world(cfg, source, out)
        learned: list[Learned] = []
        found: dict[str, list[dict[Way, tuple[Held, Indices]]]] = {dim: [] for dim in DIMS}
        with Progress(f"calibration, {source}", total=len(cfg.seeds)) as progress:
            for seed in cfg.seeds:
                order = np.random.default_rng([seed, 0]).permutation(prompts)
                split = np.split(order, [cfg.train, cfg.train + cfg.validation])
                learned.append(learn(cfg, world, split, encode, seed))
                for dim in DIMS:
                    found[dim].append({way: (each, split[2]) for way, each in ways_of(learned[-1], world, dim, split).items()})
                progress.advance()
        parts["calibration"] += [row for dim in DIMS for row in calibration_rows(source, dim, learned)]
        parts["coverage"] += coverage_rows(source, found, prompts)
    return {"claims": claims(parts), **parts}


def shrunk(cfg: Config) -> Config:
    """The quick form: enough to see that everything runs."""
    return cfg.model_copy(update={"seeds": cfg.seeds[:2], "train": min(32, cfg.train), "validation": min(16, cfg.validation), "test": min(40, cfg.test)})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: clips are made once."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = measure(small, out)
    if cfg.write:
        failed = [f"{row['asked']} ({row['clips']} clips, {row['dimension']}: {row['found']})" for row in parts["claims"] if not row["holds"]]
        remarks = [
            f"Does not hold: {'; '.join(failed)}." if failed else "All that was asked for holds.",
            f"{len(small.seeds)} seeds. `low` and `high` are 95 % bootstraps over seeds and prompts, both resampled. People are simulated.",
        ]
        write(cfg, "calibration", here("calibration", cfg), "Calibration and honest intervals", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
