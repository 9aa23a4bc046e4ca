"""Reward gradients with LoRA under a safety limit (`rushes reward-gradient`): the reward of a clip is differentiated through the decoder and the last steps of the sampler.

DRaFT-K (arXiv 2309.17400), AlignProp (arXiv 2310.03739), ReFL (arXiv 2304.05977) and VADER (arXiv 2407.08737): which steps carry a gradient, and how much is decoded, is the
whole difference between them. Steps, decoder and scorer are checkpointed. The scorer must be differentiable. It is the shortest way up a reward, and to its flaws: keep a guard.

The safety limit. A filter's verdict has no gradient, so nothing is differentiated to keep it. A clip that is not allowed, or that no filter could judge, gives no reward gradient:
it is never made better. That alone would stop clips at the limit and never bring one back. So the cost moves the policy as in `nft.py`: every clip is noised once, and those
that cost more than others of their prompt repel the velocity field, at the price of the multiplier. Filters judge finished clips (of ReFL its guesses), and all of their frames
where VADER scores a few.

A clip takes K forward passes to sample (ReFL: up to its step), as many more as there are checkpointed steps with a gradient, and when noised one of the SFT network and one that is
trained. What it leaves out: guidance, stochastic samplers, latent rewards.

Letters: N prompts, G clips a prompt, B = N G clips, K denoising steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from align import selfcheck
from align.advantage import Advantage
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Several, Share
from align.data import PromptSampler
from align.objectives import Loss
from align.objectives.forward_process import implicit_split, signed_flow_matching
from align.objectives.regression import clip_error
from align.objectives.reward_gradient import Score, check_differentiable, draw_last, draw_late, last_steps, reward_ascent, reward_of, single_step, some_frames
from align.optimizers import build_optimizer
from align.run import Run
from base_model.errors import UserError
from base_model.lora import add_lora, reference
from base_model.paths import add_noise
from base_model.threads import in_threads
from base_model.times import stratified_logit_normal
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import feedback
from recipes.feedback import Assessor, Feedback, GuardWatch, HeldOut
from recipes.generate import times_of
from recipes.models import encode_prompts
from reward.mixture import Mixture


class Policy(BaseConfig):
    """How the policy moves."""

    iterations: Count = 40
    """Rollouts, each with one optimizer step."""
    method: Literal["draft", "alignprop", "refl", "vader"] = "draft"
    """What is differentiated: the last `last_steps` steps; the last ones, their number drawn anew each rollout; one late step, from which the clip is guessed at once; the last
    step, of which `frames` latent frames are decoded."""
    last_steps: Count = 1
    """K of `draft`: steps with a gradient."""
    late_share: Share = 0.25
    """`refl` draws its step from this last share of them."""
    frames: Count = 1
    """Consecutive latent frames that `vader` decodes and scores, drawn anew each rollout."""
    hinge: float | None = None
    """Reward beyond which nothing more is asked of a clip (ReFL's phi); none: there is always more."""
    checkpointed: bool = True
    """Whether activations are computed again instead of kept: more passes, less memory."""
    prompts: Count = 12
    """N, prompts a rollout."""
    group_size: Several = 4
    """G, clips of each prompt a rollout: the safety cost is compared among them."""
    micro_batch: Count = 12
    """Clips in one forward pass."""
    cost_weight: Positive = 10.0
    """Weight of the repulsion from clips that cost more than others of their prompt, beside the multiplier."""
    kl_coef: NonNegative = 0.0
    """Weight of the squared distance of the velocity from the SFT policy's."""
    time_shift: Positive = 3.0
    """Shift s of the times clips are noised to: logit-normal(log s, 1)."""
    lora_rank: Count = 16
    """Rank of the adapter."""
    lr: Positive = 1e-3
    """Learning rate of AdamW on the adapter."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    evaluate_every: Count = 10
    """Rollouts between looks at the held-out prompts."""
    save_every: Count = 10
    """Rollouts between checkpoints."""


class Config(Feedback):
    out: Path = Path("runs/reward-gradient")
    """Folder of the run: `adapter.safetensors`, and of the built-in model `network.safetensors` with the adapter merged."""
    policy: Policy = Policy()
    """How the policy moves."""


METRICS = {name: sentence for name, sentence in feedback.METRICS.items() if name not in ("kl_per_element", "kl_total", "ratio", "clip_share", "zero_std_share")} | {
    "optimised_reward": "Mean reward that was differentiated, of the clips that may be learned from (of vader, of a few frames of each).",
    "learned_share": "Share of the rollout's clips that may be learned from: reward known, filters allow them.",
    "reference_distance": "Mean squared distance of the velocity from the SFT policy's, per latent element, before the update.",
    "differentiated": "Last steps with a gradient in this rollout; of refl the step (from 0) the clip was guessed from.",
}


class Part(NamedTuple):
    """A micro-batch of b clips: what carries the reward's gradient, and the same clips noised."""

    rows: Tensor  # [b] which of the B clips
    cond: Conditioning  # b
    shown: Tensor  # [b,C,f,H,W] finished latents with a graph, all frames or a few
    x_t: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    target: Tensor  # [b,C,F,H,W] velocity of the clip that was made


def draw(p: Policy, num_steps: int, generator: torch.Generator) -> int:
    """How many last steps carry a gradient this time; for refl, which step does."""
    if p.method == "alignprop":
        return draw_last(num_steps, generator)
    if p.method == "refl":
        return draw_late(num_steps, generator, share=p.late_share)
    return 1 if p.method == "vader" else p.last_steps


def clips_with_gradient(p: Policy, model: VideoModel, times: Tensor, cond: Conditioning, noise: Tensor, drawn: int, rows: Tensor) -> Tensor:
    """The finished latents of the clips `rows` of B, from noise [B,C,F,H,W] -> [b,C,F,H,W]."""
    finish = single_step if p.method == "refl" else last_steps
    return finish(model, noise[rows], times, cond[rows], drawn, checkpointed=p.checkpointed)


def noised(p: Policy, model: VideoModel, rows: Tensor, cond: Conditioning, x0: Tensor, generator: torch.Generator, frames: torch.Generator) -> Part:
    """A micro-batch from its latents x0 [b,C,F,H,W]."""
    t = stratified_logit_normal(model.path, len(rows), shift=p.time_shift, generator=generator).to(x0.device)  # [b]
    eps, clean = torch.randn(x0.shape, generator=generator).to(x0.device), x0.detach()  # [b,C,F,H,W] each
    shown = some_frames(x0, p.frames, frames) if p.method == "vader" else x0  # [b,C,f,H,W]
    return Part(rows, cond, shown, add_noise(model.path, clean, eps, t), t, model.path.velocity(clean, eps, t))


def losses_of(p: Policy, run: Run, model: VideoModel, score: Score, learned: Tensor, limited: Advantage, price: float, part: tuple[Part, Tensor]) -> Iterator[Loss]:
    """The losses of a micro-batch, as shares of an update of B clips. part: the clips, and the SFT policy's velocity.

    learned: which clips get a reward gradient, bool [B]; limited: how the cost moves them; price: 1 + lambda.
    """
    some, prior = part
    clips, better = len(learned), learned[some.rows].nonzero()[:, 0].to(some.shown.device)  # rows of the part
    run.keep_pace(min(1, len(better)), partial(feedback.retrace, model, some.shown))
    if len(better):
        reward = reward_of(score, model, some.shown[better], some.cond[better], name="reward", differentiable=True, checkpointed=p.checkpointed)
        ascent, share = reward_ascent(reward, hinge=p.hinge), len(better) / clips
        yield Loss(ascent.value * (share / price), {"optimised_reward": ascent.stats["reward_gradient/reward"] * share})

    u = model(some.x_t, some.t, some.cond)  # [b,C,F,H,W]
    a, valid = limited.advantage[some.rows].to(u.device), limited.valid[some.rows].to(u.device)  # [b]
    repulsion = signed_flow_matching(u, u, some.target, implicit_split(a, 1.0), 1.0, valid=valid).value * (float(valid.sum()) / clips)
    distance = clip_error(u, prior).sum() / clips
    yield Loss(p.cost_weight * repulsion + p.kl_coef * distance, {"reference_distance": distance.detach()})


def train(cfg: Config, run: Run, model: TrainableModel, assess: Assessor, held_out: HeldOut) -> GuardWatch:
    p = cfg.policy
    score = differentiable(assess)
    check_policy(cfg, model)
    _, texts = feedback.training_prompts(cfg)
    pool = encode_prompts(model, texts)
    times = times_of(model, cfg.sampler)  # [K+1]
    model.network = add_lora(model.network, rank=p.lora_rank, alpha=p.lora_rank, targets=model.lora_targets, seed=cfg.seed)
    if cfg.shard:
        feedback.spread(run, model)
    optimizer = build_optimizer(model.network, "adamw", lr=p.lr, weight_decay=0.0)
    multipliers, watch = feedback.limits_of(cfg, assess)
    feedback.register(run, model, optimizer, multipliers, watch)
    sampler = PromptSampler(len(texts), p.prompts, seed=cfg.seed)
    clips = p.prompts * p.group_size
    batches = torch.arange(clips).split(p.micro_batch)
    own = run.share(range(len(batches)), "policy.micro_batch")
    mine = [batches[k] for k in own]

    for i in run.iterations(p.iterations, save_every=p.save_every, label="reward gradient"):
        looked = feedback.look(run, held_out, model, assess, watch, i, every=p.evaluate_every)

        # 1. Sample, the steps that are differentiated with their graph, and judge what came out.
        cond = pool[torch.tensor(sampler[i]).repeat_interleave(p.group_size)]  # B
        noise = run.noise(model.latents.shape(cfg.sampler.clip), clips, "rollout", i * clips)  # [B,C,F,H,W]
        drawn = draw(p, cfg.sampler.steps, run.generator("steps", i))
        made = in_threads(partial(clips_with_gradient, p, model, times, cond, noise, drawn), mine, run.device)  # [b,C,F,H,W] each
        seen = assess(feedback.decode(model, made), cond[torch.cat(mine)].prompts, gather=run.gather)
        if i == 0:
            selfcheck.known_rewards(seen.reward)
            selfcheck.reward_spread(seen.reward, p.group_size)

        # 2. Which clips may be made better, and which cost more than others of their prompt: the limit's advantages, of clips whose reward is alike.
        learned = seen.allowed & ~seen.unknown if cfg.constrained else ~seen.unknown  # [B]
        if multipliers is not None:
            feedback.dual_step(multipliers, seen)
        alike = Advantage(torch.zeros(clips), torch.ones(clips, dtype=torch.bool), {})
        limited = feedback.apply_limits(alike, seen, multipliers, cfg.safety, p.group_size)

        # 3. Noise every clip once, and ask the SFT policy.
        parts = [
            noised(p, model, rows, cond[rows], x0, run.generator("times", i * len(batches) + k), run.generator("frames", i))
            for k, rows, x0 in zip(own, mine, made, strict=True)
        ]
        with torch.no_grad(), reference(model.network):
            priors = in_threads(lambda each: model(each.x_t, each.t, each.cond), parts, run.device)  # [b,C,F,H,W] each
        if i == 0:
            feedback.check_velocity(model, parts[0].x_t, parts[0].t, parts[0].cond)

        # 4. Move the policy.
        price = 1.0 if multipliers is None else 1 + multipliers.total
        losses = run.backward_each(optimizer, partial(losses_of, p, run, model, score, learned, limited, price), list(zip(parts, priors, strict=True)))
        norm = run.step(optimizer, p.max_grad_norm)

        # 5. Tell.
        share = float(learned.float().mean())
        run.log(
            **feedback.rollout_stats(seen, p.group_size, multipliers),
            **looked,
            optimised_reward=sum(float(loss.stats.get("optimised_reward", 0.0)) for loss in losses) / share if share else math.nan,
            learned_share=share,
            reference_distance=sum(float(loss.stats.get("reference_distance", 0.0)) for loss in losses),
            grad_norm=norm,
            differentiated=drawn,
        )
    return watch


def differentiable(assess: Assessor) -> Score:
    """The reward as `reward_of` takes it, on the CPU. Raises UserError where one of its scorers may not be differentiated, or reads latents and not pixels."""
    mixture = assess.reward
    if not isinstance(mixture, Mixture):
        raise UserError("a latent reward reads the network that trains here, and is not differentiated, reward. Give a reward model on pixels, or use another recipe")
    for name in dict.fromkeys(term.scorer for term in mixture.terms):
        check_differentiable(mixture.scorers[name].differentiable, name)
    return lambda video, prompts: mixture(video.cpu(), prompts).reward


def check_policy(cfg: Config, model: VideoModel) -> None:
    """Raises UserError for guidance, and for more steps or frames than there are, before anything is loaded into a run."""
    p, frames = cfg.policy, model.latents.shape(cfg.sampler.clip)[1]
    feedback.check_unguided(cfg.sampler)
    if p.method == "draft" and p.last_steps > cfg.sampler.steps:
        raise UserError(f"policy.last_steps is {p.last_steps}, but a clip takes {cfg.sampler.steps} steps. Lower it or raise sampler.steps")
    if p.method == "vader" and p.frames > frames:
        raise UserError(f"policy.frames is {p.frames}, but a clip has {frames} latent frames. Lower it or raise sampler.frames")


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=feedback.metrics_of(cfg, METRICS))
    result = feedback.align(cfg, run, train, recipe="reward-gradient", reward=cfg.reward)
    return {**result, "wall_seconds": round(time.monotonic() - started, 1)}
