"""GRPO for flow models with LoRA under a safety limit (`rushes grpo`).

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) with one noisy step a clip, drawn per prompt and shared by its group (Flash-GRPO's iso-temporal rule, arXiv 2605.15980):
K forward passes to roll out and one step to train; less where a group shares its first noise, and so its clips up to that step. Other windows, MixGRPO's sliding one
among them, are a word. Advantages come from the group alone: no statistics outlive a rollout. The KL to the SFT network (adapter off) is a penalty.
Under guidance the policy is the guided model: sampled, replayed and looked at with the same scale. What it leaves out: more than one update a rollout.

Letters: N prompts, G clips a prompt, B = N G clips, K denoising steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor

from align.advantage import Advantage, DivideBy, best_and_worst, gdpo_advantage, group_advantage, varied
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several, Whole
from align.data import PromptSampler
from align.kernels import KL_UNITS, Gaussian, Kernel, KernelName, KLSpace, StepWeight, build_kernel, kl_in, step_weight
from align.objectives import Loss
from align.objectives.policy_gradient import kl_penalty, ppo_clip
from align.optimizers import build_optimizer
from align.run import Run
from align.trajectory import Step, Trajectory, replay, rollout
from align.windows import all_steps, fixed_window, one_step_a_prompt, random_window, sliding_window
from base_model.errors import UserError
from base_model.lora import add_lora, reference
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import feedback
from recipes.feedback import Assessment, Assessor, Feedback, HeldOut
from recipes.generate import Sampler, times_of
from recipes.models import encode_prompts

METRICS = {
    **feedback.METRICS,
    "kl_penalty": f"KL term of the loss: policy.kl_coef times the KL in policy.kl_space: x in {KL_UNITS['x']}, v in {KL_UNITS['v']}.",
    "velocity_distance": f"Mean squared distance of the trained steps' velocity from the SFT policy's before the update, {KL_UNITS['v']}.",
    "rollout_evaluations": "Model evaluations of the rollout, a clip; a guided one is two passes of the network.",
    "kept_share": "Share of the rollout's clips that were trained on.",
}


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rollouts."""
    prompts: Count = 12
    """N, prompts a rollout."""
    group_size: Several = 12
    """G, clips of each prompt a rollout."""
    window: Literal["one_step", "all", "fixed", "random", "sliding"] = "one_step"
    """Which steps take noise and are trained: one a prompt, drawn anew each rollout; all but the last; `width` from `window_start` on; `width` anywhere; MixGRPO's `width` from
    noise to detail. All but `all` and `fixed` stay within `first_steps`."""
    first_steps: Count = 5
    """Noisy steps are among the first so many, and never the last one."""
    width: Count = 2
    """Steps of a `fixed`, `random` or `sliding` window."""
    window_start: Whole = 0
    """First step of a `fixed` window."""
    slide_every: Count = 25
    """Rollouts before a `sliding` window goes on by one step."""
    kernel: KernelName = "flow"
    """How a noisy step is taken (align/README.md); `longcat` is `flow` with its std clipped at 0.45."""
    noise_level: Positive = 0.9
    """Noise of the kernel: a of `flow` and `longcat`, eta of the others."""
    same_noise: bool = False
    """Whether the clips of a prompt start from the same noise. What they have in common is then computed once, in the rollout as in the replay."""
    micro_batch: Count = 48
    """Clips in one forward pass, in the rollout and in the replay: as many whole groups as fit, at least one."""
    keep: Whole = 0
    """Clips of each prompt that are trained on, the better and the worse half of them; 0 means all."""
    train_empty: bool = True
    """Whether under guidance the pass without prompt is trained, too."""
    divide_by: DivideBy | Literal["gdpo"] = "group_std"
    """What centred rewards are divided by; `gdpo`: each of several `dimensions` by its group's std before they are weighed, so that none rules by its spread."""
    drop_flat: bool = False
    """Leaves out groups whose clips are all worth the same, reward and costs together: no pass is spent on them, and the others weigh more (DAPO)."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 1e-3
    """Learning rate of AdamW on the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    clip_range: Positive = 1e-3
    """PPO's clip range on the per-element ratio."""
    step_weight: StepWeight = "inv_kappa"
    """Weight of a step."""
    kl_coef: NonNegative = 0.01
    """Weight of the KL from the SFT policy, per latent element, in the unit of `kl_space`."""
    kl_space: KLSpace = "x"
    """`x`: nats of the denoising step; `v`: squared distance of the velocities, whatever the step."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(Feedback):
    out: Path = Path("runs/grpo")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""

    @model_validator(mode="after")
    def _several_dimensions(self) -> Config:
        if self.policy.divide_by == "gdpo" and len(self.dimensions or {}) < 2:
            raise ValueError("policy.divide_by is gdpo, which is about several dimensions of the reward. Give dimensions, or another divide_by")
        return self


def noisy_steps(p: Policy, num_steps: int, iteration: int, generator: torch.Generator) -> Tensor:
    """Which steps of each prompt's clips take noise, bool [K,N]. Raises ValueError where the window does not fit."""
    if p.window == "one_step":
        return one_step_a_prompt(num_steps, p.prompts, generator, first=p.first_steps)
    if p.window == "all":
        steps = all_steps(num_steps)
    elif p.window == "fixed":
        steps = fixed_window(num_steps, p.window_start, p.width)
    elif p.window == "random":
        steps = random_window(num_steps, p.width, generator, first=p.first_steps)
    else:
        steps = sliding_window(num_steps, p.width, iteration, every=p.slide_every, first=p.first_steps)
    noisy = torch.zeros(num_steps, p.prompts, dtype=torch.bool)
    noisy[steps] = True
    return noisy


def check_policy(p: Policy, sampler: Sampler) -> None:
    """Raises UserError for a window, a noise level or a selection that cannot be, before anything is loaded into a run."""
    feedback.check_steps(sampler)
    try:
        noisy_steps(p, sampler.steps, 0, torch.Generator())
        build_kernel(p.kernel, p.noise_level)
    except ValueError as error:
        raise UserError(f"policy.window and policy.kernel: {error}. Change policy.width, policy.first_steps, policy.noise_level or sampler.steps") from error
    if p.keep and not 2 <= p.keep <= p.group_size:
        raise UserError(f"policy.keep is {p.keep}: give 0, or from 2 to the policy.group_size of {p.group_size}")


def compared(cfg: Config, seen: Assessment) -> Advantage:
    """Every clip [B] beside its own group."""
    G, divide_by, weights = cfg.policy.group_size, cfg.policy.divide_by, cfg.dimensions or {}
    if divide_by == "gdpo":
        return gdpo_advantage(torch.stack([seen.parts[name] for name in weights], 1), list(weights.values()), G)
    return group_advantage(seen.reward, G, divide_by=divide_by)


class Lesson(NamedTuple):
    """A noisy step of the b clips of a micro-batch that are trained on."""

    step: Step
    cond: Conditioning  # of the trajectory
    better: Tensor  # [b] advantage
    asked: Tensor  # [a] which of the clips the SFT policy is asked about
    prior: Gaussian  # a, what it says of the step


@torch.no_grad()
def lessons_of(p: Policy, policy: VideoModel, kernel: Kernel, taken: Trajectory, advantage: Tensor, kept: Tensor) -> list[Lesson]:
    """Those of a micro-batch's noisy steps; advantage, kept (bool): of its clips, [b] each. Where the KL is in no loss, the SFT policy is asked about an eighth of them."""
    found = []
    for whole in taken.steps():
        clip = whole.rows.cpu()
        step, better = whole.select(kept[clip].nonzero()[:, 0].to(whole.rows.device)), advantage[clip[kept[clip]]].to(whole.x.device)
        if len(better):
            asked = (torch.arange(len(better)) if p.kl_coef else feedback.eighth(len(better))).to(whole.x.device)
            with reference(policy.network):
                found.append(Lesson(step, taken.cond, better, asked, replay(policy, kernel, step.select(asked), taken.cond)))
    return found


def losses_of(p: Policy, policy: VideoModel, kernel: Kernel, total: float, lessons: Sequence[Lesson]) -> Iterator[Loss]:
    """The losses of a micro-batch's noisy steps, as shares of an update of so many clips and steps in all."""
    for step, cond, better, asked, prior in lessons:
        share = len(better) / total
        now = replay(policy, kernel, step, cond)
        weight = step_weight(p.step_weight, kernel, policy.path, step.t, step.s)  # [b]
        loss = ppo_clip(now.log_prob(step.x_next), step.log_prob, better, p.clip_range, weight=weight)
        now, t, s = now[asked], step.t[asked], step.s[asked]  # a
        kl = kl_in(p.kl_space, now, prior, kernel, policy.path, t, s)  # [a]
        if p.kl_coef:
            loss = loss.plus("kl_penalty", kl_penalty(kl, p.kl_coef))
        shares = {"charged": kl, "kl": now.kl(prior), "velocity_distance": kl_in("v", now, prior, kernel, policy.path, t, s)}  # [a] each
        yield Loss(loss.value * share, {**loss.stats, **{name: value.detach().mean() * share for name, value in shares.items()}})


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> feedback.GuardWatch:
    p = cfg.policy
    check_policy(p, cfg.sampler)
    _, texts = feedback.training_prompts(cfg)
    states = encode_prompts(model, texts)
    kernel, times = build_kernel(p.kernel, p.noise_level), times_of(model, cfg.sampler)
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    policy = feedback.guided(model, cfg.sampler, train_empty=p.train_empty)
    idle = partial(feedback.idle_pass, policy, *feedback.idle_clip(run, model, cfg.sampler, states))
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    multipliers, watch = feedback.limits_of(cfg, assess)
    feedback.register(run, model, optimizer, multipliers, watch)
    batch = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    G, clips = p.group_size, p.prompts * p.group_size
    starts = 1 if p.same_noise else G  # rows of first noise a prompt; G / starts clips branch off each
    together = max(1, p.micro_batch // G)  # prompts
    parts = torch.arange(p.prompts).split(together)
    own = run.share(range(len(parts)), "policy.micro_batch")
    mine = [parts[k] for k in own]

    for i in run.iterations(p.iterations, save_every=p.save_every, label="grpo"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # Roll out: noise in the window's steps only.
        generator = run.generator("rollout", i)
        cond = states[torch.tensor(batch[i])]  # N
        x = torch.randn(p.prompts, starts, *model.latents.shape(cfg.sampler.clip), generator=generator).to(run.device)  # [N,G or 1,C,F,H,W]
        noisy = noisy_steps(p, cfg.sampler.steps, i, generator)  # [K,N]
        injected = [{k: torch.randn(len(part) * G, *x.shape[2:], generator=generator) for k in noisy[:, part].any(1).nonzero()[:, 0].tolist()} for part in parts]
        taken = [
            rollout(
                policy,
                kernel,
                x[parts[n]].flatten(0, 1),
                times,
                cond[parts[n]].repeat(starts),
                noise=injected[n].__getitem__,
                stochastic=noisy[:, parts[n]].repeat_interleave(starts, 1),
                branches=G // starts,
            )
            for n in own
        ]

        # Compare every clip with its own group.
        seen = assess.finished(model, [made.x0 for made in taken], cond[torch.cat(mine)].repeat(G), gather=run.gather)
        relative = compared(cfg, seen)
        if multipliers is not None:
            feedback.dual_step(multipliers, seen)
        limited = feedback.apply_limits(relative, seen, multipliers, cfg.safety, G)
        telling = limited.valid & varied(limited.advantage, G) if p.drop_flat else limited.valid  # [B]
        kept = best_and_worst(limited.advantage, G, p.keep or G, valid=telling)  # [B]
        if i == 0:
            feedback.check_first_step(policy, kernel, taken[0], seen.reward, G)

        # One update; the ratio is 1, so its gradient is REINFORCE's.
        rows = [slice(int(part[0]) * G, (int(part[-1]) + 1) * G) for part in mine]  # of the B clips
        passes = sum(int((made.noisy.cpu() & kept[row]).any(1).sum()) for made, row in zip(taken, rows, strict=True))  # noisy steps of micro-batches, less those nobody learns from
        with torch.no_grad():
            run.keep_pace(passes, idle)
        lessons = [lessons_of(p, policy, kernel, made, limited.advantage[row], kept[row]) for made, row in zip(taken, rows, strict=True)]
        total = float(kept.sum() * noisy[:, 0].sum())
        run.keep_pace(passes, idle)
        losses = run.backward_each(optimizer, partial(losses_of, p, policy, kernel, total), lessons)
        norm = run.step(optimizer, p.max_grad_norm)

        # Tell.
        means = {name: sum(float(loss.stats[name]) for loss in losses) if losses else math.nan for name in ("charged", "kl", "velocity_distance")}
        run.log(
            **feedback.rollout_stats(seen, G, multipliers),
            **looked,
            **feedback.policy_stats([loss.stats for loss in losses], means["kl"], x[0, 0].numel(), norm),
            zero_std_share=relative.stats["advantage/zero_std_share"],
            kl_penalty=p.kl_coef * means["charged"],
            velocity_distance=means["velocity_distance"],
            rollout_evaluations=sum(run.gather(made.forward_passes for made in taken)) / clips,
            kept_share=float(kept.float().mean()),
        )
    return watch


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="grpo", reward=cfg.reward)
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
