"""One RL update of `rushes ddpo` and `rushes grpo`: seconds, split into rollout, decoding, reward and update; forward-equivalents a clip; peak memory.

What runs is the recipe itself, `ddpo.train` and `grpo.train`, with a clock in the model, in what scores the clips and in the run's log. The first update of a round
(self-check, optimizer state) warms up and is not counted. A reward model with fresh weights costs what a trained one costs.

A forward-equivalent is one clip through the network once, without gradient: a rollout step or a reference step counts 1, a trained step 3.
`seconds_over_forward_equivalents` is the whole update divided by what that many rollout steps would take: how far everything else is from free.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from align.config import Count
from align.progress import Progress
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.tiny import load_tiny
from recipes import ddpo, grpo
from recipes.bench._clock import PHASES, Laps, NoLook, TimedAssessor, TimedModel, TimedRun
from recipes.bench._results import Bench, Row, check_can_end, columns, here, spread, write
from recipes.ddpo import Policy as DDPOPolicy
from recipes.feedback import standardised
from recipes.generate import Sampler, safety_runner
from recipes.grpo import Policy as GRPOPolicy
from recipes.guards import Guards
from recipes.memory import PeakMemory
from reward.matcher import Matcher
from reward.mixture import Mixture
from reward.model import RewardModel, load_reward_model
from reward.quality import Quality

Recipe = Literal["ddpo", "grpo"]


class Config(Bench):
    recipes: tuple[Recipe, ...] = ("ddpo", "grpo")
    """What is measured, in turn."""
    model: Path | None = None
    """Network to start from; none means the shipped base."""
    reward: Path | None = None
    """Folder of a reward model; none means one of the same size with fresh weights."""
    rounds: Count = 3
    """Rounds over the recipes. `quick` takes 1."""
    updates: Count = 2
    """Measured updates of each recipe a round."""
    ddpo: DDPOPolicy = DDPOPolicy()
    """DDPO's settings. `quick` takes at most 4 prompts."""
    ddpo_sampler: Sampler = Sampler()
    """DDPO's size of the clips and number of steps."""
    grpo: GRPOPolicy = GRPOPolicy(prompts=6, group_size=8, same_noise=True, first_steps=3, kl_coef=0.1)
    """GRPO's settings. `quick` takes at most 4 prompts."""
    grpo_sampler: Sampler = Sampler(steps=4, guidance=1.1)
    """GRPO's size of the clips and number of steps."""


# Measuring


@dataclass(frozen=True)
class Measured:
    """One recipe in one round: its measured updates, and the process tree's largest memory while it ran."""

    updates: list[dict[str, float]]
    peak_bytes: int


def sampler_of(cfg: Config, recipe: Recipe) -> Sampler:
    return {"ddpo": cfg.ddpo_sampler, "grpo": cfg.grpo_sampler}[recipe]


def run_updates(cfg: Config, recipe: Recipe, reward: Mixture, out: Path) -> Measured:
    """One unmeasured and `cfg.updates` measured updates, in the empty folder `out`."""
    laps, sampler = Laps(), sampler_of(cfg, recipe)
    loaded = load_tiny(cfg.model)
    loaded.network.requires_grad_(False)
    model = TimedModel(**{part.name: getattr(loaded, part.name) for part in fields(loaded)}, laps=laps)
    assess = TimedAssessor(reward, safety_runner(), sampler.fps, laps=laps)
    held_out = NoLook((), model.encode_text(["nothing"]), sampler, None, 0, out)
    once = {"iterations": 1 + cfg.updates, "save_every": 2 + cfg.updates, "evaluate_every": 2 + cfg.updates}

    def train() -> None:
        if recipe == "ddpo":
            alone = ddpo.Config(out=out, sampler=sampler, guards=Guards(watch=False), prompt_pool=cfg.ddpo.prompts, policy=cfg.ddpo.model_copy(update=once))
            ddpo.train(alone, TimedRun(out, alone, laps, ddpo.METRICS), model, assess, held_out)
        else:
            grouped = grpo.Config(out=out, sampler=sampler, guards=Guards(watch=False), prompt_pool=cfg.grpo.prompts, policy=cfg.grpo.model_copy(update=once))
            grpo.train(grouped, TimedRun(out, grouped, laps, grpo.METRICS), model, assess, held_out)

    laps.begin()
    with PeakMemory() as memory:
        train()
    return Measured(laps.done[1:], memory.peak_bytes)


def reward_of(cfg: Config) -> Mixture:
    """The reward model given, or one with fresh weights."""
    return standardised(load_reward_model(cfg.reward, TextEncoder()) if cfg.reward else RewardModel(Matcher(), Quality(), ("overall",), TextEncoder()).eval(), 0.5)


def measure(cfg: Config) -> list[Row]:
    """One row a recipe."""
    reward = reward_of(cfg)
    found: dict[Recipe, list[Measured]] = {recipe: [] for recipe in cfg.recipes}
    with Progress("phases", total=cfg.rounds * len(found)) as progress:
        for _ in range(cfg.rounds):
            for recipe, rounds in found.items():
                with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
                    rounds.append(run_updates(cfg, recipe, reward, Path(folder) / "run"))
                progress.advance(recipe)
    return [_row(cfg, recipe, rounds) for recipe, rounds in found.items()]


def _row(cfg: Config, recipe: Recipe, rounds: Sequence[Measured]) -> Row:
    policy, sampler = getattr(cfg, recipe), sampler_of(cfg, recipe)
    clips = policy.prompts * policy.group_size
    updates = [update for each in rounds for update in each.updates]
    seconds = spread([sum(update[phase] for phase in PHASES) for update in updates])
    parts = {phase: statistics.median(update[phase] for update in updates) for phase in PHASES}
    passes = {kind: statistics.median(update.get(kind, 0.0) for update in updates) / clips for kind in ("rolled", "reference", "trained")}
    equivalents = passes["rolled"] + passes["reference"] + 3 * passes["trained"]
    return {
        "recipe": recipe,
        "clip": str(sampler.clip),
        "prompts": policy.prompts,
        "group_size": policy.group_size,
        "clips": clips,
        "steps": sampler.steps,
        "updates": len(updates),
        **columns("seconds", seconds),
        **{f"{phase}_seconds": value for phase, value in parts.items()},
        "seconds_per_clip": seconds.median / clips,
        "rollout_forwards_per_clip": passes["rolled"],
        "reference_forwards_per_clip": passes["reference"],
        "trained_forwards_per_clip": passes["trained"],
        "forward_equivalents_per_clip": equivalents,
        "seconds_over_forward_equivalents": seconds.median / (parts["rollout"] * equivalents / passes["rolled"]),
        "peak_memory_bytes": max(each.peak_bytes for each in rounds),
    }


def shrunk(cfg: Config) -> Config:
    """The quick form: one round, at most 4 prompts."""
    fewer: dict[str, Any] = {recipe: getattr(cfg, recipe).model_copy(update={"prompts": min(4, getattr(cfg, recipe).prompts)}) for recipe in ("ddpo", "grpo")}
    return cfg.model_copy(update={"rounds": 1, **fewer})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    if not cfg.recipes or cfg.rounds < 1 or cfg.updates < 1:
        raise UserError("nothing to measure: recipes, rounds and updates are at least one each. Give --recipes ddpo")
    rows = measure(shrunk(cfg) if cfg.quick else cfg)
    if cfg.write:
        write(cfg, "phases", here("phases", cfg), "One RL update", {"Seconds, forward-equivalents and memory": rows})
    return {"rows": rows}
