"""GRPO for flow models with LoRA under a safety limit (`rushes grpo`).

Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) with one noisy step a clip, drawn per prompt and shared by its group (Flash-GRPO's iso-temporal rule, arXiv 2605.15980):
K forward passes to roll out and one step to train. Advantages come from the group alone: no statistics outlive a rollout. The KL to the SFT network (adapter off) is a penalty.
What it leaves out: guidance, shared ODE prefixes, best-of-n selection.

Letters: N prompts, G clips a prompt, B = N G clips, K denoising steps.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from align.advantage import DivideBy, group_advantage
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several
from align.data import PromptSampler
from align.kernels import FlowSDE, StepWeight, step_weight
from align.objectives.policy_gradient import kl_penalty, ppo_clip
from align.optimizers import build_optimizer
from align.run import Run
from align.trajectory import rollout, transition
from base_model.lora import add_lora, reference
from base_model.times import sampling_times
from base_model.tiny import LatentVideoModel
from recipes import feedback
from recipes.feedback import Assessor, Feedback, HeldOut

METRICS = {
    **feedback.METRICS,
    "kl_penalty": "KL term of the loss: coefficient times the mean KL of the trained steps.",
}


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rollouts."""
    prompts: Count = 12
    """N, prompts a rollout."""
    group_size: Several = 12
    """G, clips of each prompt a rollout."""
    first_steps: Count = 5
    """The noisy step is one of the first so many."""
    a: Positive = 0.9
    """Noise of the flow SDE."""
    same_noise: bool = False
    """Whether the clips of a prompt start from the same noise."""
    micro_batch: Count = 48
    """Clips in one forward pass, in the rollout and in the replay."""
    divide_by: DivideBy = "group_std"
    """What centred rewards are divided by."""
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
    """Weight of the KL from the SFT policy, per latent element."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(Feedback):
    out: Path = Path("runs/grpo")
    """Folder of the run: `adapter.safetensors`, and `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""


def one_step_a_prompt(steps: int, prompts: int, group_size: int, first: int, generator: torch.Generator) -> Tensor:
    """Which step of which clip takes noise, bool [K,B]: one of the `first` steps a prompt, the same for its whole group."""
    drawn = torch.randint(min(first, steps - 1), (prompts,), generator=generator).repeat_interleave(group_size)  # [B]
    return torch.arange(steps)[:, None] == drawn  # [K,B]


def train(cfg: Config, run: Run, model: LatentVideoModel, assess: Assessor, held_out: HeldOut) -> feedback.GuardWatch:
    p = cfg.policy
    feedback.check_steps(cfg.sampler)
    _, texts = feedback.training_prompts(cfg)
    states = model.encode_text(texts)
    kernel, times = FlowSDE(p.a), sampling_times(model.path, cfg.sampler.steps, shift=cfg.sampler.shift)
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, seed=cfg.seed)
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    multiplier, watch = feedback.limits_of(cfg)
    feedback.register(run, model, optimizer, multiplier, watch)
    batch = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    clips = p.prompts * p.group_size

    for i in run.iterations(p.iterations, save_every=p.save_every, label="grpo"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # Roll out: every clip takes noise in one step.
        generator = run.generator("rollout", i)
        cond = states[torch.tensor(batch[i]).repeat_interleave(p.group_size)]  # B
        x = torch.randn(clips, *model.latents.shape(cfg.sampler.clip), generator=generator).to(run.device)  # [B,C,F,H,W]
        if p.same_noise:
            x = x[:: p.group_size].repeat_interleave(p.group_size, dim=0)
        noisy = one_step_a_prompt(cfg.sampler.steps, p.prompts, p.group_size, p.first_steps, generator)  # [K,B]
        parts = [slice(k, k + p.micro_batch) for k in range(0, clips, p.micro_batch)]
        taken = [rollout(model, kernel, x[part], times, cond[part], noise=generator, stochastic=noisy[:, part]) for part in parts]

        # Compare every clip with its own group.
        seen = assess.finished(model, [made.x0 for made in taken], cond)
        relative = group_advantage(seen.reward, p.group_size, divide_by=p.divide_by)
        if multiplier is not None:
            multiplier.update(seen.violates)
        limited = feedback.apply_limits(relative, seen, multiplier, cfg.safety, p.group_size)
        if i == 0:
            feedback.check_first_step(model, kernel, taken[0], seen.reward, p.group_size)

        # One update; the ratio is 1, so its gradient is REINFORCE's.
        terms, kls = [], []
        for part, trajectory in zip(parts, taken, strict=True):
            for step in trajectory.steps():
                conditions, rows = trajectory.cond[step.rows], step.rows.cpu() + part.start
                better, valid = limited.advantage[rows].to(run.device), limited.valid[rows].to(run.device)  # [b]
                now = transition(model, kernel, step.x, step.t, step.s, conditions)
                with reference(model.network), torch.no_grad():
                    prior = transition(model, kernel, step.x, step.t, step.s, conditions)
                kl = now.kl(prior)  # [b]
                weight = step_weight(p.step_weight, kernel, model.path, step.t, step.s)
                policy = ppo_clip(now.log_prob(step.x_next), step.log_prob, better, p.clip_range, valid=valid, weight=weight)
                loss = policy.plus("kl_penalty", kl_penalty(kl, p.kl_coef, valid=valid))
                run.backward(loss.value * (valid.sum() / limited.valid.sum().clamp_min(1)))
                terms.append(loss.stats)
                kls.append(kl.detach())
        norm = run.step(optimizer, p.max_grad_norm)

        kl_mean = float(torch.cat(kls).mean())
        run.log(
            **feedback.rollout_stats(seen, p.group_size, multiplier),
            **looked,
            **feedback.policy_stats(terms, kl_mean, x[0].numel(), norm, relative),
            kl_penalty=torch.stack([s["kl_penalty"] for s in terms]).mean(),
        )
    return watch


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    result = feedback.align(cfg, run, train, cfg.policy.iterations, recipe="grpo")
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
