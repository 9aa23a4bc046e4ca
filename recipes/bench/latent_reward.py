"""Does a latent reward agree with the reward on pixels it was distilled from, what does RL save by it, and does the judge see the same?

Everything begins as `rushes demo` does: SFT, takes, rankings by simulated people, a reward model and a guard (or `--model`, `--reward` and `--guard` name finished ones). Then
`rushes latent-reward` distils the reward model. NFT climbs either reward from the same network with the same seeds and settings, without the limit, where a latent reward decodes
nothing, and under it, where the filters see every clip whatever the reward reads. The clock runs apart from these runs: updates of all arms take turns in one process.

Letters: S seeds, N held-out prompts, G clips a prompt.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Several, Share, dump
from align.progress import Progress
from base_model.checkpoint import read_json
from base_model.tiny import LatentVideoModel, load_tiny
from recipes import latent_reward, nft
from recipes.bench._clock import PHASES, Laps, NoLook, TimedAssessor, TimedModel, TimedRun
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, in_brackets, paired_ratio, place, spread, write
from recipes.bench._start import Begin, evaluation_prompts, the_start
from recipes.bench._trained import Pace, Seeds, check_same, kept
from recipes.bench.selection import needed
from recipes.evaluate import clip_seeds, read_run
from recipes.feedback import load_reward
from recipes.generate import Sampler, network_lineage, safety_runner, sample_with_latents
from recipes.guards import Guards
from recipes.latent_reward import inside, spearman
from recipes.shapes.measure import flash_counts, measure, shares
from recipes.statistics import Interval, bootstrap_crossed, bootstrap_mean, clopper_pearson
from recipes.weights import file_hash
from reward.latent import load_latent_reward
from reward.model import load_reward_model

Array = NDArray[np.float64]
EVALUATION_SEED = 700_000
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""


class Distil(BaseConfig):
    """`rushes latent-reward`."""

    prompts: Count = 2_000
    """Prompts whose clips it learns from, beside the ranked ones."""
    takes: Several = 8
    """Clips of each."""
    held_out: Several = 240
    """Held-out prompts, half of them for the agreement."""
    reader: latent_reward.Reader = latent_reward.Reader()
    """The head."""
    fit: latent_reward.Fit = latent_reward.Fit()
    """How it learns."""


class Config(Bench):
    out: Path = Path("runs/bench-latent-reward")
    """Folder of everything that is trained; what is finished there is not repeated. `quick` keeps nothing."""
    model: Path | None = None
    """Network to start from, together with `reward` and `guard`; none of them: as the demo begins."""
    reward: Path | None = None
    """Folder of a reward model."""
    guard: Path | None = None
    """Folder of another, which scores what came out and is never optimised."""
    begin: Begin = Begin()
    """How the demo begins."""
    distil: Distil = Distil()
    """How the latent reward is made."""
    policy: nft.Policy = nft.Policy(iterations=16, evaluate_every=4, save_every=8)
    """How NFT climbs."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of RL: prompts, noise, adapter."""
    held_out_prompts: Count = 96
    """Prompts looked at on the way, one clip each."""
    prompts: Count = 80
    """Held-out prompts of one object that every finished policy is judged on."""
    clips: Count = 4
    """Clips of each."""
    strobe: Share = 0.2
    """Share of training prompts, and as many further held-out ones, that ask for strobing."""
    rounds: Count = 4
    """Rounds of the clock over the arms."""
    updates: Count = 2
    """Measured updates of each arm a round."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""


class Arm(NamedTuple):
    """What an RL run optimises, and whether the limit holds."""

    reward: str  # "pixel" or "latent"
    constrained: bool

    @property
    def name(self) -> str:
        return f"{self.reward}-{'limit' if self.constrained else 'free'}"


ARMS = tuple(Arm(reward, constrained) for constrained in (False, True) for reward in ("pixel", "latent"))


class Made(NamedTuple):
    """Where RL starts: the network, the rewards, and what the demo's stages left, if they were gone through."""

    model: Path
    rewards: Mapping[str, Path]  # "pixel", "latent"
    guard: Path
    card: Mapping[str, Any]  # of the latent reward


# What there is before RL


def prepare(cfg: Config, out: Path) -> Made:
    """Trains what is missing in `out`. Raises UserError where only some of model, reward and guard are given."""
    start = the_start(cfg.begin, out / "start", cfg.model, cfg.reward, cfg.guard, strobe=cfg.strobe, sampler=cfg.sampler)
    folder = out / "latent"
    common = {"model": start.model, "reward": start.reward, "clips": start.candidates, "strobe": cfg.strobe, "sampler": cfg.sampler}
    distil = latent_reward.Config(out=folder, **common, **{key: getattr(cfg.distil, key) for key in Distil.model_fields})
    check_same(folder, distil, distil.seed)
    if not (folder / "reward_card.json").exists():
        latent_reward.main(distil, resume=(folder / "run.json").exists())
    return Made(start.model, {"pixel": start.reward, "latent": folder}, start.guard, read_json(folder / "reward_card.json", "the card of the latent reward"))


# RL


def climb(cfg: Config, out: Path, made: Made, arm: Arm, seed: int) -> Path:
    """The finished run of one arm and seed."""
    folder = out / "rl" / f"{arm.name}-{seed}"
    settings = nft.Config(
        out=folder,
        seed=seed,
        model=made.model,
        reward=made.rewards[arm.reward],
        constrained=arm.constrained,
        strobe=cfg.strobe,
        held_out_prompts=cfg.held_out_prompts,
        guards=Guards(watch=False),  # every run is as long as the others
        policy=cfg.policy,
        sampler=cfg.sampler,
    )
    check_same(folder, settings, seed)
    if not (folder / "network.json").exists():
        nft.main(settings, resume=(folder / "run.json").exists())
    return folder


@torch.no_grad()
def judge_policy(cfg: Config, made: Made, network: Path) -> dict[str, Any]:
    """What judge, filters' hazard, both rewards and the guard say of a network's clips."""
    prompts, base, policy = evaluation_prompts(cfg.prompts, cfg.strobe, EVALUATION_SEED), load_tiny(made.model), load_tiny(network)
    texts = [prompt.text for prompt in prompts for _ in range(cfg.clips)]
    latent = load_latent_reward(made.rewards["latent"], base)
    scorers = {name: load_reward_model(folder, base.text) for name, folder in (("pixel", made.rewards["pixel"]), ("guard", made.guard))}
    cond = policy.encode_text([prompt.text for prompt in prompts]).repeat(cfg.clips)
    found: dict[str, list[Tensor]] = {"pixel": [], "guard": [], "latent": []}
    clips: list[Tensor] = []
    for x0, video in sample_with_latents(policy, cond, clip_seeds(EVALUATION_SEED, len(texts)), cfg.sampler):
        rows = slice(at := sum(map(len, clips)), at + len(video))
        found["latent"].append(latent(x0, torch.zeros(len(x0)), cond[rows]).mean[:, 0])
        for name, scorer in scorers.items():
            found[name].append(scorer(video, texts[rows]).mean[:, 0])
        clips.append(video)
    measured = measure(torch.cat(clips), prompts, cfg.clips, fps=cfg.sampler.fps)
    flashing, number = flash_counts(measured)
    return {"judge": dict(shares(measured)), "flashing": flashing, "clips": number, **{name: torch.cat(parts).tolist() for name, parts in found.items()}}


def judged(cfg: Config, out: Path, made: Made, name: str, network: Path) -> dict[str, Any]:
    """The same, kept for its settings."""
    hashes = {"network": network_lineage(network), **{name: file_hash(folder / "reward_card.json") for name, folder in (*made.rewards.items(), ("guard", made.guard))}}
    settings = {"version": VERSION, **hashes, "prompts": cfg.prompts, "clips": cfg.clips, "strobe": cfg.strobe, "sampler": dump(cfg.sampler)}
    return kept(out / "judged" / f"{name}.json", settings, partial(judge_policy, cfg, made, network))


# The clock


def timed_updates(cfg: Config, made: Made, arm: Arm, out: Path) -> list[dict[str, float]]:
    """The measured updates of one arm, in the empty folder `out`; an unmeasured one goes before."""
    laps = Laps()
    loaded = load_tiny(made.model)
    loaded.network.requires_grad_(False)
    model = TimedModel(**{part.name: getattr(loaded, part.name) for part in fields(LatentVideoModel)}, laps=laps)
    reward = load_reward(made.rewards[arm.reward], model, 0.5, cfg.sampler.fps)
    assess = TimedAssessor(reward, safety_runner(), cfg.sampler.fps, looks=arm.constrained, laps=laps)
    once = {"iterations": 1 + cfg.updates, "save_every": 2 + cfg.updates, "evaluate_every": 2 + cfg.updates}
    policy = cfg.policy.model_copy(update=once)
    settings = nft.Config(out=out, constrained=arm.constrained, strobe=cfg.strobe, guards=Guards(watch=False), policy=policy, sampler=cfg.sampler)
    run = TimedRun(out, settings, laps, nft.METRICS)
    laps.begin()
    nft.train(settings, run, model, assess, NoLook((), model.encode_text(["nothing"]), cfg.sampler, None, 0, out))
    return laps.done[1:]


def clock(cfg: Config, made: Made) -> dict[Arm, list[list[dict[str, float]]]]:
    """Of each arm, the updates of every round; in every other round the arms go the other way round."""
    found: dict[Arm, list[list[dict[str, float]]]] = {arm: [] for arm in ARMS}
    with Progress("clock", total=cfg.rounds * len(ARMS)) as progress:
        for number in range(cfg.rounds):
            for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
                with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
                    found[arm].append(timed_updates(cfg, made, arm, Path(folder) / "run"))
                progress.advance(arm.name)
    return found


# Rows


def second_rows(cfg: Config, made: Made, laps: Mapping[Arm, list[list[dict[str, float]]]]) -> list[Row]:
    """Seconds a clip of each arm, split; over those of the reward on pixels, round by round; and how many clips pay for distilling."""
    clips, rows = cfg.policy.prompts * cfg.policy.group_size, []

    def rounds(arm: Arm, *names: str) -> list[float]:
        return [statistics.median(sum(update.get(name, 0.0) for name in names) for update in one) / clips for one in laps[arm]]

    for arm in ARMS:
        own, pixel = rounds(arm, *PHASES), rounds(Arm("pixel", arm.constrained), *PHASES)
        whole, ratio, cpu = spread(own), paired_ratio(own, pixel), paired_ratio(rounds(arm, "cpu"), rounds(Arm("pixel", arm.constrained), "cpu"))
        saved = statistics.median(pixel) - whole.median
        rows.append(
            {
                "arm": arm.name,
                **columns("seconds_per_clip", whole),
                **{f"{phase}_seconds": statistics.median(rounds(arm, phase)) for phase in PHASES},
                **columns("seconds_over_pixel", ratio),
                "cpu_seconds_over_pixel": cpu.median,
                "clips_that_pay_for_distilling": made.card["seconds"] / saved if arm.reward == "latent" and saved > 0 else None,
            }
        )
    return rows


def agreement_rows(made: Made) -> list[Row]:
    """The card's measurements."""
    rows = []
    for told in made.card["measured"]:
        row: Row = {"t": told["t"]}
        for name in ("spearman", "spearman_within", "kendall", "kendall_within"):
            row |= columns(name, [told[name][end] for end in ("mean", "low", "high")])
        rows.append({**row, "spread": told["spread"], "miss_in_spreads": told["miss_in_spreads"]})
    return rows


def curves(runs: Mapping[Arm, Sequence[Path]]) -> dict[Arm, tuple[Array, Array]]:
    """Of each arm: rollouts gone through at each look [L], and what the judge says then, mean over the held-out prompts of each seed [S,L]."""
    found = {}
    for arm, folders in runs.items():
        looks = [[row["judge"] for row in read_run(folder, arm.name, arm.name).rows if "judge" in row] for folder in folders]
        numbers = [int(file.stem) for file in sorted((folders[0] / "held_out").glob("[0-9]*.safetensors"))]
        found[arm] = np.array(numbers, dtype=np.float64), np.array(looks)
    return found


def learning_rows(cfg: Config, found: Mapping[Arm, tuple[Array, Array]], seconds: Mapping[str, float]) -> list[Row]:
    """One row a look: the judge, after how many clips and seconds."""
    clips = cfg.policy.prompts * cfg.policy.group_size
    return [
        {"arm": arm.name, "rollouts": int(number), "clips": int(number) * clips, "seconds": float(number) * clips * seconds[arm.name], "judge": float(looks[:, k].mean())}
        for arm, (numbers, looks) in found.items()
        for k, number in enumerate(numbers)
    ]


def reach_rows(cfg: Config, found: Mapping[Arm, tuple[Array, Array]], seconds: Mapping[str, float]) -> list[Row]:
    """Clips and seconds to the judge's score that both rewards reach at the end of the mean curve, made monotone (isotonic regression)."""
    clips, rows = cfg.policy.prompts * cfg.policy.group_size, []
    for constrained in (False, True):
        both = {arm: (numbers, looks.mean(0)) for arm, (numbers, looks) in found.items() if arm.constrained == constrained}
        if len(both) < 2:
            continue
        target = min(float(isotonic_regression(mean).x[-1]) for _, mean in both.values())
        for arm, (numbers, mean) in both.items():
            rollouts = needed(numbers, mean, target - 1e-9)
            reached = rollouts if np.isfinite(rollouts) else None
            row = {"clips": None, "seconds": None} if reached is None else {"clips": reached * clips, "seconds": reached * clips * seconds[arm.name]}
            rows.append({"arm": arm.name, "judge": target, "rollouts": reached, **row})
    return rows


def end_rows(cfg: Config, start: Mapping[str, Any], found: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Of SFT and each arm: the judge, its gain and, of a latent reward, its difference to the reward on pixels, paired; both rewards, the guard and flashes."""
    ids = list(start["judge"])

    def table(arm: Arm) -> Array:
        return np.array([[one["judge"][prompt] for prompt in ids] for one in found[arm]])  # [S,N]

    before = np.array([start["judge"][prompt] for prompt in ids])  # [N]
    rows = [_end_row(cfg, "sft", [start], bootstrap_mean(before), None, None)]
    for arm in found:
        other = Arm("pixel", arm.constrained)
        difference = bootstrap_crossed(table(arm) - table(other)) if arm.reward == "latent" and other in found else None
        rows.append(_end_row(cfg, arm.name, found[arm], bootstrap_crossed(table(arm)), bootstrap_crossed(table(arm) - before), difference))
    return rows


def _end_row(cfg: Config, name: str, seeds: Sequence[Mapping[str, Any]], judge: Interval, gain: Interval | None, difference: Interval | None) -> Row:
    prompts = [k // cfg.clips for k in range(len(seeds[0]["pixel"]))]
    within = [float(np.nanmean(list(inside(spearman, one["latent"], one["pixel"], prompts).values()))) for one in seeds]
    flashes = clopper_pearson(sum(one["flashing"] for one in seeds), sum(one["clips"] for one in seeds))
    parts: dict[str, Interval | None] = {"judge": judge, "gain": gain, "latent_minus_pixel": difference, "flashing": flashes}
    row: Row = {"policy": name, "seeds": len(seeds)}
    for part, interval in parts.items():
        row |= columns(part, interval)
    means = {f"{part}_reward" if part != "guard" else part: float(np.mean([np.mean(one[part]) for one in seeds])) for part in ("pixel", "latent", "guard")}
    return {**row, **means, "spearman_within": float(np.mean(within))}


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    small = (("sight", 1), ("iterations", 2), ("prompts", 2), ("steps", 2), ("passes", 2), ("evaluate_every", 1))
    fit = cfg.distil.fit.model_copy(update={key: min(most, getattr(cfg.distil.fit, key)) for key, most in small})
    distil = cfg.distil.model_copy(update={"prompts": min(4, cfg.distil.prompts), "takes": min(2, cfg.distil.takes), "held_out": min(4, cfg.distil.held_out), "fit": fit})
    fewer = {key: min(most, getattr(cfg.policy, key)) for key, most in (("iterations", 2), ("prompts", 2), ("group_size", 4), ("evaluate_every", 1))}
    policy = cfg.policy.model_copy(update=fewer)
    begin = Begin(pairs=min(24, cfg.begin.pairs), iterations=min(2, cfg.begin.iterations), prompts=min(10, cfg.begin.prompts))
    less = {"seeds": cfg.seeds[:1], "held_out_prompts": min(4, cfg.held_out_prompts), "prompts": min(4, cfg.prompts), "clips": min(2, cfg.clips), "rounds": 1, "updates": 1}
    return cfg.model_copy(update={**less, "begin": begin, "distil": distil, "policy": policy})


def run_all(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    made = prepare(cfg, out)
    pace = Pace("latent reward, RL", len(ARMS) * len(cfg.seeds))
    runs: dict[Arm, list[Path]] = {arm: [] for arm in ARMS}
    for seed in cfg.seeds:
        for arm in ARMS:
            fresh = not (out / "rl" / f"{arm.name}-{seed}" / "network.json").exists()
            runs[arm].append(climb(cfg, out, made, arm, seed))
            pace.advance(f"{arm.name}, seed {seed}", 1, fresh=fresh)
    start = judged(cfg, out, made, "sft", made.model)

    def end(arm: Arm) -> list[dict[str, Any]]:
        return [judged(cfg, out, made, f"{arm.name}-{seed}", folder / "network.safetensors") for seed, folder in zip(cfg.seeds, runs[arm], strict=True)]

    ends = {arm: end(arm) for arm in ARMS}
    seconds = second_rows(cfg, made, clock(cfg, made))
    each = {str(row["arm"]): float(row["seconds_per_clip"]) for row in seconds}
    found = curves(runs)
    return {
        "agreement": agreement_rows(made),
        "seconds": seconds,
        "end": end_rows(cfg, start, ends),
        "reached": reach_rows(cfg, found, each),
        "learning": learning_rows(cfg, found, each),
        "distilling": [{"seconds": made.card["seconds"], **{f"{split}_clips": number for split, number in made.card["clips"].items()}}],
    }


def verdicts(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """What was asked, and whether it holds."""
    low = min(parts["agreement"], key=lambda row: row["t"])
    free = next(row for row in parts["seconds"] if row["arm"] == "latent-free")
    end = next(row for row in parts["end"] if row["policy"] == "latent-free")
    return [
        f"Rank correlation with the reward on pixels of at least 0.9 at low noise: {_verdict(low['spearman_low'] >= 0.9, low['spearman_high'] < 0.9)} over all clips "
        f"({low['spearman']:.3f} [{low['spearman_low']:.3f}, {low['spearman_high']:.3f}]), {_verdict(low['spearman_within_low'] >= 0.9, low['spearman_within_high'] < 0.9)} "
        f"among clips of one prompt ({low['spearman_within']:.3f} [{low['spearman_within_low']:.3f}, {low['spearman_within_high']:.3f}]).",
        f"Fewer seconds a clip without the limit: {free['seconds_over_pixel']:.2f} [{free['seconds_over_pixel_low']:.2f}, {free['seconds_over_pixel_high']:.2f}] of those with the "
        f"reward on pixels. The judge's score after as many clips: latent minus pixel {100 * end['latent_minus_pixel']:+.1f} points "
        f"[{100 * end['latent_minus_pixel_low']:+.1f}, {100 * end['latent_minus_pixel_high']:+.1f}].",
    ]


def _verdict(holds: bool, fails: bool) -> str:
    return "holds" if holds else "does not hold" if fails else "cannot be told"


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = run_all(small, out)
    if cfg.write:
        remarks = [
            *verdicts(parts),
            f"{len(small.seeds)} seed{'s' * (len(small.seeds) > 1)} of RL from one network and one pair of rewards. "
            "What each number is: [how to read](../README.md#how-to-read-the-latent-reward).",
        ]
        sections = {part.capitalize(): in_brackets(rows) for part, rows in parts.items()}
        write(cfg, "latent-reward", here("latent-reward", cfg), "A latent reward beside the reward on pixels", sections, remarks=remarks)
    return {"rows": flat(parts)}
