"""Forward-process reinforcement with LoRA under a safety limit (`rushes nft`): good clips attract the velocity field, bad ones repel it.

DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): clips are made by the deterministic sampler, noised again, and their velocity is regressed with the sign of their
advantage, near the policy that made them. No step of the sampler needs a density, so any sampler will do, and every clip teaches along its own latent instead
of along random noise. Clips may come from a policy that follows the trained one slowly (`old_rate`), as in the paper. `method` names its relatives, which differ by a factor
(align/README.md): the paper's adaptive weights, AWM (arXiv 2509.25050), DGPO (arXiv 2510.08425), RWR (arXiv 2302.12192). The limit on flashing is that of `ddpo.py`. What it
leaves out: guidance.

Letters: N prompts, G clips a prompt, B = N G clips.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from align import selfcheck
from align.advantage import group_advantage
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several
from align.data import PromptSampler
from align.objectives import Loss
from align.objectives.forward_process import dgpo_weight, implicit_split, matching_log_prob, nft_split, old_policy_decay, rwr_weight, signed_flow_matching
from align.objectives.policy_gradient import ppo_clip
from align.objectives.regression import clip_error, flow_matching
from align.optimizers import build_optimizer
from align.run import Run
from base_model.lora import ShadowAdapter, add_lora, reference, using
from base_model.paths import add_noise
from base_model.threads import in_threads
from base_model.times import stratified_logit_normal
from base_model.types import Conditioning, TrainableModel
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
    updates: Count = 4
    """Optimizer steps a rollout; each noises every clip once, at its own time."""
    micro_batch: Count = 48
    """Clips in one forward pass."""
    time_shift: Positive = 3.0
    """Shift s of the times clips are noised to: logit-normal(log s, 1)."""
    largest_advantage: Positive = 2.0
    """Advantages are clipped to this and divided by it."""
    method: Literal["nft", "adaptive", "awm", "dgpo", "rwr"] = "nft"
    """NFT with weight 1; with its paper's adaptive weights; advantage-weighted matching, clipped as PPO; a group's clips weighed together, on the same noise; clips the
    filters allow imitated by exp(advantage / temperature)."""
    proximal: Positive = 1.0
    """Strength of the pull to the policy that made the clips, of `nft` and `adaptive`."""
    clip_range: Positive = 1e-3
    """PPO's clip range of `awm`, on exp(old error - error)."""
    group_beta: Positive = 10.0
    """beta of `dgpo`: the larger, the sooner a group whose order is learned teaches nothing more."""
    temperature: Positive = 0.5
    """Temperature of `rwr`."""
    old_rate: NonNegative = 0.0
    """Clips are made by a policy that keeps `old_rate` times the rollout's number of itself after each rollout, at most `old_largest` (0.001 and 0.5 in the paper); with 0, by the
    trained policy."""
    old_largest: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """The most that the policy which makes the clips keeps of itself."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 1e-3
    """Learning rate of AdamW on the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    kl_coef: NonNegative = 0.0
    """Weight of the squared distance of the velocity from the SFT policy's."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(Feedback):
    out: Path = Path("runs/nft")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""


METRICS = {name: sentence for name, sentence in feedback.METRICS.items() if name not in ("kl_per_element", "kl_total", "ratio", "clip_share")} | {
    "toward_good": "Mean of -2 a <u - u_old, u_old - v>: how far the policy moved towards what was better than expected.",
    "drift": "Mean squared distance of the velocity from the one that made the clips, per latent element.",
    "reference_distance": "Mean squared distance of the velocity of the policy that made the clips from the SFT policy's, per latent element.",
}


class Noised(NamedTuple):
    """b of the B clips, noised to times of their own."""

    rows: Tensor  # [b]
    cond: Conditioning  # b
    x_t: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    target: Tensor  # [b,C,F,H,W] velocity of the clip that was made

    def of(self, index: Tensor) -> Noised:
        """Some of them."""
        return Noised(self.rows[index], self.cond[index], self.x_t[index], self.t[index], self.target[index])


class Lessons(NamedTuple):
    """What clips teach."""

    advantage: Tensor  # [B] in [-1, 1]
    imitated: Tensor  # [B] weight of RWR
    valid: Tensor  # [B] bool

    def of(self, rows: Tensor, device: torch.device) -> Lessons:
        """Those of some clips."""
        return Lessons(*(each[rows].to(device) for each in self))


def batch_loss(p: Policy, model: TrainableModel, lessons: Lessons, known: float, part: tuple[Noised, Tensor | None, Tensor | None]) -> Iterator[Loss]:
    """The loss of a micro-batch, as its share of an update that learns from `known` clips. part: the clips, and what the old policy (none: the one that is trained) and the SFT
    policy say of them."""
    noised, u_old, prior = part
    u = model(noised.x_t, noised.t, noised.cond)  # [b,C,F,H,W]
    u_old = u.detach() if u_old is None else u_old
    mine = lessons.of(noised.rows, u.device)  # b
    loss = signed_flow_matching(u, u_old, noised.target, mine.advantage, p.proximal, valid=mine.valid)
    if p.method != "nft":
        loss = loss._replace(value=value_of_relative(p, mine, u, u_old, prior, noised.target, model.path.sigma(noised.t)))
    if prior is not None:
        loss = loss.plus("reference", p.kl_coef * clip_error(u, prior).mean())
    yield Loss(loss.value * (float(mine.valid.sum()) / known), loss.stats)


def value_of_relative(p: Policy, mine: Lessons, u: Tensor, u_old: Tensor, prior: Tensor | None, target: Tensor, sigma: Tensor) -> Tensor:
    """What a method other than `nft` minimises, []; u, u_old, prior, target [b,C,F,H,W], sigma [b]."""
    if p.method == "adaptive":
        split = nft_split(u, u_old, target, mine.advantage, p.proximal, sigma)
        return signed_flow_matching(u, u_old, target, split.advantage, p.proximal, weight=split.weight, valid=mine.valid).value
    error = clip_error(u, target)  # [b]
    if p.method == "awm":
        return ppo_clip(matching_log_prob(error), matching_log_prob(clip_error(u_old, target)), mine.advantage, p.clip_range, valid=mine.valid).value
    if p.method == "dgpo":
        assert prior is not None
        weight = dgpo_weight(error, clip_error(prior, target), mine.advantage, p.group_size, p.group_beta, valid=mine.valid)  # [b]
        return flow_matching(error, weight=weight * mine.advantage, valid=mine.valid).value
    return flow_matching(error, weight=mine.imitated, valid=mine.valid).value


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> GuardWatch:
    p = cfg.policy
    feedback.check_unguided(cfg.sampler)
    _, texts = feedback.training_prompts(cfg)
    pool = encode_prompts(model, texts)
    times = times_of(model, cfg.sampler)  # [K+1]
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    multipliers, watch = feedback.limits_of(cfg, assess)
    feedback.register(run, model, optimizer, multipliers, watch)
    old = ShadowAdapter(model.network, "old") if p.old_rate else None
    if old is not None:
        run.register("old", old)
    sampled_by = partial(using, model.network, "old") if old is not None else nullcontext
    sampler = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    clips = p.prompts * p.group_size
    alike = p.group_size if p.method == "dgpo" else 1  # clips side by side that are noised alike
    batches = torch.arange(clips).split(max(1, p.micro_batch // alike) * alike)
    mine = run.share(batches, "policy.micro_batch")

    for i in run.iterations(p.iterations, save_every=p.save_every, label="nft"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # 1. Roll out by the deterministic sampler, score, compare within each prompt.
        cond = pool[torch.tensor(sampler[i]).repeat_interleave(p.group_size)]  # B
        noise = run.noise(model.latents.shape(cfg.sampler.clip), clips, "rollout", i * clips)  # [B,C,F,H,W]
        with sampled_by():
            taken = in_threads(partial(feedback.roll_out_clean, model, times, cond, noise), mine, run.device)
        seen = assess.finished(model, [made.x0 for made in taken], cond[torch.cat(mine)], gather=run.gather)
        advantage = group_advantage(seen.reward, p.group_size)
        if i == 0:
            selfcheck.known_rewards(seen.reward)
            selfcheck.reward_spread(seen.reward, p.group_size)
        if multipliers is not None:
            feedback.dual_step(multipliers, seen)
        limited = feedback.apply_limits(advantage, seen, multipliers, cfg.safety, p.group_size)
        good = limited.valid & seen.allowed if cfg.constrained else limited.valid  # [B] what may be imitated
        imitated = rwr_weight(limited.advantage.where(good, torch.nan), p.temperature)  # [B]
        lessons = Lessons(implicit_split(limited.advantage, p.largest_advantage), imitated, limited.valid)

        # 2. Noise every clip once an update; what the policy that made the clips says there is known before it moves.
        generator = run.generator("times", i)
        noised = []
        for _ in range(p.updates):
            t = stratified_logit_normal(model.path, clips, shift=p.time_shift, generator=generator)  # [B]
            drawn = torch.randn(clips, *noise.shape[1:], generator=generator)  # [B,C,F,H,W]
            for rows, made in zip(mine, taken, strict=True):
                first = rows // alike * alike  # [b]
                eps, at = drawn[first].to(run.device), t[first].to(run.device)  # [b,C,F,H,W] and [b]
                noised.append(Noised(rows, made.cond, add_noise(model.path, made.x0, eps, at), at, model.path.velocity(made.x0, eps, at)))
        made_now = 0 if old is not None else len(mine)  # of the first update the trained policy made the clips, so its own pass says it
        with torch.no_grad():
            with sampled_by():
                made_by = [*[None] * made_now, *in_threads(lambda each: model(each.x_t, each.t, each.cond), noised[made_now:], run.device)]  # [b,C,F,H,W] each
            with reference(model.network):
                asked = p.kl_coef > 0 or p.method == "dgpo"  # whether the SFT policy takes part
                prior = in_threads(lambda each: model(each.x_t, each.t, each.cond), noised, run.device) if asked else [None] * len(noised)
        few = noised[0].of(feedback.eighth(len(mine[0])))
        if i == 0:
            in_threads(lambda part: feedback.check_velocity(model, part.x_t, part.t, part.cond), [few], run.device)
        with run.whole():
            distance = run.on_main(partial(feedback.reference_distance, model, few.x_t, few.t, few.cond, sampled_by))

        # 3. Move the policy.
        losses, norms = [], []
        known = float(limited.valid.sum().clamp_min(1))
        for u in range(p.updates):
            part = slice(u * len(mine), (u + 1) * len(mine))
            share = list(zip(noised[part], made_by[part], prior[part], strict=True))
            losses += run.backward_each(optimizer, partial(batch_loss, p, model, lessons, known), share)
            norms.append(run.step(optimizer, p.max_grad_norm))
        if old is not None:
            old.follow(1 - old_policy_decay(i, rate=p.old_rate, largest=p.old_largest))

        # 4. Tell.
        run.log(
            **feedback.rollout_stats(seen, p.group_size, multipliers),
            **looked,
            toward_good=torch.stack([loss.stats["forward/toward_good"] for loss in losses]).mean(),
            drift=torch.stack([loss.stats["forward/drift"] for loss in losses]).mean(),
            reference_distance=distance,
            grad_norm=sum(norms) / len(norms),
            zero_std_share=advantage.stats["advantage/zero_std_share"],
        )
    return watch


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="nft", reward=cfg.reward)
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
