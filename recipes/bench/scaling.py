"""Quality against training compute, and against the tokens a clip is sampled with: does more of either help, and where would it end?

Every budget is a training of its own from the same fresh network, with a warm-up and a cosine of its own length, on messy data as in `rushes pretrain`. What is measured is held
out: the loss at fixed noise quantiles, and the share of prompts whose clip the judge finds right. L(C) = L_inf + a (C / C1)^-b is fitted to the means over the seeds (C1: the
smallest budget), the form of Henighan et al. 2020 (arXiv 2010.14701, equation 1.1).
FLOPs of a training are three times those of its forward passes (matrix products alone).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator

from align.config import Count, dump
from align.data import PackSampler
from base_model.networks.packing import Segments
from base_model.tiny import LatentVideoModel, load_tiny, packed_text
from base_model.types import ClipShape
from base_model.video.files import write_atomic
from recipes.bench._power_law import PowerLaw, fit_power_law
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._trained import HELD_OUT_SEED, PROMPT_SEED, Pace, Seeds, Trained, asked, first_model, kept, look_settings, looks, train_kept, training
from recipes.bench.networks import Size, forward_flops
from recipes.charts import Series, line_chart, page
from recipes.fit import Fit, held_out_losses
from recipes.generate import Sampler, best_device, network_lineage
from recipes.pairs import Pairs, encode_pairs
from recipes.shapes.dataset import draw_clips
from recipes.shapes.judge import judge
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from recipes.statistics import bootstrap_crossed, bootstrap_mean

DATA_SEED = 0
PACKS_COUNTED = 16  # of a training, for its FLOPs a token
COLOURS = {"seed": "#2f6fb3", "other": "#c2410c", "fit": "#1a1c20"}
MORE = ".limit{stroke:#b3261e}.seed .line,.other .line,.fit .dot{display:none}.fit .line{stroke-width:1.5}"


class Config(Bench):
    out: Path = Path("runs/bench-scaling")
    """Folder of the trainings: what is finished there is not repeated, and several calls with other `seeds` may fill it side by side. `quick` keeps nothing."""
    seeds: Seeds = (0, 1)
    """Seeds of weights, packs and noise, one training of each budget for every one. `quick` takes the first."""
    budgets: Annotated[tuple[Count, ...], Field(min_length=3)] = (1, 2, 4, 8, 16, 32)
    """Lengths of the trainings in units of `fit.iterations`, increasing. `quick` takes 1, 2 and 3."""
    network: Size = Size(width=128, depth=4)
    """Size of the network."""
    clips: Count = 24_000
    """Messy pairs to train on, the same for all. `quick` takes at most 48."""
    fit: Fit = Fit(iterations=180, packs=1, lr=5e-3, optimizer="muon", time_shift=2.5, save_every=200, evaluate_every=100_000)
    """How the smallest budget is trained; the others have more iterations. `quick` takes at most 2 and 8 held-out clips."""
    prompts: Count = 160
    """Held-out prompts of one object, one clip each. `quick` takes at most 6."""
    sampler: Sampler = Sampler()
    """How clips are denoised, and their size while training compute varies."""
    sides: Annotated[tuple[Count, ...], Field(min_length=1)] = (16, 24, 32, 40, 48)
    """Sides in pixels, multiples of 8, increasing, at which the longest training of every seed is sampled. `quick` takes the first two."""
    model: Path | None = None
    """Another network to sample at these sides."""

    @field_validator("budgets", "sides")
    @classmethod
    def _values_increase(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if list(values) != sorted(set(values)):
            raise ValueError(f"expected increasing values, got {list(values)}")
        return values

    @field_validator("sides")
    @classmethod
    def _sides_fall_on_the_grid(cls, sides: tuple[int, ...]) -> tuple[int, ...]:
        if any(side % 8 for side in sides):
            raise ValueError(f"expected multiples of 8, got {list(sides)}")
        return sides


class Judged(NamedTuple):
    """What was measured of one network at one size."""

    losses: tuple[float, ...]  # at each quantile, least noise first
    right: tuple[float, ...]  # of each prompt

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses))


class Point(NamedTuple):
    """One training."""

    seed: int
    budget: int
    iterations: int
    flops: float
    trained: Trained
    judged: Judged


# Counting


def flops_per_token(model: LatentVideoModel, pairs: Pairs, fit: Fit) -> float:
    """FLOPs of one forward pass over packs with their captions, a token: over the first packs, to which all others are alike."""
    lengths, words = pairs.num_tokens(model.config.patch), packed_text(model.encode_text(pairs.texts))[1].lengths
    sampler = PackSampler(lengths, fit.capacity, seed=DATA_SEED)
    packs = [sampler[k] for k in range(PACKS_COUNTED)]
    flops = sum(forward_flops(model.config, Segments(tuple(lengths[j] for j in rows)), Segments(tuple(words[j] for j in rows))) for rows in packs)
    return flops / sum(lengths[j] for rows in packs for j in rows)


def flops_per_clip(model: LatentVideoModel, held_out: Pairs, sampler: Sampler) -> float:
    """FLOPs of denoising one clip, guidance included, decoding not."""
    lengths = tuple(held_out.num_tokens(model.config.patch))
    once = forward_flops(model.config, Segments(lengths), packed_text(model.encode_text(held_out.texts))[1]) / len(lengths)
    return once * sampler.steps * (1 if sampler.guidance == 1 else 2)


# Measuring


def judged(cfg: Config, weights: Path, held_out: Pairs, sampler: Sampler) -> dict[str, Any]:
    """`Judged`, as it is kept."""
    model = load_tiny(weights).to(best_device())
    losses = held_out_losses(model, held_out, torch.Generator().manual_seed(0))
    right = looks(model, *asked(cfg.prompts), sampler)["all_right"]
    return {"losses": losses.tolist(), "right": right}


def judged_kept(cfg: Config, file: Path, weights: Path, held_out: Pairs, sampler: Sampler) -> Judged:
    settings = {**look_settings(weights, cfg.prompts, dump(sampler)), "held_out": cfg.fit.held_out}
    found = kept(file, settings, partial(judged, cfg, weights, held_out, sampler))
    return Judged(tuple(found["losses"]), tuple(found["right"]))


def held_out_pairs(cfg: Config, model: LatentVideoModel, clip: ClipShape) -> Pairs:
    return encode_pairs(model, draw_clips("curated", cfg.fit.held_out, seed=HELD_OUT_SEED, shape=clip))


def messy_pairs(cfg: Config, model: LatentVideoModel) -> Pairs:
    print(f"scaling: drawing and encoding {cfg.clips} clips", file=sys.stderr, flush=True)
    return encode_pairs(model, draw_clips("messy", cfg.clips, seed=DATA_SEED))


def points(cfg: Config, out: Path) -> list[Point]:
    """Every budget of every seed: the smallest budgets of all seeds first."""
    fresh_one = first_model(training("messy clips", cfg.clips, cfg.network, None, cfg.fit), 0, None)
    held_out = held_out_pairs(cfg, fresh_one, cfg.sampler.clip)
    demo = held_out_pairs(cfg, fresh_one, DEMO_CLIP)
    data: Callable[[], Pairs] = cache(partial(messy_pairs, cfg, fresh_one))
    cost = {"fit": dump(cfg.fit), "network": dump(cfg.network), "clips": cfg.clips}
    found: list[Point] = []
    pace = Pace("scaling", len(cfg.seeds) * sum(cfg.budgets))
    for budget in cfg.budgets:
        for seed in cfg.seeds:
            folder = out / f"seed-{seed}" / f"budget-{budget:03d}"
            fresh = not (folder / "trained.json").exists()
            fit = cfg.fit.model_copy(update={"iterations": budget * cfg.fit.iterations})
            done = train_kept(folder, training("messy clips", cfg.clips, cfg.network, None, fit), seed, None, data, demo)
            counted = kept(out / f"seed-{seed}" / "flops.json", cost, lambda: {"per_token": flops_per_token(fresh_one, data(), cfg.fit)})
            seen = judged_kept(cfg, folder / "result.json", done.weights, held_out, cfg.sampler)
            found.append(Point(seed, budget, fit.iterations, 3 * counted["per_token"] * done.tokens, done, seen))
            pace.advance(f"seed {seed}, budget {budget}: loss {seen.loss:.4f}, right {np.mean(seen.right):.2f}", budget, fresh=fresh)
    return found


class Sampled(NamedTuple):
    """One network at one size."""

    network: str
    clip: ClipShape
    tokens: int
    flops: float  # a clip
    judged: Judged
    drawn: float  # share of clips drawn of the same prompts that the judge finds right


def resolutions(cfg: Config, out: Path, networks: dict[str, tuple[Path, Path]]) -> list[Sampled]:
    """Networks at every side. networks: name -> (weights, folder of what is kept)."""
    prompts, found = asked(cfg.prompts)[0], []
    for side in cfg.sides:
        sampler = cfg.sampler.model_copy(update={"height": side, "width": side})
        rng = np.random.default_rng(PROMPT_SEED)
        clips = torch.stack([render(sample_scene(prompt, rng, clip=sampler.clip), sampler.clip) for prompt in prompts])  # [N,T,3,H,W]
        drawn = float(np.mean([one.all_right for one in judge(clips, prompts)]))
        for name, (weights, folder) in networks.items():
            model = load_tiny(weights).to(best_device())
            held_out = held_out_pairs(cfg, model, sampler.clip)
            seen = judged_kept(cfg, folder / f"side-{side}.json", weights, held_out, sampler)
            tokens = held_out.num_tokens(model.config.patch)[0]
            found.append(Sampled(name, sampler.clip, tokens, flops_per_clip(model, held_out, sampler), seen, drawn))
    return found


# Rows


def training_rows(found: Sequence[Point]) -> list[Row]:
    return [
        {
            "seed": one.seed,
            "budget": one.budget,
            "iterations": one.iterations,
            "train_seconds": one.trained.seconds,
            "tokens": one.trained.tokens,
            "train_flops": one.flops,
            "held_out_loss": one.judged.loss,
            **columns("right", bootstrap_mean(one.judged.right)),
            **{f"loss_{k + 1}": loss for k, loss in enumerate(one.judged.losses)},
        }
        for one in found
    ]


class Means(NamedTuple):
    """Means over seeds, one row a budget (or a size)."""

    compute: list[float]
    losses: list[list[float]]  # [S][K]
    rows: list[Row]


def budget_means(found: Sequence[Point]) -> Means:
    by_budget = {budget: [one for one in found if one.budget == budget] for budget in sorted({one.budget for one in found})}
    rows = []
    for budget, ones in by_budget.items():
        right = bootstrap_crossed([one.judged.right for one in ones])
        losses = [one.judged.loss for one in ones]
        rows.append(
            {
                "budget": budget,
                "iterations": ones[0].iterations,
                "seeds": len(ones),
                "train_flops": float(np.mean([one.flops for one in ones])),
                "train_seconds": float(np.mean([one.trained.seconds for one in ones])),
                **columns("held_out_loss", (float(np.mean(losses)), min(losses), max(losses))),
                **columns("right", right),
            }
        )
    table = [[one.judged.loss for one in ones] for ones in by_budget.values()]  # [K][S]
    return Means([row["train_flops"] for row in rows], [list(column) for column in zip(*table, strict=True)], rows)


def resolution_rows(found: Sequence[Sampled]) -> list[Row]:
    return [
        {
            "network": one.network,
            "clip": str(one.clip),
            "tokens_per_clip": one.tokens,
            "flops_per_clip": one.flops,
            "held_out_loss": one.judged.loss,
            **columns("right", bootstrap_mean(one.judged.right)),
            "right_of_drawn_clips": one.drawn,
        }
        for one in found
    ]


def law_row(law: PowerLaw, against: str) -> Row:
    parts = {"irreducible_loss": law.floor, "scale": law.scale, "exponent": law.exponent}
    return {
        "against": against,
        "smallest": law.smallest,
        "irreducible_determined": law.determined,
        **{name if part == "mean" else f"{name}_{part}": value for name, each in parts.items() for part, value in each.as_json().items()},
    }


def falls(losses: Sequence[Sequence[float]]) -> bool:
    """Whether the mean over seeds [S][K] falls from each to the next."""
    return bool((np.diff(np.mean(losses, axis=0)) < 0).all())


# Drawing


def curve(law: PowerLaw, low: float, high: float) -> Series:
    x = np.geomspace(low, high, 24)
    return Series("fit", "fit", tuple(x.tolist()), tuple(law(x).tolist()))


def panel(title: str, points: dict[str, list[tuple[float, float]]], *, x_label: str, percent: bool = False, law: PowerLaw | None = None) -> tuple[str, str, str]:
    """One panel of the chart. points: label of a seed or of another network -> (x, y) each."""
    series = [Series(label, "seed" if label.startswith("seed ") else "other", tuple(x for x, _ in row), tuple(y for _, y in row)) for label, row in points.items()]
    xs = [x for row in points.values() for x, _ in row]
    said, floor = [f"orange: {one.label}" for one in series if one.look == "other"], None
    if law is not None:
        series.append(curve(law, min(xs), max(xs)))
        floor = law.floor.mean if law.determined else None
        said += [f"exponent {law.exponent.mean:.2g}", "dashed: irreducible loss" if law.determined else "no sure irreducible loss"]
    return title, "; ".join(said) or "a dot a network", line_chart(series, name=title, x_label=x_label, percent=percent, limit=floor, logarithmic=True)


def chart(found: Sequence[Point], law: PowerLaw, sampled: Sequence[Sampled], sampled_law: PowerLaw | None) -> str:
    """Loss and judge against training FLOPs, and against tokens a clip."""

    def rows(kind: str) -> dict[str, list[tuple[float, float]]]:
        return {f"seed {seed}": [(one.flops, one.judged.loss if kind == "loss" else float(np.mean(one.judged.right))) for one in found if one.seed == seed] for seed in seeds}

    def sizes(kind: str) -> dict[str, list[tuple[float, float]]]:
        return {
            name: [(one.tokens, one.judged.loss if kind == "loss" else float(np.mean(one.judged.right))) for one in sampled if one.network == name]
            for name in dict.fromkeys(one.network for one in sampled)
        }

    seeds = dict.fromkeys(one.seed for one in found)
    panels = [
        panel("Held-out loss", rows("loss"), x_label="training FLOPs", law=law),
        panel("Held-out loss by sampling size", sizes("loss"), x_label="tokens a clip", law=sampled_law),
        panel("Prompts the judge finds right", rows("right"), x_label="training FLOPs", percent=True),
        panel("Prompts right by sampling size", sizes("right"), x_label="tokens a clip", percent=True),
    ]
    return page(panels, COLOURS, more=MORE)


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: enough to see that everything runs, too little to learn anything from the numbers."""
    fit = cfg.fit.model_copy(update={"iterations": min(2, cfg.fit.iterations), "held_out": min(8, cfg.fit.held_out)})
    return cfg.model_copy(update={"seeds": cfg.seeds[:1], "budgets": (1, 2, 3), "clips": min(48, cfg.clips), "prompts": min(6, cfg.prompts), "sides": cfg.sides[:2], "fit": fit})


def measure(cfg: Config, out: Path) -> tuple[dict[str, list[Row]], list[str], str]:
    """The rows of each part, what is to be said of them, and the chart."""
    asked(cfg.prompts)  # too many are known before the work
    found = points(cfg, out)
    longest = {one.seed: one for one in found}  # budgets increase
    networks = {f"seed {seed}": (one.trained.weights, one.trained.weights.parent) for seed, one in longest.items()}
    if cfg.model is not None:
        networks[cfg.model.stem] = cfg.model, out / f"model-{network_lineage(cfg.model)[:12]}"
    sampled = resolutions(cfg, out, networks)
    means = budget_means(found)
    law = fit_power_law(means.compute, means.losses)
    narrow = "Intervals are bootstraps over residuals, rather too narrow, and know nothing of another form of the curve."
    remarks = [f"Against training compute: {law.verdict}. {narrow}"]
    ours = [f"seed {seed}" for seed in longest]
    by_size = [[one.judged.loss for one in sampled if one.network == name] for name in ours]  # [S][K]
    sampled_law = None
    if len(cfg.sides) >= 3 and falls(by_size):
        sampled_law = fit_power_law([one.tokens for one in sampled if one.network == ours[0]], by_size)
        remarks.append(f"Against tokens a clip: {sampled_law.verdict}.")
    else:
        why = "there are fewer than three sizes" if len(cfg.sides) < 3 else "the loss does not fall from each size to the next"
        remarks.append(f"Against tokens a clip: no power law is fitted, since {why}.")
    parts = {
        "budgets": means.rows,
        "fit": [law_row(law, "training FLOPs"), *([law_row(sampled_law, "tokens a clip")] if sampled_law else [])],
        "trainings": training_rows(found),
        "sampling size": resolution_rows(sampled),
    }
    return parts, remarks, chart(found, law, sampled, sampled_law)


def sections(parts: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The tables of the file: what each training lost at each quantile stands apart."""

    def without(rows: Sequence[Row], quantiles: bool) -> list[Row]:
        return [{key: value for key, value in row.items() if key in ("seed", "budget") or key.startswith("loss_") is quantiles} for row in rows]

    return {
        "Training compute": parts["budgets"],
        "Fit": parts["fit"],
        "Sampling size": parts["sampling size"],
        "Trainings": without(parts["trainings"], False),
        "Held-out loss at noise quantiles, least noise first": without(parts["trainings"], True),
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    with place(cfg, cfg.out) as out:
        parts, remarks, drawn = measure(shrunk(cfg) if cfg.quick else cfg, out)
    if cfg.write:
        write(cfg, "scaling", here("scaling", cfg), "Quality against compute", sections(parts), remarks=["![Loss and judge](scaling.svg)", *remarks])
        write_atomic(cfg.results / "scaling.svg", drawn.encode())
        print(f"wrote {cfg.results / 'scaling.svg'}", file=sys.stderr)
    return {"rows": flat(parts)}
