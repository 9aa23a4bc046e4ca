"""Reward against forward passes: what the families of RL reach on the same start, reward and prompts, and what every step of the way cost.

Everything begins as `rushes demo` does (or `--model`, `--reward` and `--guard` name finished ones). Each algorithm then climbs the same reward model without limit and without
guards, with the settings of its paper as far as the recipes have them, from as many forward-equivalents as its budget. Its learning rate is the one of three whose policy the
guard, other people's reward model, likes best on a seed of its own. The judge of the built-in world reads held-out clips when a run is over; no run and no choice sees it.

A forward-equivalent is one clip through the network once; a backward pass counts two. Hooks count what training does; looks at held-out clips are left out (`Run.looking`).

Letters: S seeds, N held-out prompts, L looks.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import isotonic_regression

from align.config import Count, Positive, Share, dump
from align.kernels import Ancestral
from align.run import Run, derived_seed, read_metrics
from align.trajectory import path_kl, rollout
from base_model.checkpoint import load_weights
from base_model.lora import merge
from base_model.tiny import LatentVideoModel, load_tiny, save_network
from base_model.types import TrainableModel
from base_model.video.files import write_atomic
from recipes import ddpo, feedback, grpo, nft
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._start import Begin, Start, evaluation_prompts, the_start
from recipes.bench._trained import Pace, Seeds, check_same, kept
from recipes.bench.selection import needed
from recipes.charts import Series, Whisker, interval_chart, line_chart, page
from recipes.evaluate import clip_seeds
from recipes.feedback import Assessor, HeldOut, Look
from recipes.generate import Sampler, best_device, network_lineage, safety_runner, sample, seeded_noise, times_of
from recipes.guards import Guards
from recipes.scorers import load_scorer
from recipes.shapes.measure import diversities, flash_counts, means, measure, shares
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.statistics import Interval, bootstrap_crossed
from recipes.weights import file_hash

Array = NDArray[np.float64]
Name = Literal["default", "nft-few", "flow-grpo", "ddpo", "dancegrpo", "mixgrpo", "flash-grpo", "nft"]
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""
EVALUATION_SEED, HELD_OUT_SEED, TUNING_SEED = 700_000, 710_000, 100
KL_STEPS, KL_CLIPS = 12, 32
MOST_LOOKS = 12
"""Looks at held-out clips on the way of a run, about."""


class Algorithm(NamedTuple):
    """A recipe with settings."""

    recipe: ModuleType
    policy: Mapping[str, Any]
    steps: int  # K
    guided: bool
    budget: int  # forward-equivalents
    per_clip: float  # forward-equivalents, in the mean over rollouts
    source: str


ALL = {"window": "all", "kernel": "flow", "noise_level": 0.7, "step_weight": "none"}
ALGORITHMS: Mapping[Name, Algorithm] = {
    "default": Algorithm(
        grpo,
        {"same_noise": True, "first_steps": 3, "kl_coef": 0.1},
        4,
        True,
        39_000,
        2 * (2 + 2 / 8 + 3 / 8 + 1 / 8),
        "`rushes grpo` with 4 guided steps, whose groups share their way to one noisy step, near the start by a KL",
    ),
    "nft-few": Algorithm(nft, {"updates": 1}, 4, False, 39_000, 4 + 3 + 2 / 8, "`rushes nft` with 4 steps and one update a rollout"),
    "flow-grpo": Algorithm(grpo, {**ALL, "kl_coef": 0.004, "divide_by": "global_std"}, 20, True, 400_000, 40 + 19 * (6 + 2), "arXiv 2505.05470, its script for Wan"),
    "ddpo": Algorithm(ddpo, {"window": 0, "same_noise": False, "step_weight": "none"}, 50, True, 400_000, 100 + 49 * 6 + 2 / 8, "arXiv 2305.13301, all steps, importance-sampled"),
    "dancegrpo": Algorithm(
        grpo,
        {"window": "random", "width": 9, "first_steps": 15, "kernel": "dance", "noise_level": 0.3, "step_weight": "none", "kl_coef": 0.0},
        16,
        False,
        100_000,
        16 + 9 * (3 + 1 / 8),
        "arXiv 2505.07818, 9 of 16 steps",
    ),
    "mixgrpo": Algorithm(
        grpo,
        {"window": "sliding", "width": 4, "first_steps": 24, "kernel": "flow", "noise_level": 0.7, "step_weight": "none", "kl_coef": 0.0},
        25,
        False,
        100_000,
        25 + 4 * (3 + 1 / 8),
        "arXiv 2507.21802, a window of 4 of 25 steps",
    ),
    "flash-grpo": Algorithm(grpo, {"first_steps": 19, "noise_level": 0.7, "kl_coef": 0.0}, 20, True, 100_000, 40 + 2 * (3 + 1 / 8), "arXiv 2605.15980, one step of 20"),
    "nft": Algorithm(
        nft,
        {"method": "adaptive", "updates": 9, "old_rate": 1e-3, "kl_coef": 1e-4},
        10,
        False,
        100_000,
        10 + 9 * (1 + 1 + 3) + 2 / 8,
        "arXiv 2509.16117, 10 steps, 9 noise levels",
    ),
}


class Config(Bench):
    out: Path = Path("runs/bench-update")
    """Folder of everything that is trained; what is finished there is not repeated, and two processes may share it, each with its own `algorithms`. `quick` keeps nothing."""
    algorithms: Annotated[tuple[Name, ...], Field(min_length=1)] = tuple(ALGORITHMS)
    """What is compared. `quick` takes the first two."""
    model: Path | None = None
    """Network to start from, together with `reward` and `guard`; none of them: as the demo begins."""
    reward: Path | None = None
    """Folder of a reward model."""
    guard: Path | None = None
    """Folder of another, which chooses learning rates and is never optimised."""
    begin: Begin = Begin(prompts=2_560)
    """How the demo begins."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of prompts, noise and adapter. `quick` takes the first."""
    rates: Annotated[tuple[Positive, ...], Field(min_length=1)] = (3e-4, 1e-3, 3e-3)
    """Learning rates to choose from, on another seed. `quick` takes the first."""
    tuning: Share = 0.25
    """Share of its budget that an algorithm has for each of them, at least the smallest budget."""
    budget: Positive = 1.0
    """Factor on every budget."""
    prompts_a_rollout: Count = 6
    """Prompts of a rollout, of every algorithm."""
    group_size: Count = 8
    """Clips of each."""
    guidance: Positive = 1.1
    """Scale of guidance, where a paper guides. From 1.3 on it gives more than any RL here, and what the reward still wants is no longer what the judge wants."""
    strobe: Share = 0.2
    """Share of training prompts, and as many further held-out ones, that ask for strobing."""
    held_out_prompts: Count = 96
    """Prompts looked at on the way, one clip each. `quick` takes at most 4."""
    prompts: Count = 80
    """Held-out prompts of one object that every finished policy is judged on. `quick` takes at most 4."""
    clips: Count = 4
    """Clips of each. `quick` takes at most 2."""
    sampler: Sampler = Sampler()
    """Size of the clips; each algorithm has its own steps and guidance."""


# One run


def settings_of(cfg: Config, name: Name, lr: float, budget: float) -> tuple[Any, Sampler]:
    """Policy and sampler of an algorithm that spends so many forward-equivalents."""
    algorithm, clips = ALGORITHMS[name], cfg.prompts_a_rollout * cfg.group_size
    rollouts = max(1, round(budget / (clips * algorithm.per_clip)))
    looks = max(1, math.ceil(max(common_budget(cfg) / 3, budget / MOST_LOOKS) / (clips * algorithm.per_clip)))
    shared = {"prompts": cfg.prompts_a_rollout, "group_size": cfg.group_size, "micro_batch": clips, "lr": lr}
    policy = algorithm.recipe.Policy(**shared, **algorithm.policy, iterations=rollouts, evaluate_every=looks, save_every=max(1, rollouts // 8))
    return policy, cfg.sampler.model_copy(update={"steps": algorithm.steps, "guidance": cfg.guidance if algorithm.guided else 1.0})


def common_budget(cfg: Config) -> float:
    """The smallest budget, whichever are compared: up to there every curve goes."""
    return cfg.budget * min(algorithm.budget for algorithm in ALGORITHMS.values())


def looked_with(cfg: Config, name: Name) -> Sampler:
    """With how few steps a policy trains is its own affair: all are looked at with as many, and guided if that is how they train."""
    return cfg.sampler.model_copy(update={"guidance": cfg.guidance if ALGORITHMS[name].guided else 1.0})


@dataclass
class Spent:
    """CPU seconds of a training that may have been killed and resumed."""

    before: float = 0.0
    begun: float = field(default_factory=time.process_time)
    looks: float = 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.process_time() - self.begun - self.looks

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, float], /) -> None:
        self.before, self.begun, self.looks = state["seconds"], time.process_time(), 0.0


@dataclass
class Clocked(HeldOut):
    """Held-out looks whose time is not the training's."""

    spent: Spent

    def watch(self, model: TrainableModel, assess: Assessor, iteration: int) -> Look:
        begun = time.process_time()
        seen = super().watch(model, assess, iteration)
        self.spent.looks += time.process_time() - begun
        return seen


def climb(cfg: Config, start: Start, name: Name, lr: float, seed: int, budget: float, folder: Path) -> dict[str, Any]:
    """Trains in `folder`: what every look said and had cost, and the whole."""
    algorithm = ALGORITHMS[name]
    policy, sampler = settings_of(cfg, name, lr, budget)
    out = folder / "run"
    off = Guards(watch=False)
    settings = algorithm.recipe.Config(
        out=out, seed=seed, model=start.model, reward=start.reward, constrained=False, two_objects=0, strobe=cfg.strobe, guards=off, policy=policy, sampler=sampler
    )
    check_same(out, settings, seed)
    run = Run(out, settings, seed=seed, resume=(out / "run.json").exists(), metrics=algorithm.recipe.METRICS)
    model = load_tiny(start.model).to(run.device)
    model.network.requires_grad_(False)
    assess = Assessor(feedback.load_reward(start.reward, model, settings.pessimism, sampler.fps), safety_runner(), sampler.fps)
    asked = make_prompts(cfg.held_out_prompts, seed=HELD_OUT_SEED, split="eval")
    texts, spent = [prompt.text for prompt in asked], Spent()
    guard = feedback.standardised(load_scorer(start.guard, fps=sampler.fps, encode=model.text))
    held_out = Clocked(texts, model.encode_text(texts), looked_with(cfg, name), guard, HELD_OUT_SEED, folder / "held_out", spent)
    feedback.encode_all(model.text, feedback.training_prompts(settings)[1], texts)
    run.register("spent", spent)
    watch = algorithm.recipe.train(settings, run, model, assess, held_out)
    seconds = spent.seconds
    feedback.last_look(run, held_out, model, assess, watch)
    model.network = merge(model.network)
    save_network(folder / "network.safetensors", model)
    rows = read_metrics(out)
    clips = policy.iterations * cfg.prompts_a_rollout * cfg.group_size
    spent_on = {"forwards": rows[-1]["forward_equivalents"], "clips": clips, "seconds": seconds}
    return {"looks": looks_of(rows, folder / "held_out", asked), **spent_on, "network": network_lineage(folder / "network.safetensors")}


def looks_of(rows: Sequence[Mapping[str, Any]], folder: Path, prompts: Sequence[ShapesPrompt]) -> list[dict[str, float]]:
    """Every look: forward-equivalents gone before it, what reward and guard said, and the judge's share now."""
    after = {int(row["iteration"]) + 1: row["forward_equivalents"] for row in rows if "reward" in row}
    found = []
    for row in (row for row in rows if "held_out_reward" in row):
        iteration = int(row["iteration"])
        video = load_weights(folder / f"{iteration:06d}.safetensors")[0]["video"].float() / 255  # [N,T,3,H,W]
        judge = float(np.mean(list(shares(measure(video, prompts, 1)).values())))
        found.append({"forwards": after.get(iteration, 0), "reward": row["held_out_reward"], "guard": row["held_out_guard"], "judge": judge})
    return found


@torch.no_grad()
def judged(cfg: Config, start: Path, network: Path, sampler: Sampler) -> dict[str, Any]:
    """What judge and filters' hazard say of a network's clips, how different they are, and how far its paths are from those of the start."""
    prompts = evaluation_prompts(cfg.prompts, cfg.strobe, EVALUATION_SEED)
    policy, prior = (load_tiny(file).to(best_device()) for file in (network, start))
    cond = policy.encode_text([prompt.text for prompt in prompts])
    each = torch.arange(len(prompts)).repeat_interleave(cfg.clips)
    clips = torch.cat(list(sample(policy, cond[each], clip_seeds(EVALUATION_SEED, len(each)), sampler))).cpu()  # [N G,T,3,H,W]
    measured = measure(clips, prompts, cfg.clips, fps=sampler.fps)
    flashing, number = flash_counts(measured)
    apart = means(diversities({"policy": measured}))["policy"]["mean"]
    return {"judge": dict(shares(measured)), "flashing": flashing / number, "diversity": apart, "kl": kl_of(policy, prior, cond[:KL_CLIPS], sampler)}


def kl_of(policy: LatentVideoModel, prior: LatentVideoModel, cond: Any, sampler: Sampler) -> float:
    """Mean KL of the policy's ancestral paths from the prior's, both under the sampler's guidance, nats a clip."""
    guided, reference = (feedback.guided(model, sampler) for model in (policy, prior))
    noise = seeded_noise(policy, sampler.clip, clip_seeds(EVALUATION_SEED, len(cond)))  # [B,C,F,H,W]
    times = times_of(policy, sampler.model_copy(update={"steps": KL_STEPS}))  # [K+1]
    taken = rollout(guided, Ancestral(), noise, times, cond, noise=torch.Generator().manual_seed(derived_seed(EVALUATION_SEED, "path noise", 0)))
    return float(path_kl(guided, reference, Ancestral(), taken).mean())


# All of them


class Climbed(NamedTuple):
    """What became of one run."""

    looks: list[dict[str, float]]
    forwards: float
    clips: int
    seconds: float
    network: str  # lineage of what it left


def origin(cfg: Config, start: Start) -> dict[str, Any]:
    """What every run depends on."""
    hashes = {"start": network_lineage(start.model), "reward": file_hash(start.reward / "reward_card.json"), "guard": file_hash(start.guard / "reward_card.json")}
    return {"version": VERSION, **hashes, "strobe": cfg.strobe, "sampler": dump(cfg.sampler)}


def kept_climb(cfg: Config, out: Path, start: Start, name: Name, lr: float, seed: int, budget: float) -> Climbed:
    """Gone through once for its settings; of the run itself only the network stays, and where it was judged nobody needs that either."""
    folder = out / "rl" / name / f"{lr:g}-{seed}"
    policy, sampler = settings_of(cfg, name, lr, budget)
    settings = {**origin(cfg, start), "policy": dump(policy), "own": dump(sampler), "seed": seed, "held_out": cfg.held_out_prompts}
    found = kept(folder / "climbed.json", json.loads(json.dumps(settings)), partial(climb, cfg, start, name, lr, seed, budget, folder))
    for part in ("run", "held_out"):
        shutil.rmtree(folder / part, ignore_errors=True)
    return Climbed(**found)


def kept_judged(cfg: Config, out: Path, start: Start, name: Name, network: Path, lineage: str, label: str) -> dict[str, Any]:
    own = looked_with(cfg, name)
    settings = {**origin(cfg, start), "network": lineage, "own": dump(own), "prompts": cfg.prompts, "clips": cfg.clips}
    return kept(out / "judged" / f"{label}.json", settings, partial(judged, cfg, start.model, network, own))


class Finished(NamedTuple):
    """An algorithm with the rate that was chosen for it."""

    rate: float
    tuned: Mapping[float, Climbed]
    runs: Sequence[Climbed]  # S
    start: Mapping[str, Any]  # what the judge says of the start under its sampler
    ends: Sequence[Mapping[str, Any]]  # S


def tuning_budget(cfg: Config, name: Name) -> float:
    return max(cfg.budget * ALGORITHMS[name].budget * cfg.tuning, common_budget(cfg))


def best_rate(tuned: Mapping[float, Climbed]) -> float:
    """The learning rate whose last policy the guard likes best."""
    return max(tuned, key=lambda lr: tuned[lr].looks[-1]["guard"])


def compare(cfg: Config, out: Path, start: Start) -> dict[Name, Finished]:
    """Every run of every algorithm."""
    found: dict[Name, Finished] = {}
    whole = {name: cfg.budget * ALGORITHMS[name].budget for name in cfg.algorithms}
    pace = Pace("update, forward-equivalents", round(sum(len(cfg.seeds) * each + len(cfg.rates) * tuning_budget(cfg, name) for name, each in whole.items())))

    def climbed(name: Name, lr: float, seed: int, budget: float) -> Climbed:
        fresh = not (out / "rl" / name / f"{lr:g}-{seed}" / "climbed.json").exists()
        one = kept_climb(cfg, out, start, name, lr, seed, budget)
        pace.advance(f"{name}, {lr:g}, seed {seed}", round(budget), fresh=fresh)
        return one

    for name in cfg.algorithms:
        tuned = {lr: climbed(name, lr, TUNING_SEED, tuning_budget(cfg, name)) for lr in cfg.rates}
        rate = best_rate(tuned)
        runs = [climbed(name, rate, seed, whole[name]) for seed in cfg.seeds]
        labels = [f"{rate:g}-{seed}" for seed in cfg.seeds]
        ends = [
            kept_judged(cfg, out, start, name, out / "rl" / name / label / "network.safetensors", run.network, f"{name}-{label}")
            for label, run in zip(labels, runs, strict=True)
        ]
        found[name] = Finished(rate, tuned, runs, kept_judged(cfg, out, start, name, start.model, network_lineage(start.model), f"start-{name}"), ends)
    return found


# Rows


def curve(one: Climbed) -> tuple[Array, Array]:
    """Forward-equivalents [L] and the judge's share [L]."""
    return np.array([look["forwards"] for look in one.looks], dtype=np.float64), np.array([look["judge"] for look in one.looks])


def area(one: Climbed, budget: float) -> float:
    """Mean of the judge's share over the first `budget` forward-equivalents, straight lines between looks."""
    forwards, judge = curve(one)
    inside = forwards < budget
    x, y = np.append(forwards[inside], budget), np.append(judge[inside], np.interp(budget, forwards, judge))
    return float(np.trapezoid(y, x) / budget)


def mean_judge(row: Mapping[str, Any]) -> float:
    return float(np.mean(list(row["judge"].values())))


def run_rows(cfg: Config, found: Mapping[Name, Finished]) -> list[Row]:
    """One row a run."""
    return [
        {
            "algorithm": name,
            "config": f"{ALGORITHMS[name].steps} steps{', guided' if ALGORITHMS[name].guided else ''}, lr {one.rate:g}",
            "seed": seed,
            "forwards_per_clip": run.forwards / run.clips,
            "forwards_total": run.forwards,
            "seconds": run.seconds,
            "judge_start": mean_judge(one.start),
            "judge_end": mean_judge(end),
            "judge_auc": area(run, common_budget(cfg)),
            "kl_total": end["kl"],
            "diversity": end["diversity"],
            "violation_rate": end["flashing"],
        }
        for name, one in found.items()
        for seed, run, end in zip(cfg.seeds, one.runs, one.ends, strict=True)
    ]


def ends_of(one: Finished) -> Array:
    """The judge's share at the end, [S,N]."""
    return np.array([[row["judge"][prompt] for prompt in one.start["judge"]] for row in one.ends])


def forwards_of(one: Finished) -> float:
    """Forward-equivalents of a run, mean over the seeds."""
    return float(np.mean([run.forwards for run in one.runs]))


def gains(one: Finished) -> tuple[Interval, Interval]:
    """The judge's share at the end, and its gain, over seeds and prompts."""
    end = ends_of(one)
    return bootstrap_crossed(end), bootstrap_crossed(end - np.array(list(one.start["judge"].values())))


def algorithm_rows(cfg: Config, found: Mapping[Name, Finished]) -> list[Row]:
    """One row an algorithm: means over seeds, with intervals over seeds and prompts."""
    rows: list[Row] = []
    for name, one in found.items():
        end, gain = gains(one)
        per_clip = float(np.mean([run.forwards / run.clips for run in one.runs]))
        row: Row = {"algorithm": name, "what": ALGORITHMS[name].source, "forwards_per_clip": per_clip, "forwards": forwards_of(one)}
        rows.append(row | columns("end", end) | columns("gain", gain) | {"reached": forwards_to(one, target(found)) if "flow-grpo" in found else None})
    return rows


def target(found: Mapping[Name, Finished]) -> float:
    """Where Flow-GRPO ends, as its looks saw it: the last value of its mean curve, made monotone (isotonic regression)."""
    return float(isotonic_regression(mean_curve(found["flow-grpo"])[1]).x[-1])


def mean_curve(one: Finished) -> tuple[Array, Array]:
    """Over the seeds: forward-equivalents [L] and the judge's share [L]."""
    forwards, judge = zip(*(curve(run) for run in one.runs), strict=True)
    return np.mean(forwards, axis=0), np.mean(judge, axis=0)


def forwards_to(one: Finished, share: float) -> float | None:
    """Forward-equivalents to the share; None where the mean curve never gets there."""
    found = needed(*mean_curve(one), share - 1e-9)
    return found if math.isfinite(found) else None


def tuning_rows(found: Mapping[Name, Finished]) -> list[Row]:
    """Every tuning run."""
    return [
        {"algorithm": name, "lr": lr, "forwards": run.forwards, **{key: run.looks[-1][key] for key in ("guard", "reward", "judge")}, "chosen": lr == one.rate}
        for name, one in found.items()
        for lr, run in one.tuned.items()
    ]


def curve_rows(found: Mapping[Name, Finished]) -> list[Row]:
    """The mean curves."""
    return [{"algorithm": name, "forwards": float(x), "judge": float(y)} for name, one in found.items() for x, y in zip(*mean_curve(one), strict=True)]


def claim_rows(found: Mapping[Name, Finished]) -> list[Row]:
    """What was asked before anything was measured, and whether it holds."""
    rows: list[Row] = []
    for name in (name for name in ("default", "nft-few") if name in found):
        one = found[name]
        cost = max(run.forwards / run.clips for run in one.runs)
        rows.append({"algorithm": name, "asked": "at most 7.5 forward-equivalents a clip", "found": f"{cost:.2f}", "holds": cost <= 7.5})
        if "flow-grpo" not in found:
            continue
        ahead, part = bootstrap_crossed(ends_of(one) - ends_of(found["flow-grpo"])), forwards_of(one) / forwards_of(found["flow-grpo"])
        said = f"{100 * ahead.mean:+.1f} points [{100 * ahead.low:+.1f}, {100 * ahead.high:+.1f}], in {part:.3f}"
        asked = "the judge's share at the end no lower than flow-grpo's, in a tenth of its forward-equivalents"
        rows.append({"algorithm": name, "asked": asked, "found": said, "holds": ahead.mean >= 0 and part <= 0.1})
    return rows


# The command

COLOURS = dict(zip(get_args(Name), ("#1a1c20", "#c2410c", "#2f6fb3", "#7c3aed", "#1d7a43", "#b7791f", "#be185d", "#0e7490"), strict=True))


def picture(found: Mapping[Name, Finished]) -> str:
    """The judge's share against forward-equivalents, and where it ends, as SVG."""
    lines = [
        Series(name, name, *(tuple(float(value) for value in part) for part in (np.maximum(x, 1_000), y)))
        for name, one in found.items()
        for x, y in [mean_curve(one)]
    ]
    chart = line_chart(lines, name="Held-out clips that are right", x_label="forward-equivalents (the start stands at 1,000)", percent=True, logarithmic=True)
    ends = [Whisker(name, name, end.mean, end.low, end.high) for name, one in found.items() for end in [bootstrap_crossed(ends_of(one))]]
    panels = [("Held-out clips that are right", "by forward-equivalents; colours as at the right", chart)]
    return page([*panels, ("At the end", "95 % intervals over prompts and seeds", interval_chart(ends, name="Held-out clips that are right at the end", percent=True))], COLOURS)


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    most = {"pairs": 24, "iterations": 2, "prompts": 10}
    begin = cfg.begin.model_copy(update={name: min(number, getattr(cfg.begin, name)) for name, number in most.items()})
    fewer = {name: min(most, getattr(cfg, name)) for name, most in (("held_out_prompts", 4), ("prompts", 4), ("clips", 2), ("prompts_a_rollout", 2), ("group_size", 4))}
    less = {"algorithms": cfg.algorithms[:2], "seeds": cfg.seeds[:1], "rates": cfg.rates[:1], "budget": 1e-3 * cfg.budget}
    return cfg.model_copy(update={**fewer, **less, "begin": begin})


def run_all(cfg: Config, out: Path) -> tuple[dict[str, list[Row]], dict[Name, Finished]]:
    """The rows of each part, and what they come from."""
    start = the_start(cfg.begin, out / "start", cfg.model, cfg.reward, cfg.guard, strobe=cfg.strobe, sampler=cfg.sampler)
    found = compare(cfg, out, start)
    parts = {"claims": claim_rows(found), "algorithms": algorithm_rows(cfg, found), "runs": run_rows(cfg, found), "tuning": tuning_rows(found), "curves": curve_rows(found)}
    return parts, found


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    with place(cfg, cfg.out) as out:
        parts, found = run_all(shrunk(cfg) if cfg.quick else cfg, out)
    if cfg.write:
        failed = [f"{row['algorithm']}, {row['asked']} ({row['found']})" for row in parts["claims"] if not row["holds"]]
        remarks = [
            f"Does not hold: {'; '.join(failed)}." if failed else "All that was asked for holds.",
            "![The judge's share against forward-equivalents](update.svg)",
            "What each number is: [how to read](../README.md#how-to-read-reward-against-forward-passes).",
        ]
        write(cfg, "update", here("update", cfg), "Reward against forward passes", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
        write_atomic(cfg.results / "update.svg", picture(found).encode())
    return {"rows": flat(parts)}
