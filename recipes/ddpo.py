"""DDPO with LoRA under a safety limit (`rushes ddpo`): policy gradient on denoising steps, rewards compared within each prompt.

Black et al. 2023 (arXiv 2305.13301), the importance-sampled form with PPO's clipping, on a flow-matching model: a denoising step is a Gaussian, sampled and replayed
by the same `transition`. A prompt's clips share their first noise, as in DanceGRPO (arXiv 2505.07818): rewards then differ only by noise the policy answers for.
The SFT network is the reference (adapter off). The safety cost enters through a multiplier that aims at a quarter of the limit, and through a hard gate.
Under guidance the policy is the guided model: sampled, replayed and looked at with the same scale. What it leaves out: a critic, a penalty on the KL (`grpo.py` has one).

Letters: N prompts, G clips a prompt, B = N G clips, K denoising steps, of which a window of consecutive ones is noisy and trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from align.advantage import Advantage, PromptStatistics, group_advantage
from align.config import Config as BaseConfig
from align.config import Count, Positive, Several, Whole
from align.data import PromptSampler
from align.kernels import Ancestral, Gaussian, Kernel, StepWeight, step_weight
from align.objectives import Loss
from align.objectives.policy_gradient import ppo_clip
from align.optimizers import build_optimizer, warmup_cosine
from align.run import Run
from align.trajectory import Trajectory, join_steps, replay, rollout
from align.windows import random_window
from base_model.errors import UserError
from base_model.lora import add_lora, reference
from base_model.threads import in_threads
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import feedback
from recipes.feedback import Assessor, Feedback, GuardWatch, HeldOut
from recipes.generate import times_of
from recipes.models import encode_prompts


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rollouts."""
    prompts: Count = 12
    """N, prompts a rollout."""
    group_size: Several = 8
    """G, clips of each prompt a rollout."""
    window: Whole = 4
    """Consecutive noisy (trained) steps a rollout, drawn anew each time from all but the last step; 0 means all of them."""
    eta: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Noise of the ancestral kernel, above 0, at most 1."""
    same_noise: bool = True
    """Whether a prompt's clips start from the same noise. They then differ by the window's noise alone, which is all that the gradient sees, and are compared
    with one another; otherwise with their prompt's last rewards. What they have in common is computed once."""
    updates: Count = 1
    """Optimizer steps a rollout; above 1 the ratio leaves 1 and clipping matters."""
    micro_batch: Count = 48
    """Clips in one forward pass, in the rollout and in the replay; with `same_noise` as many whole groups as fit, at least one."""
    steps_a_pass: Count = 1
    """Noisy steps of a micro-batch that are replayed in one forward pass, in the memory of as many micro-batches: for a GPU that one step leaves idle. Nothing else changes but
    rounding."""
    train_empty: bool = True
    """Whether under guidance the pass without prompt is trained, too."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW on the adapter; it falls to nothing by a cosine, so that the last steps average the noise of the gradient out."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    clip_range: Positive = 1e-3
    """PPO's clip range on the per-element ratio."""
    step_weight: StepWeight = "inv_kappa"
    """Weight of a step: `none`, `g` or `inv_kappa` (equal gradient scale over the steps)."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""
    statistics_buffer: Count = 32
    """Rewards remembered per prompt, without `same_noise`."""


class Config(Feedback):
    out: Path = Path("runs/ddpo")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""


METRICS = {
    **feedback.METRICS,
    "window_start": "First noisy step of this rollout.",
}


def roll_out_some(
    policy: VideoModel, kernel: Kernel, times: Tensor, cond: Conditioning, noise: Tensor, injected: Tensor, noisy: Sequence[int], branches: int, rows: Tensor
) -> Trajectory:
    """The clips `rows` of B: from noise [B,C,F,H,W], `branches` of them in a row from the same, with injected[k] [B,C,F,H,W] in the noisy steps."""
    first = rows[::branches]
    return rollout(policy, kernel, noise[first], times, cond[first], noise=lambda k: injected[k, rows], stochastic=noisy, branches=branches)


class Replayed(NamedTuple):
    """A micro-batch of b clips to learn from."""

    rows: Tensor  # [b] which of the B clips
    taken: Trajectory  # b
    prior: Gaussian | None  # what the SFT policy says of the first noisy step of every eighth, where the KL is wanted


def losses_of(p: Policy, policy: VideoModel, kernel: Kernel, limited: Advantage, known: float, part: Replayed) -> Iterator[Loss]:
    """The losses of a micro-batch's noisy steps, as shares of an update that learns from `known` clips."""
    steps = part.taken.steps()
    device = steps[0].x.device
    better, valid = limited.advantage[part.rows].to(device), limited.valid[part.rows].to(device)  # [b]
    for first in range(0, len(steps), p.steps_a_pass):
        step = join_steps(steps[first : first + p.steps_a_pass])  # n b
        now = replay(policy, kernel, step, part.taken.cond)
        weight, known_here = step_weight(p.step_weight, kernel, policy.path, step.t, step.s), valid[step.rows]  # [n b] each
        loss = ppo_clip(now.log_prob(step.x_next), step.log_prob, better[step.rows], p.clip_range, valid=known_here, weight=weight)
        kl = {"kl": now[feedback.eighth(len(part.rows))].kl(part.prior).detach().mean()} if part.prior is not None and first == 0 else {}
        yield Loss(loss.value * (float(known_here.sum()) / known / len(steps)), {**feedback.known_stats(loss, known_here), **kl})


@torch.no_grad()
def prior_of(policy: VideoModel, kernel: Kernel, taken: Trajectory) -> Gaussian:
    """What the SFT policy says of the first noisy step of every eighth clip."""
    step = taken.steps()[0]
    with reference(policy.network):
        return replay(policy, kernel, step.select(feedback.eighth(len(step.rows))), taken.cond)


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> GuardWatch:
    p = cfg.policy
    feedback.check_steps(cfg.sampler)
    clips, branches = p.prompts * p.group_size, p.group_size if p.same_noise else 1
    together = max(1, p.micro_batch // branches) * branches
    batches = torch.arange(clips).split(together)
    if p.updates > len(batches):
        raise UserError(f"policy.updates is {p.updates}, but {clips} clips in micro-batches of {together} cannot be shared among so many. Lower policy.micro_batch")
    prompt_ids, texts = feedback.training_prompts(cfg)
    pool = encode_prompts(model, texts)
    kernel = Ancestral(p.eta)
    times = times_of(model, cfg.sampler)  # [K+1]
    latent_shape = model.latents.shape(cfg.sampler.clip)  # C F H W

    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    policy = feedback.guided(model, cfg.sampler, train_empty=p.train_empty)
    idle = partial(feedback.idle_pass, policy, *feedback.idle_clip(run, model, cfg.sampler, pool))
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    schedule = warmup_cosine(optimizer, p.iterations * p.updates, warmup=2)
    multipliers, watch = feedback.limits_of(cfg, assess)
    feedback.register(run, model, optimizer, multipliers, watch)
    run.register("schedule", schedule)
    statistics = PromptStatistics(buffer_size=p.statistics_buffer, min_count=min(p.group_size, p.statistics_buffer))
    if not p.same_noise:
        run.register("statistics", statistics)
    sampler = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    own = run.share(range(len(batches)), "policy.micro_batch")
    mine = [batches[k] for k in own]

    for i in run.iterations(p.iterations, save_every=p.save_every, label="ddpo"):
        # 1. Look at the held-out prompts now and then.
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # 2. Roll out: G clips of each of N prompts, noise in a window of steps.
        generator = run.generator("rollout", i)
        chosen = torch.tensor(sampler[i]).repeat_interleave(p.group_size)  # [B]
        cond = pool[chosen]
        noisy = random_window(cfg.sampler.steps, min(p.window or cfg.sampler.steps, cfg.sampler.steps - 1), generator)
        noise = torch.randn(len(cond), *latent_shape, generator=generator).to(run.device)  # [B,C,F,H,W]
        if p.same_noise:
            noise = noise[:: p.group_size].repeat_interleave(p.group_size, dim=0)
        injected = torch.randn(cfg.sampler.steps, len(cond), *latent_shape, generator=generator).to(run.device)  # [K,B,C,F,H,W]
        roll_out = partial(roll_out_some, policy, kernel, times, cond, noise, injected, noisy, branches)
        rollouts = in_threads(roll_out, mine, run.device)

        # 3. Ask for reward and cost; compare each clip with what its prompt usually gets.
        seen = assess.finished(model, [taken.x0 for taken in rollouts], cond[torch.cat(mine)], gather=run.gather)
        if p.same_noise:
            advantage = group_advantage(seen.reward, p.group_size, divide_by="max_group_std")
        else:
            advantage = statistics.advantage([prompt_ids[k] for k in chosen.tolist()], seen.reward)
        if multipliers is not None:
            feedback.dual_step(multipliers, seen)
        limited = feedback.apply_limits(advantage, seen, multipliers, cfg.safety, p.group_size)
        if i == 0:
            in_threads(partial(feedback.check_first_step, policy, kernel, reward=seen.reward, group_size=p.group_size), rollouts[:1], run.device)

        # 4. Move the policy: replay the noisy steps, weigh their log-probabilities.
        losses, norms = [], []
        passes = -(-int(rollouts[0].noisy.any(1).sum()) // p.steps_a_pass)  # of a micro-batch
        with torch.no_grad():
            run.keep_pace(int(0 in own), idle)
        priors = [prior_of(policy, kernel, taken) if k == 0 else None for k, taken in zip(own, rollouts, strict=True)]
        parts = {k: Replayed(*part) for k, *part in zip(own, mine, rollouts, priors, strict=True)}
        for u in range(p.updates):
            share = [parts[k] for k in range(u, len(batches), p.updates) if k in parts]
            known = limited.valid[torch.cat(batches[u :: p.updates])].sum().clamp_min(1)  # clips this update learns from
            run.keep_pace(len(share) * passes, idle)
            losses += run.backward_each(optimizer, partial(losses_of, p, policy, kernel, limited, float(known)), share)
            norms.append(run.step(optimizer, p.max_grad_norm, schedule))
        kl = float(losses[0].stats["kl"])

        # 5. Tell.
        run.log(
            **feedback.rollout_stats(seen, p.group_size, multipliers),
            **looked,
            **feedback.policy_stats([loss.stats for loss in losses], kl, noise[0].numel(), sum(norms) / len(norms)),
            zero_std_share=advantage.stats["advantage/zero_std_share"],
            window_start=noisy[0],
        )
    return watch


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="ddpo", reward=cfg.reward)
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
