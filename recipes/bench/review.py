"""What do reviews tell of a filter: do 95 % intervals of recall hold the truth, and what do naive estimates, errors of readers and corrected violation rates come to?

The pool is made of numbers: 20,000 clips of which 2 % violate. The filter blocks 533 of them and is right about 320 (precision 0.60); 80 violations pass (recall 0.80), most of
them with a score near the threshold. A run draws clips to review without replacement, and computes what `reward/safety/measure.py` and its rivals make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from align.config import Count, Seed, Several
from align.constraints import upper_bound
from align.progress import Progress
from recipes.bench._results import Bench, Row, check_can_end, flat, here, write
from recipes.statistics import clopper_pearson
from reward.safety.correction import by_audit, by_error_rates
from reward.safety.measure import Cell, ErrorRates, Estimate, Group, Review, group_of, recall, totals_of

ASKED = 0.93
"""Coverage asked for, of 600 stratified audits at 2 %."""
ROLLOUT = 2_000
"""Clips whose violation rate is corrected."""
CONFIDENCE = 0.95


class Config(Bench):
    runs: Several = 2_000
    """Simulated audits of each row. `quick` takes at most 100."""
    draws: Count = 1_000
    """Simulated totals of an interval."""
    seed: Seed = 0
    """Of audits and of simulated totals."""


class World(NamedTuple):
    """Counts of clips. Strata of what passed: low scores, middling, near the threshold."""

    name: str
    blocked: int
    right: int  # of the blocked ones, how many violate
    sizes: tuple[int, ...] = (16_000, 2_800, 667)
    missed: tuple[int, ...] = (4, 26, 50)

    @property
    def recall(self) -> float:
        return self.right / (self.right + sum(self.missed))

    @property
    def clips(self) -> int:
        return self.blocked + sum(self.sizes)

    @property
    def rate(self) -> float:
        """Share of all clips that violate."""
        return (self.right + sum(self.missed)) / self.clips

    def unstratified(self) -> World:
        return self._replace(sizes=(sum(self.sizes),), missed=(sum(self.missed),))


class Design(NamedTuple):
    """How many clips are reviewed."""

    name: str
    passed: tuple[int, ...]  # of each stratum, or of all
    blocked: int = 200

    def world(self, world: World) -> World:
        return world.unstratified() if len(self.passed) == 1 else world


BASE = World("as described", 533, 320)
RANDOM, RANDOM_MANY = Design("600 random", (600,)), Design("2,000 random", (2_000,))
STRATIFIED = Design("600 stratified, 250/200/150", (250, 200, 150))
DESIGNS = (RANDOM, RANDOM_MANY, STRATIFIED, Design("600 stratified, 350/150/100", (350, 150, 100)), Design("600 stratified, 150/225/225", (150, 225, 225)))
WORLDS = (
    BASE,
    World("no misses at low scores", 533, 320, missed=(0, 30, 50)),
    World("half of the misses at low scores", 533, 320, missed=(40, 20, 20)),
    World("scores tell nothing", 533, 320, missed=(66, 11, 3)),
    World("all misses at low scores, recall 0.68", 533, 320, missed=(150, 0, 0)),
    World("recall 0.95", 633, 380, missed=(2, 8, 10)),
    World("recall 0.50", 333, 200, missed=(20, 80, 100)),
    World("0.5 % violate", 133, 80, missed=(1, 7, 12)),
)


class Seen(NamedTuple):
    """What an audit found."""

    review: Review
    counts: tuple[int, ...]  # violating, of the blocked and of each stratum


def group(size: int, reviewed: int, violating: int) -> Group:
    return group_of([Cell(size, reviewed, (violating,))])


def audited(world: World, design: Design, rng: np.random.Generator, read: Callable[[int, int], int] = lambda violating, harmless: violating) -> Seen:
    """One audit. read: what readers call violating of so many reviewed clips of the passed pool that do and do not violate."""
    world = design.world(world)
    n = min(design.blocked, world.blocked)
    caught = int(rng.hypergeometric(world.right, world.blocked - world.right, n))
    found = [int(rng.hypergeometric(m, size - m, k)) for size, m, k in zip(world.sizes, world.missed, design.passed, strict=True)]
    found = [read(x, k - x) for x, k in zip(found, design.passed, strict=True)]
    passed = tuple(group(size, k, x) for size, k, x in zip(world.sizes, design.passed, found, strict=True))
    return Seen(Review((group(world.blocked, n, caught),), passed), (caught, *found))


# Ways to tell recall

Way = Callable[[Seen, int, int], Estimate]
"""What was seen, a seed and the number of draws -> an estimate."""
SHARED, HALF, DELTA, NAIVE = "Beta, half a violation a pool", "Beta, half a violation a group", "logit and delta", "naive: reviewed clips, unweighted"


def by_shared_prior(seen: Seen, seed: int, draws: int) -> Estimate:
    return recall(seen.review, seed=seed, draws=draws)


def by_half_a_group(seen: Seen, seed: int, draws: int) -> Estimate:
    return recall(seen.review, seed=seed, draws=draws, shared=False)


def by_delta(seen: Seen, seed: int, draws: int) -> Estimate:
    """Normal on the logit of recall, log TP - log M, with variances of stratified sampling without replacement; nothing can be told of a miss that nobody saw."""
    caught, missed = (float(totals_of(groups)[0]) for groups in (seen.review.blocked, seen.review.passed))
    value = caught / (caught + missed)
    if missed == 0 or caught == 0:
        return Estimate(value, value, value)
    spread = np.sqrt(variance(seen.review.blocked) / caught**2 + variance(seen.review.passed) / missed**2)
    logit = np.log(caught / missed)
    low, high = (float(1 / (1 + np.exp(-(logit + sign * norm.ppf(0.975) * spread)))) for sign in (-1, 1))
    return Estimate(value, low, high)


def variance(groups: Sequence[Group]) -> float:
    """Of a total: sum_h N_h^2 (1 - n_h / N_h) p_h (1 - p_h) / (n_h - 1) (Cochran 1977, 5.57)."""
    p = [group.violating[0] / group.reviewed for group in groups]
    return sum(g.size**2 * (1 - g.reviewed / g.size) * q * (1 - q) / (g.reviewed - 1) for g, q in zip(groups, p, strict=True))


def naively(seen: Seen, seed: int, draws: int) -> Estimate:
    """Of the violations among reviewed clips, the share that was blocked: what comes of forgetting that blocked clips are reviewed more often."""
    return Estimate(*clopper_pearson(seen.counts[0], sum(seen.counts)))


WAYS: dict[str, Way] = {SHARED: by_shared_prior, HALF: by_half_a_group, DELTA: by_delta, NAIVE: naively}


def told(estimates: Sequence[Estimate], truth: float) -> Row:
    """What is told of many runs."""
    value, low, high = (np.array([getattr(each, name) for each in estimates]) for name in ("value", "low", "high"))
    known = ~np.isnan(value)
    inside = (low <= truth) & (truth <= high)
    row: Row = {"mean": float(value[known].mean()), "sd": float(value[known].std()), "coverage": float(inside[known].mean()), "width": float((high - low)[known].mean())}
    return row | {"all_above": float((low > truth)[known].mean()), "all_below": float((high < truth)[known].mean()), "not_measurable": float((~known).mean())}


def recall_rows(cfg: Config, world: World, designs: Sequence[Design], ways: Sequence[str]) -> list[Row]:
    """One row for each design and way, of the same audits."""
    rows: list[Row] = []
    for design in designs:
        rng = np.random.default_rng(cfg.seed)
        runs = [audited(world, design, rng) for _ in range(cfg.runs)]
        none = float(np.mean([not any(seen.counts[1:]) for seen in runs]))
        for name in ways:
            estimates = [WAYS[name](seen, run, cfg.draws) for run, seen in enumerate(runs)]
            rows.append({"clips": world.name, "truth": world.recall, "audit": design.name, "estimate": name, "no_miss_seen": none, **told(estimates, world.recall)})
    return rows


# Errors of readers

SENSITIVITY, SPECIFICITY = 0.95, 0.98
GOLD = (200, 400)
"""Clips that violate and that do not, among those that readers are tested on."""


def reader_rows(cfg: Config, world: World, design: Design) -> list[Row]:
    """Recall where readers miss 5 % and make up 2 %: believed, confirmed by a second reader, and with both taken out by what gold clips tell. The blocked pool is read rightly."""
    rows: list[Row] = []
    for name, times in (("one reader, believed", 1), ("misses confirmed by a second reader", 2)):
        rng = np.random.default_rng(cfg.seed)

        def read(violating: int, harmless: int, times: int = times, rng: np.random.Generator = rng) -> int:
            return int(rng.binomial(violating, SENSITIVITY**times) + rng.binomial(harmless, (1 - SPECIFICITY) ** times))

        estimates = [by_shared_prior(audited(world, design, rng, read), run, cfg.draws) for run in range(cfg.runs)]
        rows.append({"readers": name, "truth": world.recall, "audit": design.name, **told(estimates, world.recall)})
    rng = np.random.default_rng(cfg.seed)
    estimates = [corrected(misread(world, design, rng), rng, run, cfg.draws) for run in range(cfg.runs)]
    return [*rows, {"readers": "one reader, errors on gold taken out of both pools", "truth": world.recall, "audit": design.name, **told(estimates, world.recall)}]


def misread(world: World, design: Design, rng: np.random.Generator) -> Review:
    """One audit with readers' errors in both pools."""

    def read(violating: int, harmless: int) -> int:
        return int(rng.binomial(violating, SENSITIVITY) + rng.binomial(harmless, 1 - SPECIFICITY))

    seen = audited(world, design, rng, read)
    blocked = seen.review.blocked[0]
    return Review((group(blocked.size, blocked.reviewed, read(seen.counts[0], blocked.reviewed - seen.counts[0])),), seen.review.passed)


def corrected(review: Review, rng: np.random.Generator, run: int, draws: int) -> Estimate:
    bad, good = GOLD
    return recall(review, readers=ErrorRates(int(rng.binomial(bad, SENSITIVITY)), bad, int(rng.binomial(good, SPECIFICITY)), good), seed=run, draws=draws)


# Corrected violation rates


def rate_rows(cfg: Config, world: World, design: Design) -> list[Row]:
    """Share of a rollout that violates, and its upper bound, at 95 %: what the filter says, and what is left after correction."""
    rng = np.random.default_rng(cfg.seed)
    found: dict[str, list[tuple[float, float]]] = {}
    negatives = world.clips - world.right - sum(world.missed)
    specificity = 1 - (world.blocked - world.right) / negatives
    for run in range(cfg.runs):
        seen = audited(world, design, rng)
        raw = int(rng.binomial(ROLLOUT, world.blocked / world.clips))
        stored = ErrorRates(int(rng.binomial(200, world.recall)), 200, int(rng.binomial(2_000, specificity)), 2_000)
        ways = {
            "raw, Wilson": (raw / ROLLOUT, upper_bound(raw / ROLLOUT, ROLLOUT, CONFIDENCE)),
            "raw x precision / recall": by_audit(raw, ROLLOUT, seen.review, confidence=CONFIDENCE, seed=run, draws=cfg.draws),
            "raw x precision / recall, audited clips drawn again": by_plain_bootstrap(raw, seen.review, rng, cfg.draws),
            "Rogan-Gladen, 200 and 2,000 known clips": by_error_rates(raw, ROLLOUT, stored, confidence=CONFIDENCE, seed=run, draws=cfg.draws),
        }
        for name, (rate, upper) in ways.items():
            found.setdefault(name, []).append((rate, upper))
    rows: list[Row] = []
    for name, pairs in found.items():
        rate, upper = np.array(pairs).T
        row: Row = {"rate": name, "truth": world.rate, "audit": design.name, "mean": float(rate.mean()), "sd": float(rate.std())}
        rows.append(row | {"bound": float(upper.mean()), "bound_holds": float((upper >= world.rate).mean())})
    return rows


def by_plain_bootstrap(raw: int, review: Review, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """As `by_audit`, from clips drawn again out of those reviewed: where no miss was seen, none is ever drawn."""
    total = np.zeros(draws)
    for each in (*review.blocked, *review.passed):
        total += each.size * rng.binomial(each.reviewed, each.violating[0] / each.reviewed, draws) / each.reviewed
    size = sum(each.size for each in review.blocked)
    point = sum(float(totals_of(groups)[0]) for groups in (review.blocked, review.passed))
    upper = np.quantile(rng.binomial(ROLLOUT, raw / ROLLOUT, draws) / ROLLOUT * total / size, CONFIDENCE)
    return raw / ROLLOUT * point / size, float(upper)


# The command


def claims(parts: dict[str, list[Row]]) -> list[Row]:
    """What was asked for before anything was measured, and whether it holds."""
    mine = next(row for row in parts["recall"] if (row["audit"], row["estimate"]) == (STRATIFIED.name, SHARED))
    naive = [row["coverage"] for row in parts["recall"] if row["estimate"] == NAIVE]
    text, failing = f"{mine['coverage']:.4f}, width {mine['width']:.3f}", f"{min(naive):.4f} to {max(naive):.4f}"
    return [
        {"asked": f"95 % intervals of recall hold the truth in at least {ASKED:.0%} of audits ({STRATIFIED.name})", "found": text, "holds": bool(mine["coverage"] >= ASKED)},
        {"asked": f"the naive estimate is shown to fail: less than {ASKED:.0%} in every design", "found": failing, "holds": bool(max(naive) < ASKED)},
    ]


def measure(cfg: Config) -> dict[str, list[Row]]:
    """The rows of each part."""
    parts: dict[str, list[Row]] = {"claims": [], "recall": [], "elsewhere": [], "readers": [], "corrected": []}
    with Progress("review", total=len(DESIGNS) + len(WORLDS) + 3) as progress:
        for design in DESIGNS:
            parts["recall"] += recall_rows(cfg, BASE, [design], list(WAYS))
            progress.advance()
        for world in WORLDS[1:]:
            parts["elsewhere"] += recall_rows(cfg, world, [STRATIFIED], (SHARED, HALF))
            progress.advance()
        for design in (RANDOM, STRATIFIED):
            parts["readers"] += reader_rows(cfg, BASE, design)
            parts["corrected"] += rate_rows(cfg, BASE, design)
            progress.advance()
    return parts | {"claims": claims(parts)}


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: nothing is kept."""
    check_can_end(cfg)
    if cfg.quick:
        cfg = cfg.model_copy(update={"runs": min(100, cfg.runs)})
    parts = measure(cfg)
    if cfg.write:
        failed = [f"{row['asked']}: {row['found']}" for row in parts["claims"] if not row["holds"]]
        remarks = [
            f"Does not hold: {'; '.join(failed)}." if failed else "All that was asked for holds.",
            f"{cfg.runs:,} simulated audits a row. 20,000 clips, 2 % violate, recall 0.80 and precision 0.60, 200 of the blocked clips reviewed, unless a row says otherwise. "
            "`all above`, `all below`: the whole interval is above the truth, or below it.",
        ]
        write(cfg, "review", here("review", cfg), "What reviews tell of a filter", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
