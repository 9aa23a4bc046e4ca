"""PPO with a critic and LoRA under a safety limit (`rushes ppo`): every noisy step has an advantage of its own.

Schulman et al. 2017 (arXiv 1707.06347) on denoising steps, as DDPO (arXiv 2305.13301) takes them, with a value of the unfinished clip, as in DPOK (arXiv 2305.16381), and
generalised advantages over the noisy steps (arXiv 1506.02438). What a clip is worth is said by the critic from its state, its prompt and the time, not by the other
clips of its prompt. A rollout is learned from for several epochs of minibatches, so that ratios leave 1 and clipping matters. The KL from the SFT network (adapter off) is a
term of the loss, or is paid for in the reward of each step (InstructGPT, arXiv 2203.02155, eq. 2). The safety cost is compared within each prompt, as in `grpo.py`: it enters
through a multiplier and a hard gate, and is the same for every step of a clip.

A clip takes K forward passes to roll out, w of the SFT network, and w in each epoch to train. Under guidance, twice that: the policy is then the guided model.
What it leaves out: clips that share their first noise (`grpo.py`, `ddpo.py`), a critic of the cost.

Letters: N prompts, G clips a prompt, B = N G clips, K denoising steps, of which a window of w consecutive ones is noisy and trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align.advantage import Advantage, batch_normalise
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several, Share, Whole
from align.critic import Critic, explained_variance, gae, value_loss
from align.data import PromptSampler
from align.kernels import Gaussian, Kernel, KernelName, StepWeight, build_kernel, step_weight
from align.objectives import Loss
from align.objectives.policy_gradient import kl_penalty, ppo_clip, step_rewards
from align.optimizers import build_optimizer
from align.run import Run
from align.trajectory import Step, Trajectory, replay, rollout
from align.windows import random_window
from base_model.errors import UserError
from base_model.lora import add_lora, reference
from base_model.threads import in_threads
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import feedback
from recipes.feedback import Assessor, Feedback, GuardWatch, HeldOut
from recipes.generate import times_of
from recipes.models import encode_prompts

LARGEST_ADVANTAGE = 5.0


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rollouts."""
    prompts: Count = 12
    """N, prompts a rollout."""
    group_size: Several = 8
    """G, clips of each prompt a rollout: the safety cost is compared among them."""
    window: Whole = 4
    """w, consecutive noisy (trained) steps a rollout, drawn anew each time from all but the last step; 0 means all of them."""
    kernel: KernelName = "ancestral"
    """How a noisy step is taken (align/README.md)."""
    noise_level: Positive = 1.0
    """Noise of the kernel: a of `flow` and `longcat`, eta of the others."""
    epochs: Count = 2
    """Passes over a rollout."""
    minibatches: Count = 2
    """Optimizer steps an epoch, each on whole micro-batches in an order drawn anew."""
    micro_batch: Count = 24
    """Clips in one forward pass, in the rollout and in the replay."""
    train_empty: bool = True
    """Whether under guidance the pass without prompt is trained, too."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 1e-3
    """Learning rate of AdamW on the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradients, the critic's too, are clipped to this norm."""
    clip_range: Positive = 1e-3
    """PPO's clip range on the per-element ratio."""
    step_weight: StepWeight = "inv_kappa"
    """Weight of a step."""
    kl_coef: NonNegative = 0.01
    """Weight of the KL from the SFT policy, per latent element: times the number of latent elements, the price of a nat of the clip."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is paid for: exactly, as a term of the loss, or in the reward of each step, by the log-ratio of the step that was taken. That needs a far larger weight."""
    gamma: Share = 1.0
    """Discount of a noisy step."""
    gae_lambda: Share = 0.95
    """1 believes the rewards alone, 0 the critic's word on the next state."""
    critic_lr: Positive = 1e-3
    """Learning rate of AdamW on the critic."""
    critic_width: Count = 128
    """Width of the critic's hidden layers."""
    value_clip: Positive = 2.0
    """How far a value may move in one rollout, in the reward's standard deviations."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(Feedback):
    out: Path = Path("runs/ppo")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""


METRICS = {name: sentence for name, sentence in feedback.METRICS.items() if name != "zero_std_share"} | {
    "kl_per_element": "Mean log-ratio of policy and SFT policy on the steps taken, nats per latent element: an unbiased estimate of the KL before the update, negative by chance.",
    "kl_penalty": "What the KL costs: the term of the loss, mean over the updates, or policy.kl_coef times the log-ratio of a step.",
    "value_loss": "Half the squared error of the critic, mean over the updates, in the reward's unit squared.",
    "explained_variance": "1 - Var(return - V) / Var(return) of the critic before it learns from the rollout: 0 knows no more than the mean, below 0 misleads.",
    "window_start": "First noisy step of this rollout.",
}


class Part(NamedTuple):
    """A micro-batch of b clips, and what was known of its w noisy steps before the update."""

    rows: Tensor  # [b] which of the B clips
    cond: Conditioning  # b
    steps: list[Step]  # w
    priors: list[Gaussian]  # w, what the SFT policy says of each step


def roll_out_some(
    policy: VideoModel, kernel: Kernel, times: Tensor, cond: Conditioning, noise: Tensor, injected: Tensor, noisy: Sequence[int], rows: Tensor
) -> Trajectory:
    """The clips `rows` of B: from noise [B,C,F,H,W], with injected [w,B,C,F,H,W] in the noisy steps."""
    return rollout(policy, kernel, noise[rows], times, cond[rows], noise=lambda k: injected[k - noisy[0], rows], stochastic=noisy)


@torch.no_grad()
def told_by(critic: Critic, part: Part) -> tuple[Tensor, Tensor]:
    """Of a micro-batch what the critic says, and the log-ratio of policy and SFT policy, of every noisy step: [w,b] each, on the CPU."""
    values = torch.stack([critic(step.x, step.t, part.cond) for step in part.steps])
    log_ratio = torch.stack([step.log_prob - prior.log_prob(step.x_next) for step, prior in zip(part.steps, part.priors, strict=True)])
    return values.cpu(), log_ratio.cpu()


def policy_losses(p: Policy, policy: VideoModel, kernel: Kernel, limited: Sequence[Advantage], known: float, part: Part) -> Iterator[Loss]:
    """The losses of a micro-batch's noisy steps, as shares of an update that learns from `known` clips. limited: one a step, of B clips."""
    for step, prior, (advantage, valid, _) in zip(part.steps, part.priors, limited, strict=True):
        better, taught = advantage[part.rows].to(step.x.device), valid[part.rows].to(step.x.device)  # [b]
        now = replay(policy, kernel, step, part.cond)
        weight = step_weight(p.step_weight, kernel, policy.path, step.t, step.s)  # [b]
        loss = ppo_clip(now.log_prob(step.x_next), step.log_prob, better, p.clip_range, valid=taught, weight=weight)
        if p.kl_in == "loss":
            loss = loss.plus("kl_penalty", kl_penalty(now.kl(prior), p.kl_coef, valid=taught))
        yield Loss(loss.value * (float(taught.sum()) / known / len(part.steps)), feedback.known_stats(loss, taught))


def critic_losses(p: Policy, critic: Critic, values: Tensor, returns: Tensor, valid: Tensor, known: float, part: Part) -> Iterator[Loss]:
    """The same for the critic; what it said at the rollout and should have said, [w,B], of the clips that are valid [B]."""
    for step, value, wanted in zip(part.steps, values, returns, strict=True):
        said, should, taught = (each[part.rows].to(step.x.device) for each in (value, wanted, valid))  # [b]
        loss = value_loss(critic(step.x, step.t, part.cond), said, should, p.value_clip, valid=taught)
        yield Loss(loss.value * (float(taught.sum()) / known / len(part.steps)), feedback.known_stats(loss, taught))


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> GuardWatch:
    p = cfg.policy
    kernel = check_policy(cfg)
    _, texts = feedback.training_prompts(cfg)
    pool = encode_prompts(model, texts)
    times = times_of(model, cfg.sampler)  # [K+1]
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    policy = feedback.guided(model, cfg.sampler, train_empty=p.train_empty)
    idle = partial(feedback.idle_pass, policy, *feedback.idle_clip(run, model, cfg.sampler, pool))
    critic = Critic(model.latents.channels, pool.text.shape[-1], width=p.critic_width, seed=cfg.seed).to(run.device)
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    critic_optimizer = build_optimizer(critic, "adamw", lr=p.critic_lr, weight_decay=0.0)
    multipliers, watch = feedback.limits_of(cfg, assess)
    feedback.register(run, model, optimizer, multipliers, watch)
    run.register("critic", critic)
    run.register("critic_optimizer", critic_optimizer)
    sampler = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    batches = micro_batches(p)
    own = run.share(range(len(batches)), "policy.micro_batch")
    mine = [batches[k] for k in own]

    for i in run.iterations(p.iterations, save_every=p.save_every, label="ppo"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # 1. Roll out: G clips of each of N prompts, noise in a window of steps.
        generator = run.generator("rollout", i)
        cond = pool[torch.tensor(sampler[i]).repeat_interleave(p.group_size)]  # B
        noisy = random_window(cfg.sampler.steps, min(p.window or cfg.sampler.steps, cfg.sampler.steps - 1), generator)
        shape = (len(cond), *model.latents.shape(cfg.sampler.clip))  # B C F H W
        noise = torch.randn(shape, generator=generator).to(run.device)  # [B,C,F,H,W]
        injected = torch.randn(len(noisy), *shape, generator=generator).to(run.device)  # [w,B,C,F,H,W]
        taken = in_threads(partial(roll_out_some, policy, kernel, times, cond, noise, injected, noisy), mine, run.device)
        seen = assess.finished(model, [each.x0 for each in taken], cond[torch.cat(mine)], gather=run.gather)
        if i == 0:
            in_threads(partial(feedback.check_first_step, policy, kernel, reward=seen.reward, group_size=p.group_size), taken[:1], run.device)

        # 2. Say of every noisy state what was to be expected there, and of every step how much better it got.
        with torch.no_grad(), reference(model.network):
            priors = in_threads(lambda each: [replay(policy, kernel, step, each.cond) for step in each.steps()], taken, run.device)
        parts = {k: Part(rows, each.cond, each.steps(), prior) for k, rows, each, prior in zip(own, mine, taken, priors, strict=True)}
        values, log_ratio = (torch.cat(run.gather(each), dim=1) for each in zip(*(told_by(critic, part) for part in parts.values()), strict=True))  # [w,B] each
        # The log-ratio of the step that was taken, not the KL of its state: that does not depend on the step, so a policy gradient would not see the step's own KL.
        rewards = step_rewards(seen.reward, log_ratio, p.kl_coef if p.kl_in == "reward" else 0.0)  # [w,B]
        estimate = gae(rewards, values, gamma=p.gamma, lam=p.gae_lambda)
        known_steps = estimate.valid.expand_as(values)  # [w,B]
        advantage = batch_normalise(estimate.advantage, known_steps).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)  # [w,B]
        if multipliers is not None:
            feedback.dual_step(multipliers, seen)
        limited = [feedback.apply_limits(Advantage(each, estimate.valid, {}), seen, multipliers, cfg.safety, p.group_size) for each in advantage]

        # 3. Move the policy and the critic: epochs of minibatches, in another order each time.
        losses, value_losses, norms = [], [], []
        for epoch in range(p.epochs):
            order = torch.randperm(len(batches), generator=run.generator("order", i * p.epochs + epoch)).tolist()
            for u in range(p.minibatches):
                chosen = order[u :: p.minibatches]
                share = [parts[k] for k in chosen if k in parts]
                clips = torch.cat([batches[k] for k in chosen])
                taught, told = (float(valid[clips].sum().clamp_min(1)) for valid in (limited[0].valid, estimate.valid))
                run.keep_pace(sum(len(part.steps) for part in share), idle)
                losses += run.backward_each(optimizer, partial(policy_losses, p, policy, kernel, limited, taught), share)
                norms.append(run.step(optimizer, p.max_grad_norm))
                value_losses += run.backward_each(critic_optimizer, partial(critic_losses, p, critic, values, estimate.returns, estimate.valid, told), share)
                run.step(critic_optimizer, p.max_grad_norm)

        # 4. Tell.
        kl = float(log_ratio.mean())
        run.log(
            **feedback.rollout_stats(seen, p.group_size, multipliers),
            **looked,
            **feedback.policy_stats([loss.stats for loss in losses], kl, noise[0].numel(), sum(norms) / len(norms)),
            kl_penalty=feedback.mean_stat([loss.stats for loss in losses], "kl_penalty") if p.kl_in == "loss" else p.kl_coef * kl,
            value_loss=feedback.mean_stat([loss.stats for loss in value_losses], "value/loss"),
            explained_variance=explained_variance(values, estimate.returns, valid=known_steps),
            window_start=noisy[0],
        )
    return watch


def micro_batches(p: Policy) -> list[Tensor]:
    """Which of the B clips go through the network together."""
    return list(torch.arange(p.prompts * p.group_size).split(p.micro_batch))


def check_policy(cfg: Config) -> Kernel:
    """The kernel. Raises UserError for a noise level, a number of steps or of minibatches that cannot be, before anything is loaded into a run."""
    p, parts = cfg.policy, len(micro_batches(cfg.policy))
    feedback.check_steps(cfg.sampler)
    if p.minibatches > parts:
        raise UserError(f"policy.minibatches is {p.minibatches}, but a rollout has {parts} micro-batches of {p.micro_batch} clips. Lower it or policy.micro_batch")
    try:
        return build_kernel(p.kernel, p.noise_level)
    except ValueError as error:
        raise UserError(f"policy.kernel: {error}. Change policy.noise_level") from error


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="ppo", reward=cfg.reward)
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
