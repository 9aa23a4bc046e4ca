"""Where RL starts in a benchmark, the network, the reward model and the guard that `rushes demo` makes before its RL, or finished ones; and the prompts it is judged on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from align.config import Config as BaseConfig
from align.config import Count
from base_model.errors import UserError
from recipes import demo, sft
from recipes.generate import Sampler
from recipes.shapes.prompts import ShapesPrompt, make_prompts


class Begin(BaseConfig):
    """The demo's stages up to its reward models, where none are given."""

    pairs: Count = 2_500
    """Curated pairs for SFT."""
    iterations: Count = 170
    """Steps of SFT."""
    prompts: Count = 640
    """Prompts whose takes are ranked."""


class Start(NamedTuple):
    """Files and folders."""

    model: Path
    reward: Path
    guard: Path
    candidates: Path | None  # the clips that were ranked


def the_start(begin: Begin, out: Path, model: Path | None, reward: Path | None, guard: Path | None, *, strobe: float, sampler: Sampler) -> Start:
    """What is given or, where nothing is, what the demo's stages make in `out`. Raises UserError where only some are given."""
    if model is not None and reward is not None and guard is not None:
        return Start(model, reward, guard, None)
    if any((model, reward, guard)):
        raise UserError("model, reward and guard: one needs the others. Give all three, or none")
    fit = sft.Fit(iterations=begin.iterations, lr=5e-4)
    start = demo.Config(out=out, stage="reward", pairs=begin.pairs, fit=fit, candidate_prompts=begin.prompts, strobe=strobe, sampler=sampler)
    demo.main(start)
    made = demo.folder(start, "reward")
    return Start(demo.folder(start, "sft") / "network.safetensors", made / "reward", made / "guard", demo.folder(start, "candidates"))


def evaluation_prompts(number: int, strobe: float, seed: int) -> list[ShapesPrompt]:
    """So many held-out prompts of one object, and the share `strobe` as many further ones that ask for strobing."""
    strobing = round(number * strobe)
    calm = make_prompts(number, seed=seed, split="eval")
    return [*calm, *(make_prompts(strobing, seed=seed + 1, split="eval", strobe=1.0) if strobing else [])]
