"""Preference optimisation with LoRA (`rushes dpo`): the better clip of a pair becomes likelier than the worse one, measured against the SFT network (adapter off).

Flow-DPO (VideoAlign, arXiv 2501.13918) or Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908). Pairs are stored or fresh (`preferences.py`). Stored: people's rankings of
any number of clips, with no reward model; ties make no pair. Fresh: the best and the worst of each prompt's clips, made by the policy as it is and scored by a reward model.
The safety limit: a clip the filters do not allow loses to every clip they allow, whatever people or the reward say, and never wins; where all clips of a prompt are blocked nothing
is learned. Fresh clips are worth their reward less the graded cost at the multiplier's price, or what just passes the filters would win. Rankings hold no cost.

A pair costs 2 forward passes of the SFT network and 2 that are trained; fresh ones also K for each clip they were picked from. Under guidance fresh clips are those of the guided
model, and what learns is the model alone. What it leaves out: a pull back to the better clips where both errors grow (both are logged), an averaged reference.

Letters: P pairs, N prompts, G clips a prompt, B = N G clips, K denoising steps.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align import selfcheck
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several
from align.data import PromptSampler
from align.objectives import Loss
from align.objectives.preference import METRICS as PREFERENCE
from align.objectives.preference import Reduction, describe_beta, flow_dpo, mean_beta, pair_errors
from align.optimizers import build_optimizer
from align.run import Run, read_metrics
from base_model.errors import UserError
from base_model.lora import add_lora, reference
from base_model.paths import add_noise
from base_model.threads import in_threads
from base_model.times import quantile_times, stratified_logit_normal
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import feedback, guards
from recipes.feedback import Assessor, GuardWatch, HeldOut, Setting
from recipes.generate import times_of
from recipes.models import encode_prompts
from recipes.preferences import Ranked, Takes, Which, count, fresh_pairs, numbered, stored_pairs

QUANTILES = 4  # noise levels at which held-out pairs are looked at
OF_FRESH_CLIPS = ("reward", "violation_rate", "cost", "multiplier", "all_violating", "error_share")


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rounds of optimizer steps; with fresh pairs, rollouts."""
    updates: Count = 4
    """Optimizer steps a round: of stored pairs each draws others, of fresh ones each takes all; each noises them anew."""
    method: Literal["flow_dpo", "diffusion_dpo"] = "flow_dpo"
    """Weight of a noise level: 1, or alpha squared, by which an error of the velocity becomes one of the noise."""
    beta: Positive = 500.0
    """What the distance from the SFT policy costs: the larger, the nearer the policy stays. It means nothing without its `reduction`."""
    reduction: Reduction = "mean"
    """Whether `beta` is for errors that are means over a clip's latent elements, or sums."""
    which: Which = "extremes"
    """Pairs of a ranking, or of a prompt's clips: the best and the worst, or all, weighted so that every group counts once."""
    pairs: Count = 48
    """P, stored pairs a step."""
    prompts: Count = 24
    """N, prompts a rollout of fresh clips."""
    group_size: Several = 4
    """G, clips of each prompt a rollout."""
    margin: NonNegative = 0.0
    """Fresh clips make a pair where their rewards differ by more than this."""
    micro_batch: Count = 24
    """Pairs in one forward pass, or fresh clips."""
    time_shift: Positive = 3.0
    """Shift s of the times clips are noised to: logit-normal(log s, 1)."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 1e-3
    """Learning rate of AdamW on the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    held_out_pairs: Count = 64
    """Stored pairs of the split val that are looked at."""
    evaluate_every: Count = 10
    """Rounds between looks at the held-out prompts and pairs."""
    save_every: Count = 10
    """Rounds between checkpoints."""


class Config(Setting):
    out: Path = Path("runs/dpo")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    comparisons: Path | None = None
    """Folder of rankings to learn from, as `reward/comparisons.py` writes it; none: fresh clips are made, and scored by `reward`."""
    clips: Path = Path("runs/candidates")
    """Clip store with the ranked clips."""
    commercial: bool = False
    """Whether the model is for commercial use: answers whose licence forbids that, or is not known, then stop the run."""
    dimension: str = "overall"
    """Which dimension of the rankings is learned."""
    reward: Path | None = None
    """Folder of a reward model: it picks fresh pairs; beside stored rankings it only scores the looks."""
    policy: Policy = Policy()
    """How the policy moves."""


METRICS = {
    **{name.removeprefix("preference/"): sentence for name, sentence in PREFERENCE.items()},
    **{name: sentence for name, sentence in feedback.METRICS.items() if name.startswith("held_out") or name in (*OF_FRESH_CLIPS, "grad_norm")},
    **guards.METRICS,
    "held_out_accuracy": "Share of the pairs of the split val whose better clip has the larger implicit reward, at fixed noise; a tie counts half, so 0.5 at the start.",
    "pairs": "Pairs of this round's steps, mean.",
}


class Noised(NamedTuple):
    """b pairs, both clips of each noised alike."""

    win: Tensor  # [b,C,F,H,W] finished latents
    lose: Tensor  # [b,C,F,H,W]
    eps: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    cond: Conditioning  # b
    weight: Tensor  # [b]


def noised(takes: Takes, rows: Tensor, t: Tensor, generator: torch.Generator, device: torch.device) -> Noised:
    """The pairs `rows` at t, [b] each."""
    win, lose = takes.pairs.win[rows], takes.pairs.lose[rows]  # [b]
    eps = torch.randn(len(rows), *takes.latents.shape[1:], generator=generator)  # [b,C,F,H,W]
    return Noised(takes.latents[win].to(device), takes.latents[lose].to(device), eps.to(device), t.to(device), takes.cond[win], takes.pairs.weight[rows].to(device))


def noised_anew(p: Policy, model: VideoModel, step: Sequence[tuple[Takes, Tensor]], generator: torch.Generator, device: torch.device) -> list[Noised]:
    """The micro-batches of a step, every pair at a time of its own."""
    levels = [stratified_logit_normal(model.path, len(rows), shift=p.time_shift, generator=generator) for _, rows in step]  # [b] each
    return [noised(takes, rows, t, generator, device) for (takes, rows), t in zip(step, levels, strict=True)]


def errors_of(model: VideoModel, part: Noised) -> tuple[Tensor, Tensor]:
    """Velocity errors of the better and of the worse clips, [b] each."""
    return pair_errors(model, part.win, part.lose, part.eps, part.t, part.cond)


def batch_loss(p: Policy, model: VideoModel, pairs: int, part: tuple[Noised, tuple[Tensor, Tensor]]) -> Iterator[Loss]:
    """The loss of a micro-batch, as its share of a step of so many pairs. part: the pairs, and the SFT policy's errors."""
    some, before = part
    beta = mean_beta(p.beta, p.reduction, some.eps[0].numel())
    time_weight = model.path.alpha(some.t).square() if p.method == "diffusion_dpo" else None  # [b]
    loss = flow_dpo(*errors_of(model, some), *before, beta, time_weight=time_weight, pair_weight=some.weight)
    share = len(some.t) / pairs
    yield Loss(loss.value * share, {name: stat * share for name, stat in loss.stats.items()})


class HeldOutPairs:
    """Pairs of rankings that are not learned from, at fixed noise: does the policy order them as people do?"""

    def __init__(self, p: Policy, model: TrainableModel, takes: Sequence[Takes], run: Run) -> None:
        """What the SFT policy says of them is asked here, once, in the process that looks at them."""
        self._model, self._device, generator = model, run.device, run.generator("held-out pairs", 0)
        chosen = numbered(takes, torch.randperm(count(takes), generator=generator)[: p.held_out_pairs].tolist(), p.micro_batch)
        levels = quantile_times(model.path, QUANTILES).tolist()
        self._parts = [[noised(each, rows, torch.full((len(rows),), t), generator, run.device) for t in levels] for each, rows in chosen]
        with run.whole(), reference(model.network):
            self._before = [self._errors(part) for part in self._parts] if run.is_main else []

    def accuracy(self) -> dict[str, float]:
        """The metric, under its name; nothing where no pairs are held out."""
        found = [flow_dpo(*self._errors(part), *before, 1.0) for part, before in zip(self._parts, self._before, strict=True)]
        sizes = [len(part[0].t) for part in self._parts]
        right = sum(n * float(loss.stats["preference/accuracy"]) for n, loss in zip(sizes, found, strict=True))
        return {"held_out_accuracy": right / sum(sizes)} if sizes else {}

    @torch.no_grad()
    def _errors(self, part: Sequence[Noised]) -> tuple[Tensor, Tensor]:
        """Mean over the noise levels, [b] each."""
        win, lose = zip(*in_threads(partial(errors_of, self._model), part, self._device), strict=True)
        return torch.stack(win).mean(0), torch.stack(lose).mean(0)


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> GuardWatch:
    p = cfg.policy
    if cfg.comparisons is None and assess.reward is None:
        raise UserError("nothing to make pairs of, comparisons and reward. Give --comparisons FOLDER --clips STORE, or --reward FOLDER")
    ranked = Ranked([], [])
    if cfg.comparisons is not None:
        ranked = stored_pairs(cfg.comparisons, cfg.clips, model, assess.runner, dimension=cfg.dimension, which=p.which, commercial=cfg.commercial, constrained=cfg.constrained)
    run.note("answers", ranked.sha256)
    _, texts = feedback.training_prompts(cfg)
    pool = encode_prompts(model, texts)
    times = times_of(model, cfg.sampler)  # [K+1]
    shape, clips = model.latents.shape(cfg.sampler.clip), p.prompts * p.group_size  # C F H W
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    policy = feedback.guided(model, cfg.sampler)
    blank = feedback.idle_clip(run, model, cfg.sampler, pool)
    idle = partial(feedback.idle_pass, model, *blank)
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    multipliers, watch = feedback.limits_of(cfg, assess)
    multipliers = None if ranked.train else multipliers
    feedback.register(run, model, optimizer, multipliers, watch)
    tested = HeldOutPairs(p, model, ranked.val, run)
    prompts = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    mine = [] if ranked.train else run.share(torch.arange(clips).split(p.micro_batch), "policy.micro_batch")
    numbers = PromptSampler(max(1, count(ranked.train)), p.pairs, seed=cfg.seed)
    say_beta(p, run, {takes.latents[0].numel() for takes in ranked.train} or {math.prod(shape)})

    for i in run.iterations(p.iterations, save_every=p.save_every, label="dpo"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)
        if looked:
            with run.whole():
                looked |= run.on_main(tested.accuracy)

        # 1. Pairs: what people preferred, or the extremes of clips made and scored now.
        if ranked.train:
            steps = [numbered(ranked.train, numbers[i * p.updates + u], p.micro_batch) for u in range(p.updates)]
        else:
            cond = pool[torch.tensor(prompts[i]).repeat_interleave(p.group_size)]  # B
            noise = run.noise(shape, clips, "rollout", i * clips)  # [B,C,F,H,W]
            taken = in_threads(partial(feedback.roll_out_clean, policy, times, cond, noise), mine, run.device)
            seen = assess.finished(model, [each.x0 for each in taken], cond[torch.cat(mine)], gather=run.gather)
            if i == 0:
                selfcheck.known_rewards(seen.reward)
                selfcheck.reward_spread(seen.reward, p.group_size)
            if multipliers is not None:
                feedback.dual_step(multipliers, seen)
            pairs = fresh_pairs(seen, multipliers, p.group_size, p.which, margin=p.margin)
            made = Takes(torch.cat(run.gather(each.x0.cpu() for each in taken)), cond, pairs)
            steps = [numbered([made], range(len(pairs.win)), p.micro_batch)] * p.updates
            stats = feedback.rollout_stats(seen, p.group_size, multipliers)
            looked |= {name: stats[name] for name in (*OF_FRESH_CLIPS, *(name for name in stats if name not in feedback.METRICS))}

        # 2. Noise both clips of a pair alike, once a step, and ask the SFT policy.
        generator = run.generator("noise", i)
        parts = [run.share(noised_anew(p, model, step, generator, run.device), paced=True) for step in steps]
        with torch.no_grad(), reference(model.network):
            run.keep_pace(sum(len(own) for own in parts), idle)
            before = [in_threads(partial(errors_of, model), step, run.device) for step in parts]
        if i == 0:
            run.keep_pace(min(1, len(parts[0])), partial(feedback.check_velocity, model, *blank))
        if i == 0 and parts[0]:
            part = parts[0][0]
            feedback.check_velocity(model, add_noise(model.path, part.win, part.eps, part.t), part.t, part.cond)

        # 3. Move the policy.
        losses, norms = [], []
        for step, own, said in zip(steps, parts, before, strict=True):
            number = sum(len(rows) for _, rows in step)
            run.keep_pace(len(own), idle)
            losses += run.backward_each(optimizer, partial(batch_loss, p, model, number), list(zip(own, said, strict=True)))
            norms.append(run.step(optimizer, p.max_grad_norm))

        # 4. Tell.
        told = {name.removeprefix("preference/"): sum(float(loss.stats[name]) for loss in losses) / p.updates if losses else math.nan for name in PREFERENCE}
        run.log(**told, **looked, pairs=sum(len(rows) for step in steps for _, rows in step) / p.updates, grad_norm=sum(norms) / len(norms))
    if ranked.val:
        with run.whole():
            accuracy = run.on_main(tested.accuracy)
        run.log(**accuracy)
    return watch


def say_beta(p: Policy, run: Run, elements: set[int]) -> None:
    """beta in both units, on standard error, for every size of clip that is learned from."""
    if run.is_main and not run.quiet:
        for number in sorted(elements):
            print(f"dpo: {describe_beta(p.beta, p.reduction, number)}", file=sys.stderr, flush=True)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="dpo", reward=cfg.reward)
    accuracy = [row["held_out_accuracy"] for row in read_metrics(cfg.out) if "held_out_accuracy" in row]
    return {**result, "held_out_accuracy": accuracy[-1] if accuracy else None, "wall_seconds": round(time.monotonic() - started, 1)}
