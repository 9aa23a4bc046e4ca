"""Do two rounds of rankings and RL beat one, at equal rankings and equal forward passes?

One round: R tasks of takes by the SFT model are ranked, a reward model learns, NFT climbs it for F rollouts. Two rounds: R/2 tasks, F/2 rollouts, then R/2 tasks of the new
policy's takes, the reward model anew from all R, F/2 rollouts (`rushes rounds`). With the limit on flashing and without it, for every seed of prompts, takes, people and RL, from
one SFT model. The judge, which nothing was trained on, decides on held-out prompts.

Letters: S seeds, N held-out prompts, G clips a prompt, R tasks, F rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, Share, dump
from base_model.errors import UserError
from base_model.tiny import WEIGHTS
from recipes import demo, nft, rounds, sft
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, in_brackets, place, write
from recipes.bench._start import evaluation_prompts
from recipes.bench._trained import Pace, Seeds, kept
from recipes.evaluate import clip_seeds, generator
from recipes.generate import Sampler, network_lineage
from recipes.shapes.measure import flash_counts, measure, shares
from recipes.statistics import Interval, bootstrap_crossed, bootstrap_mean, clopper_pearson

Array = NDArray[np.float64]
Even = Annotated[int, Field(ge=2, multiple_of=2)]
EVALUATION_SEED = 720_000
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""


class Begin(BaseConfig):
    """The SFT model that all runs start from, where none is given."""

    pairs: Count = 2_500
    """Curated pairs."""
    iterations: Count = 170
    """Steps of SFT."""


class Config(Bench):
    out: Path = Path("runs/bench-rounds")
    """Folder of everything that is trained; what is finished there is not repeated. `quick` keeps nothing."""
    model: Path | None = None
    """Network to start from; none: that of the demo's SFT. `quick` takes the shipped base."""
    begin: Begin = Begin()
    """How the demo's SFT is done."""
    rankings: Even = 256
    """R, tasks of four takes, of one prompt each and ranked by one person each."""
    policy: nft.Policy = nft.Policy(iterations=14, evaluate_every=1000)
    """How NFT climbs; its iterations are F, an even number."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of all that comes after SFT."""
    limits: Annotated[tuple[bool, ...], Field(min_length=1)] = (False, True)
    """Without the limit on flashing, and with it. `quick` takes the last."""
    prompt_pool: Count = 400
    """Training prompts that NFT draws from."""
    held_out_prompts: Count = 32
    """Held-out prompts that are looked at before and after every round; nothing stops a run."""
    prompts: Count = 80
    """Held-out prompts of one object."""
    clips: Count = 4
    """Clips of each."""
    strobe: Share = 0.2
    """Share of training prompts, and as many further held-out ones, that ask for strobing."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""


class Arm(NamedTuple):
    """How the same rankings and rollouts are spent."""

    rounds: int
    constrained: bool

    @property
    def name(self) -> str:
        return f"{'one round' if self.rounds == 1 else 'two rounds'}, {'limit' if self.constrained else 'free'}"

    @property
    def folder(self) -> str:
        return f"{self.rounds}-{'limit' if self.constrained else 'free'}"


def arms_of(cfg: Config) -> list[Arm]:
    return [Arm(number, constrained) for constrained in cfg.limits for number in (1, 2)]


class Ended(NamedTuple):
    """A finished run: its last network, a row a round, and what the judge says of its clips."""

    network: Path
    rounds: Sequence[Mapping[str, Any]]
    judged: Mapping[str, Any]


# Runs


def start_network(cfg: Config, out: Path) -> Path:
    """The SFT model; trained here where none is given."""
    if cfg.model is not None:
        return cfg.model
    fit = sft.Fit(iterations=cfg.begin.iterations, lr=5e-4)
    start = demo.Config(out=out / "start", stage="sft", pairs=cfg.begin.pairs, fit=fit, sampler=cfg.sampler)
    demo.main(start)
    return demo.folder(start, "sft") / "network.safetensors"


def rounds_config(cfg: Config, out: Path, start: Path, arm: Arm, seed: int) -> rounds.Config:
    """The run of one arm and seed. Guards watch nothing: every run is as long as the others."""
    rl = {
        "policy": {**dump(cfg.policy), "iterations": cfg.policy.iterations // arm.rounds},
        "constrained": arm.constrained,
        "prompt_pool": cfg.prompt_pool,
        "strobe": cfg.strobe,
        "held_out_prompts": cfg.held_out_prompts,
        "guards": {"watch": False},
        "sampler": dump(cfg.sampler),
    }
    where = out / "runs" / f"{arm.folder}-{seed}"
    return rounds.Config(out=where, seed=seed, rounds=arm.rounds, labelers="simulated", model=start, prompts=cfg.rankings // arm.rounds, overlap=0.0, rl=rl)


@torch.no_grad()
def judge_network(cfg: Config, network: Path) -> dict[str, Any]:
    """The judge's share of right clips a prompt, and how many clips flash."""
    prompts = evaluation_prompts(cfg.prompts, cfg.strobe, EVALUATION_SEED)
    texts = [prompt.text for prompt in prompts for _ in range(cfg.clips)]
    clips = generator({"it": network}, cfg.sampler)("it", texts, clip_seeds(EVALUATION_SEED, len(texts)))  # [N*G,T,3,H,W]
    measured = measure(clips, prompts, cfg.clips, fps=cfg.sampler.fps)
    flashing, number = flash_counts(measured)
    return {"judge": dict(shares(measured)), "flashing": flashing, "clips": number}


def judged(cfg: Config, out: Path, name: str, network: Path) -> dict[str, Any]:
    """The same, kept for its settings."""
    settings = {"version": VERSION, "network": network_lineage(network), "prompts": cfg.prompts, "clips": cfg.clips, "strobe": cfg.strobe, "sampler": dump(cfg.sampler)}
    return kept(out / "judged" / f"{name}.json", settings, partial(judge_network, cfg, network))


def run_one(cfg: Config, out: Path, start: Path, arm: Arm, seed: int) -> Ended:
    """The finished run of one arm and seed."""
    settings = rounds_config(cfg, out, start, arm, seed)
    result = rounds.main(settings)
    network, rows = Path(str(result["weights"])), result["rounds"]
    assert isinstance(rows, list)
    return Ended(network, rows, judged(cfg, out, f"{arm.folder}-{seed}", network))


# Rows

Found = Mapping[Arm, Sequence[Ended]]


def table(seeds: Sequence[Mapping[str, Any]]) -> Array:
    """The judge's share of right clips, [S,N]."""
    ids = list(seeds[0]["judge"])
    return np.array([[one["judge"][prompt] for prompt in ids] for one in seeds])


def end_rows(cfg: Config, start: Mapping[str, Any], found: Found) -> list[Row]:
    """Of SFT and each arm: the judge, its gain over SFT, flashes, and what was spent, mean over the seeds."""
    before = table([start])[0]  # [N]
    rows = [_end_row("SFT", [start], bootstrap_mean(before), None)]
    for arm, seeds in found.items():
        right = table([one.judged for one in seeds])
        row = _end_row(arm.name, [one.judged for one in seeds], bootstrap_crossed(right), bootstrap_crossed(right - before))
        rows.append({**row, "answers": float(np.mean([one.rounds[-1]["answers"] for one in seeds])), "forwards": float(np.mean([forwards(cfg, one.rounds) for one in seeds]))})
    return rows


def _end_row(name: str, seeds: Sequence[Mapping[str, Any]], right: Interval, gain: Interval | None) -> Row:
    flashes = clopper_pearson(sum(one["flashing"] for one in seeds), sum(one["clips"] for one in seeds))
    return {"policy": name, "seeds": len(seeds), **columns("judge", right), **columns("gain", gain), **columns("flashing", flashes), "answers": None, "forwards": None}


def forwards(cfg: Config, rows: Sequence[Mapping[str, Any]]) -> int:
    """Clips through the network for takes and RL; the two looks of a round at held-out prompts are left out."""
    looks = 2 * cfg.held_out_prompts * cfg.sampler.steps
    return int(sum(row["takes"] * cfg.sampler.steps + row["forward_passes"] - looks for row in rows))


def difference_rows(cfg: Config, found: Found) -> list[Row]:
    """Two rounds less one, paired over seeds and prompts."""
    rows = []
    for constrained in cfg.limits:
        gap = table([one.judged for one in found[Arm(2, constrained)]]) - table([one.judged for one in found[Arm(1, constrained)]])  # [S,N]
        known = bootstrap_crossed(gap)
        rows.append({"limit": constrained, **columns("two_minus_one", known), "two_rounds_are_better": True if known.low > 0 else False if known.high < 0 else None})
    return rows


def round_rows(found: Found) -> list[Row]:
    """What the rounds themselves say, without the judge, mean over the seeds: is the reward model right about the newest clips, before it is refreshed and after?"""
    names = ("answers", "accuracy_newest_before", "accuracy_newest", "reward_before", "reward_after", "blocked_before", "blocked_after", "kl_from_first")
    return [
        {"policy": arm.name, "round": number + 1, **{name: _mean([one.rounds[number][name] for one in seeds]) for name in names}}
        for arm, seeds in found.items()
        for number in range(arm.rounds)
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    policy = cfg.policy.model_copy(update={"iterations": 2, "prompts": min(2, cfg.policy.prompts), "group_size": min(4, cfg.policy.group_size)})
    sampler = cfg.sampler.model_copy(update={"steps": min(2, cfg.sampler.steps)})
    most = {"rankings": 16, "prompt_pool": 6, "held_out_prompts": 2, "prompts": 4, "clips": 2}
    less = {"model": cfg.model or WEIGHTS / "dit.safetensors", "seeds": cfg.seeds[:1], "limits": cfg.limits[-1:], "policy": policy, "sampler": sampler}
    return cfg.model_copy(update={**less, **{key: min(number, getattr(cfg, key)) for key, number in most.items()}})


def run_all(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    if cfg.policy.iterations % 2:
        raise UserError(f"policy.iterations is {cfg.policy.iterations}, and two rounds have half of them each. Give an even number")
    start, arms = start_network(cfg, out), arms_of(cfg)
    pace = Pace("rounds, runs", len(arms) * len(cfg.seeds))
    found: dict[Arm, list[Ended]] = {arm: [] for arm in arms}
    for seed in cfg.seeds:
        for arm in arms:
            fresh = not (out / "judged" / f"{arm.folder}-{seed}.json").exists()
            found[arm].append(run_one(cfg, out, start, arm, seed))
            pace.advance(f"{arm.name}, seed {seed}", 1, fresh=fresh)
    return {"end": end_rows(cfg, judged(cfg, out, "start", start), found), "difference": difference_rows(cfg, found), "rounds": round_rows(found)}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Whether two rounds beat one, in words."""
    words = {True: "Two rounds beat one", False: "Two rounds are worse than one", None: "It cannot be told whether two rounds beat one"}
    return [
        f"{words[row['two_rounds_are_better']]} at equal rankings and rollouts, {'under the limit' if row['limit'] else 'without the limit'}: "
        f"{100 * row['two_minus_one']:+.1f} points of right clips [{100 * row['two_minus_one_low']:+.1f}, {100 * row['two_minus_one_high']:+.1f}]."
        for row in rows
    ]


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = run_all(small, out)
    if cfg.write:
        remarks = [*verdicts(parts["difference"]), f"{len(small.seeds)} seeds. What each number is: [how to read](../README.md#how-to-read-rounds)."]
        sections = {part.capitalize(): in_brackets(rows) for part, rows in parts.items()}
        write(cfg, "rounds", here("rounds", cfg), "Two rounds of rankings and RL, or one", sections, remarks=remarks)
    return {"rows": flat(parts)}
