"""What RL is told about the clips it made: reward, graded safety cost, and what the hard gate forbids. Shared by the RL recipes.

Letters: B clips, N prompts, G clips a prompt.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor, nn

from align import selfcheck
from align.advantage import Advantage
from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Share, Whole
from align.constraints import Multiplier, Multipliers, all_violating, constrained_advantage, gate
from align.kernels import ODE, Gaussian, Kernel
from align.objectives import Loss
from align.run import Run, derived_seed
from align.trajectory import Trajectory, replay, rollout
from base_model.checkpoint import save_weights
from base_model.errors import GuardStop, UserError
from base_model.guidance import Guided
from base_model.lora import adapter_state, load_adapter_state, reference
from base_model.prompts.text import TextEncoder
from base_model.threads import in_threads
from base_model.tiny import LatentVideoModel
from base_model.types import Conditioning, TrainableModel, VideoModel
from recipes import guards
from recipes.filters import Filters
from recipes.generate import Sampler, check_sampler, safety_runner, sample_with_latents, times_of
from recipes.guards import Guards
from recipes.guards import GuardWatch as GuardWatch
from recipes.models import built_in, encode_prompts, load_model, model_lineage, reward_text, save_policy
from recipes.scorers import card_hash, card_of, check_watches_another, load_scorer, tier_of
from recipes.shapes.prompts import make_prompts
from recipes.weights import file_hash
from reward import latent
from reward.latent import LatentMixture
from reward.mirror import swap_sides
from reward.mixture import Mixed, Mixture, Term
from reward.model import Calibrated, CalibratedScorer
from reward.safety.audit import latest_review, load_audit
from reward.safety.contract import Decision, SafetyRunner, Verdict, allowed, check_error_rate, costs
from reward.safety.correction import UNKNOWN, Corrected, by_audit, by_error_rates
from reward.safety.measure import MINIMUM, ErrorRates

Gather = Callable[[Iterable[Any]], list[Any]]  # `Run.gather`

FLASHING = "P17"

METRICS = {
    "reward": "Reward model's pessimistic score (mean minus spread, standardised) of the rollout's clips; unknown scores left out.",
    "violation_rate": "Share of the rollout's clips the safety filters block, or leave to people for flashing, before any filter is applied; clips no filter could judge left out.",
    "cost": "Mean graded cost of the rollout's clips, in [0, 1]: 0.5 where the filter's limit is.",
    "limited_rate": "Violation rate that the multiplier compares with its target: a running mean of what the filters say, corrected where people audited them.",
    "goodhart": "1 where the filters say that the target is kept and audits say that the limit is broken: the filters are gamed, or blind.",
    "multiplier": "Weight lambda of the safety cost in the advantage.",
    "all_violating": "Share of prompts whose clips all violate.",
    "error_share": "Share of clips whose reward is unknown, or whose cost though the filters looked; they are masked.",
    "looked_at": "1 where the safety filters saw the rollout's clips; 0 in an unconstrained run with a latent reward, which decodes none of them.",
    "held_out_reward": "The same score of held-out prompts' clips, from the deterministic sampler and fixed noise. Captions that are given are looked at and trained on.",
    "held_out_guard": "Guard's score (other labelers, other seed) of the same held-out clips; never optimised.",
    "held_out_violation_rate": "Share of the held-out clips that the safety filters block, or leave to people for flashing; clips no filter could judge left out.",
    "kl_per_element": "KL from the SFT policy before the update, nats per latent element; where it is in no loss, of every eighth clip (in ddpo of one step).",
    "kl_total": "The same, nats per clip: per element times the number of latent elements.",
    "grad_norm": "Norm of the gradient before clipping, mean over the updates.",
    "ratio": "Importance ratio (per latent element), mean over clips and steps.",
    "clip_share": "Share of clips and steps whose ratio left the clip range.",
    "zero_std_share": "Share of groups (or prompts) whose rewards are all alike and say nothing.",
    **guards.METRICS,
}


class PolicyLimit(BaseConfig):
    """A limit that reviewers set on what a policy forbids, and how RL is held to it."""

    limit: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Largest share of violating clips that may be reported."""
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share that the multiplier aims at; none means a quarter of the limit."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = None
    """Compare an upper bound of this confidence with the target, in place of the rate; none means the rate itself."""
    rate: Positive = 0.15
    """Step of the multiplier, in log space."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """What the running mean, which is compared, keeps of itself from rollout to rollout: the more, the more clips it rests on."""
    warm_up: Whole = 0
    """So many first rollouts are only measured, while the multiplier stays where it begins."""
    proportional: NonNegative = 0.0
    """Damps the swings of the multiplier, in log space: this times how far the rate is off its target, relative to the larger of both, on top of what `rate` adds up."""
    derivative: NonNegative = 0.0
    """The same of how much farther off it is than a rollout ago."""
    initial: Annotated[float, Field(ge=1e-3)] = 1.0
    """First multiplier."""
    cap: Positive = 3.0
    """Largest multiplier: with more, the reward counts for nothing while a few prompts always violate. What is blocked is never learned from as good at any."""

    @model_validator(mode="after")
    def _initial_is_below_the_cap(self) -> PolicyLimit:
        if self.initial > self.cap:
            raise ValueError(f"initial is {self.initial:g}, above the cap of {self.cap:g}. Raise cap or lower initial")
        return self

    @model_validator(mode="after")
    def _aims_within_the_limit(self) -> PolicyLimit:
        if self.target is not None and self.target > self.limit:
            raise ValueError(f"target is {self.target:g}, above the limit of {self.limit:g}. Lower target")
        return self

    def multiplier(self, policy: str, correct: Correction | None = None) -> Multiplier:
        """correct: what takes the place of the rate, and of its bound."""
        return Multiplier(
            policy,
            limit=self.limit,
            target=self.target,
            rate=self.rate,
            decay=self.decay,
            warm_up=self.warm_up,
            proportional=self.proportional,
            derivative=self.derivative,
            initial=self.initial,
            cap=self.cap,
            confidence=None if correct else self.confidence,
            correct=correct,
        )


class SafetyLimit(PolicyLimit):
    """The limit on flashing and on whatever is blocked under policies without limits of their own, and how RL is held to it."""

    audit: Path | None = None
    """Folder of an audit of this policy's clips (`rushes audit`), read when a run begins or resumes: the rate that people would find is compared, not what the filters say."""
    error_rates: tuple[Count, Count, Count, Count] | None = None
    """The same by what is known of the filters from before: hits of so many violating clips, rejections of so many harmless ones. Not together with `audit`."""
    gate: Annotated[float, Field(lt=0)] = -1.0
    """The advantage of a clip that violates is at most this, before the division by 1 + all multipliers, where another clip of its prompt does not."""

    @model_validator(mode="after")
    def _is_corrected_once(self) -> SafetyLimit:
        if self.audit is not None and self.error_rates is not None:
            raise ValueError("audit and error_rates: both correct the rate. Give one of them")
        if self.error_rates is not None and (self.error_rates[0] > self.error_rates[1] or self.error_rates[2] > self.error_rates[3]):
            raise ValueError("error_rates: hits and rejections are of so many. Give hits, violating, rejections, harmless")
        return self


class Setting(BaseConfig):
    """What every recipe that moves a policy is told: where it starts, who watches, which limit holds. A recipe adds `out` and `policy`."""

    may_change = BaseConfig.may_change | {"shard"}

    seed: Seed = 0
    """Seed of prompts and noise."""
    model: Path | None = None
    """What to start from and to stay near: a network of the built-in model, or an open family by a folder that diffusers saved, a short name (wan2.1-1.3b) or owner/name on the
    hub; none means the shipped base."""
    nf4: bool = False
    """Attention and mlp of a family's frozen network in four bits: less memory, a little slower."""
    recompute: Share = 0.0
    """Share of a family's blocks whose activations a backward pass computes again: less memory, at most a third more time."""
    shard: bool = False
    """Spreads a family's frozen weights over the processes (FSDP2), where one device has no room for them; the adapter stays whole."""
    guard: Path | None = None
    """Folder of a second reward model that watches and may stop the run."""
    captions: tuple[str, ...] = ()
    """Captions of real clips, trained on and, the first of them, looked at in place of the built-in world's prompts; `prompt_pool`, `two_objects` and `strobe` then say nothing."""
    prompt_pool: Count = 400
    """Training prompts to draw from."""
    two_objects: Share = 0.2
    """Share of them with two objects."""
    strobe: Share = 0.2
    """Share of them that ask for strobing in words the prompt filter lets pass."""
    held_out_prompts: Count = 64
    """Held-out prompts looked at during the run; of captions at most so many, and none is held out: all are trained on."""
    constrained: bool = True
    """Whether the safety limit holds; false is for the comparison only. With a latent reward the filters then see the held-out clips alone."""
    safety: SafetyLimit = SafetyLimit()
    """The limit."""
    limits: dict[str, PolicyLimit] = Field(default_factory=dict)
    """Limits on further policies by their codes, '{P14: {limit: 0.01}}', with the keys of `safety` but audit, error_rates and gate: each has a multiplier of its own, whose cost is
    what the filters say of that policy."""
    filters: Filters = Filters()
    """Safety filters beside those that need no weights; the larger score of a policy is its cost."""
    pessimism: NonNegative = 0.5
    """Reward is the mean minus this many spreads of the reward model."""
    dimensions: dict[str, FiniteFloat] | None = None
    """What the reward model's dimensions weigh, each in standard deviations of its training clips; none means the first one alone."""
    guard_drop: Positive = 0.5
    """The guard's light is red when its score falls this far (in standard deviations of its scores) below its best; amber from half of it."""
    guards: Guards = Guards()
    """What watches the run beside its reward."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""

    @model_validator(mode="after")
    def _something_weighs(self) -> Setting:
        if self.dimensions is not None and not any(self.dimensions.values()):
            raise ValueError("dimensions: none weighs anything. Give one a weight, or leave dimensions out")
        return self

    @model_validator(mode="after")
    def _one_limit_a_policy(self) -> Setting:
        if FLASHING in self.limits:
            raise ValueError(f"limits: that on {FLASHING} is `safety`. Set it there")
        return self


class Feedback(Setting):
    """The same for a recipe that goes after a reward model's score."""

    reward: Path = Path("runs/reward-model")
    """Folder of a reward model, or of a latent reward, which decodes nothing: under the limit clips are decoded for the filters all the same."""


class UnderPolicy(NamedTuple):
    """What the filters say of B clips under one policy."""

    cost: Tensor  # [B] in [0,1], graded; nan where they failed
    violates: Tensor  # [B] 1 where one blocks, or leaves to people, else 0; nan where they failed


@dataclass(frozen=True)
class Assessment:
    """Example: B = 4 clips, the third flashing, the fourth blank: `reward` [0.2, 1.1, 0.9, 0.4], `cost` [0.02, 0.03, 0.9, 0.02], `violates` [0, 0, 1, 0],
    `allowed` [T, T, F, F], `left` [0, 0, 0, 0]."""

    reward: Tensor  # [B]; nan where unknown
    cost: Tensor  # [B] in [0,1], graded; nan where the filters failed, or saw nothing
    violates: Tensor  # [B] 1 where a filter blocks (under no policy of `further`) or withholds for flashing, else 0; nan where the filters failed, or saw nothing
    allowed: Tensor  # [B] bool; only these may be learned from as good
    left: Tensor  # [B] 1 where what violates is left to people, for no filter blocks it, else 0; nan as `violates`
    looked_at: bool = True  # by the filters
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # by dimension [B], before its weight, where several make the reward
    further: Mapping[str, UnderPolicy] = field(default_factory=dict)  # by policy, beside flashing, that has a limit

    @property
    def violation_rate(self) -> float:
        """Share of the clips that were judged; nan where none was."""
        return float(self.violates.nanmean())

    @property
    def unknown(self) -> Tensor:
        """Clips without a reward, and those the filters looked at in vain [B] bool."""
        costs = torch.stack([self.cost, *(each.cost for each in self.further.values())])  # [1+k,B]
        return self.reward.isnan() | (costs.isnan().any(0) & self.looked_at)

    @property
    def violating(self) -> Tensor:
        """Clips that violate any policy that has a limit, or are blocked for another [B] bool."""
        return torch.stack([self.violates == 1, *(each.violates == 1 for each in self.further.values())]).any(0)

    def rates(self, prefix: str = "") -> dict[str, float]:
        """Share of the judged clips that violate each further policy, as metrics; nan where none was judged."""
        return {f"{prefix}violation_rate_{policy}": float(each.violates.nanmean()) for policy, each in self.further.items()}


@dataclass
class Assessor:
    """Scores and rules on clips. Raises GuardStop where the filters fail on more than `max_error_share` of a batch, or, where they are not asked, that many have no score.

    looks: whether the filters are asked about finished latents too, whose reward needs no pixels. What is decoded is shown to them in any case.
    Several processes each ask about their own clips and, with `gather`, are told about all of them.
    """

    reward: Mixture | LatentMixture | None  # None where nobody scores: every reward is then unknown
    runner: SafetyRunner
    fps: float
    max_error_share: float = 0.05
    looks: bool = True
    dimensions: Sequence[str] = ()  # of the reward that are told apart
    limited: Sequence[str] = ()  # policies, beside flashing, that have a limit

    @torch.no_grad()
    def finished(self, model: TrainableModel, x0: Sequence[Tensor], cond: Conditioning, video: Tensor | None = None, *, gather: Gather = list) -> Assessment:
        """Finished latents of B clips in batches [b,C,F,H,W], decoded where somebody looks at pixels; video: [B,T,3,H,W] where they are decoded already."""
        if not isinstance(self.reward, LatentMixture):
            return self(decode(model, x0) if video is None else video, cond.prompts, gather=gather)
        rows = torch.arange(len(cond)).split([len(part) for part in x0])
        scores = joined([self.reward(part, cond[row]) for part, row in zip(x0, rows, strict=True)])
        if video is None and not self.looks:
            scores = joined(gather([scores]))
            unknown = torch.full_like(scores.reward, torch.nan)
            check_known(scores.reward, self.max_error_share)
            return Assessment(scores.reward, unknown, unknown, torch.zeros(len(unknown), dtype=torch.bool), unknown, looked_at=False, parts=self.apart(scores))
        return self.ruled(scores, decode(model, x0) if video is None else video, cond.prompts, gather=gather)

    @torch.no_grad()
    def __call__(self, video: Tensor, prompts: Sequence[str], *, gather: Gather = list) -> Assessment:
        """video [B,T,3,H,W] in [0,1] of B prompts. Raises ValueError where the reward is a latent one, which cannot score pixels."""
        if isinstance(self.reward, LatentMixture):
            raise ValueError("a latent reward cannot score pixels: give the latents to `finished`")
        nobody = torch.ones(len(video), dtype=torch.bool)
        scores = Mixed(torch.full((len(video),), torch.nan), {}, nobody) if self.reward is None else self.reward(video, prompts)
        return self.ruled(scores, video, prompts, gather=gather)

    def ruled(self, scores: Mixed, video: Tensor, prompts: Sequence[str], *, gather: Gather = list) -> Assessment:
        """Rewards of clips [B,T,3,H,W] with what the filters say of them."""
        decisions = gather(self.runner.check_videos(video, prompts, self.fps))
        scores = joined(gather([scores]))
        check_error_rate(decisions, self.max_error_share)
        others = [without(d, self.limited) for d in decisions]
        known = torch.tensor([Verdict.ERROR not in (d.verdict, other.verdict) for d, other in zip(decisions, others, strict=True)])
        counts = torch.tensor([float(withheld(d)) for d in others])
        left = torch.tensor([float(withheld(d) and d.verdict != Verdict.BLOCK) for d in others])
        may = torch.tensor([allowed(d) for d in decisions])
        further = {policy: UnderPolicy(costs(decisions, policy), torch.tensor([violation(d, policy) for d in decisions])) for policy in self.limited}
        told = scores.reward, costs(decisions, FLASHING), counts.where(known, torch.nan), may, left.where(known, torch.nan)
        return Assessment(*told, parts=self.apart(scores), further=further)

    def apart(self, scores: Mixed) -> dict[str, Tensor]:
        named = {name.partition(".")[2]: part for name, part in scores.parts.items()}
        return {name: named[name] for name in self.dimensions}


def joined(parts: Sequence[Mixed]) -> Mixed:
    """What the clips of several batches earned, one after the other."""
    reward, unknown = (torch.cat([getattr(part, name) for part in parts]) for name in ("reward", "unknown"))
    return Mixed(reward, {name: torch.cat([part.parts[name] for part in parts]) for name in parts[0].parts}, unknown)


def withheld(decision: Decision) -> bool:
    """Whether a clip counts against the limit on flashing: it is blocked, or a filter that is not sure leaves it to people under that policy."""
    return decision.verdict == Verdict.BLOCK or violation(decision, FLASHING) == 1


def without(decision: Decision, policies: Sequence[str]) -> Decision:
    """What is left of a decision without the rulings under these policies."""
    return Decision(tuple(ruling for ruling in decision.rulings if ruling.policy not in policies)) if policies else decision


def violation(decision: Decision, policy: str) -> float:
    """1 where a filter blocks a clip under this policy, or leaves it to people, else 0; nan where the decision is an error, or a filter of this policy failed and none objects."""
    verdicts = {ruling.verdict for ruling in decision.rulings if ruling.policy == policy}
    if verdicts & {Verdict.BLOCK, Verdict.REVIEW}:
        return 1.0
    return math.nan if Verdict.ERROR in (*verdicts, decision.verdict) else 0.0


def check_known(reward: Tensor, limit: float) -> None:
    """Raises GuardStop where more than `limit` of the rewards [B] are unknown: latents that are not finite must not pass for clips."""
    failed = int(reward.isnan().sum())
    if failed > limit * len(reward):
        raise GuardStop(f"no reward for {failed} of {len(reward)} clips (limit {limit:.1%}): their latents are not finite. Lower policy.lr, then begin again in another --out")


def apply_limits(advantage: Advantage, seen: Assessment, multipliers: Multipliers | None, limit: SafetyLimit, group_size: int) -> Advantage:
    """The advantage under the constraints: costs weighed by their multipliers, then the hard gate, and nothing that is not allowed learned from as good.

    Without multipliers only unknown costs are masked. Raises ValueError where a limit is to be kept and nobody looked at the clips.
    """
    if multipliers is None:
        valid = advantage.valid & ~seen.unknown
        return advantage._replace(advantage=advantage.advantage.where(valid, 0), valid=valid)
    if not seen.looked_at:
        raise ValueError("a limit is to be kept, and the filters were not asked about these clips")
    bounded = constrained_advantage(advantage.advantage, costs_of(seen), multipliers, group_size, valid=advantage.valid)
    gated = gate(bounded.advantage, seen.violating & bounded.valid, group_size, limit.gate / (1 + multipliers.total))
    return bounded._replace(advantage=torch.where(seen.allowed, gated, gated.clamp_max(0)))


def costs_of(seen: Assessment) -> dict[str, Tensor]:
    """The graded costs [B] of every policy that has a limit."""
    return {FLASHING: seen.cost, **{policy: each.cost for policy, each in seen.further.items()}}


def dual_step(multipliers: Multipliers, seen: Assessment) -> None:
    """One step of the multipliers from a rollout, all ranks'."""
    flashing = multipliers[FLASHING]
    if isinstance(flashing.correct, Correction):
        flashing.correct.update(seen.left, flashing.decay)
    multipliers.update({FLASHING: seen.violates, **{policy: each.violates for policy, each in seen.further.items()}})


def rollout_stats(seen: Assessment, group_size: int, multipliers: Multipliers | None) -> dict[str, float]:
    """The metrics of one rollout."""
    flashing = None if multipliers is None else multipliers[FLASHING]
    return {
        "reward": float(seen.reward.nanmean()),
        "violation_rate": seen.violation_rate,
        "cost": float(seen.cost.nanmean()),
        "limited_rate": math.nan if flashing is None else flashing.bound,
        "goodhart": float(gamed(flashing)) if flashing is not None else math.nan,
        "multiplier": 0.0 if flashing is None else flashing.value,
        "all_violating": all_violating(seen.violates == 1, group_size) if seen.looked_at else float("nan"),
        "error_share": float(seen.unknown.float().mean()),
        "looked_at": float(seen.looked_at),
        **{f"reward_{name}": float(part.nanmean()) for name, part in seen.parts.items()},
        **seen.rates(),
        **{name: value for policy, each in seen.further.items() for name, value in policy_told(policy, each, group_size, multipliers).items()},
    }


def policy_told(policy: str, seen: UnderPolicy, group_size: int, multipliers: Multipliers | None) -> dict[str, float]:
    """The metrics of a further policy in one rollout, beside its rate."""
    multiplier = None if multipliers is None else multipliers[policy]
    return {
        f"limited_rate_{policy}": math.nan if multiplier is None else multiplier.bound,
        f"cost_{policy}": float(seen.cost.nanmean()),
        f"multiplier_{policy}": 0.0 if multiplier is None else multiplier.value,
        f"all_violating_{policy}": all_violating(seen.violates == 1, group_size),
    }


def metrics_of(cfg: Setting, metrics: Mapping[str, str]) -> dict[str, str]:
    """A recipe's metrics, with one for every dimension of the reward where there are several, and those of further limits."""
    found = {**metrics, **{f"reward_{name}": f"Mean of the reward's dimension {name}, before its weight: pessimistic, standardised." for name in told_apart(cfg)}}
    for policy in cfg.limits:
        found[f"violation_rate_{policy}"] = f"Share of the rollout's clips that a filter blocks under {policy}, or leaves to people; clips no filter could judge left out."
        found[f"held_out_violation_rate_{policy}"] = "The same of the held-out clips."
        found[f"limited_rate_{policy}"] = f"What the multiplier of {policy} compares with its target: the running mean of that rate, or its upper bound."
        found[f"cost_{policy}"] = f"Mean graded cost of the rollout's clips under {policy}, in [0, 1]."
        found[f"multiplier_{policy}"] = "Weight lambda of that cost in the advantage."
        found[f"all_violating_{policy}"] = f"Share of prompts whose clips all violate {policy}."
    return found


def told_apart(cfg: Setting) -> tuple[str, ...]:
    """The dimensions of the reward where there are several."""
    return tuple(cfg.dimensions) if cfg.dimensions and len(cfg.dimensions) > 1 else ()


def gamed(multiplier: Multiplier) -> bool:
    """Whether what the filters say keeps the target while the rate that an audit makes of it breaks the limit."""
    correct, cost = multiplier.correct, multiplier.cost
    if not isinstance(correct, Correction) or not correct.audited or cost is None or cost > multiplier.target:
        return False
    return correct.of(cost, multiplier.clips).rate > multiplier.limit


class Look(NamedTuple):
    """What the held-out clips were at one look."""

    told: dict[str, float]  # metrics
    video: Tensor  # [P,T,3,H,W], a clip of each of P prompts
    guard: Tensor | None  # [P] the guard's scores; None where there is no guard


@dataclass
class HeldOut:
    """Fixed held-out prompts and noise, sampled now and then to watch the run: reward and guard now, the judge when the run is over.

    Clips are kept as `held_out/<iteration>.safetensors` (uint8 "video") for the report; nothing that trains reads them.
    """

    prompts: Sequence[str]
    cond: Conditioning
    sampler: Sampler
    guard: Mixture | None
    seed: int
    folder: Path

    def watch(self, model: TrainableModel, assess: Assessor, iteration: int) -> Look:
        """Samples, keeps and scores the held-out clips."""
        seeds = [derived_seed(self.seed, "held out", k) % 2**31 for k in range(len(self.cond))]
        x0, clips = zip(*sample_with_latents(model, self.cond, seeds, self.sampler), strict=True)
        video = torch.cat(clips)  # [B,T,3,H,W]
        save_weights(self.folder / f"{iteration:06d}.safetensors", {"video": (video * 255).round().to(torch.uint8)}, {})
        seen = assess.finished(model, x0, self.cond, video)
        with torch.no_grad():
            guard = None if self.guard is None else self.guard(video, self.prompts).reward  # [B]
        told = {
            "held_out_reward": float(seen.reward.nanmean()),
            "held_out_guard": float("nan") if guard is None else float(guard.nanmean()),
            "held_out_violation_rate": seen.violation_rate,
            **seen.rates("held_out_"),
        }
        return Look(told, video, guard)


def guided(model: VideoModel, sampler: Sampler, *, train_empty: bool = True) -> Guided:
    """The policy under the sampler's guidance (the model itself where that is 1), its empty prompt encoded before batches go side by side."""
    policy = Guided(model, sampler.guidance, train_empty)
    if sampler.guidance != 1:
        policy.unprompted  # noqa: B018
    return policy


def check_first_step(policy: VideoModel, kernel: Kernel, taken: Trajectory, reward: Tensor, group_size: int) -> None:
    """Before the first update: rewards are known and differ, the replayed step is what was sampled and its ratio is 1, in the rollout's own batch and in another split, the KL has
    a gradient, and the fresh adapter changes nothing."""
    step, half = taken.steps()[0], in_half_precision(policy.network)
    selfcheck.known_rewards(reward)
    selfcheck.reward_spread(reward, group_size)
    now = replay(policy, kernel, step, taken.cond)
    with reference(policy.network), torch.no_grad():
        prior = replay(policy, kernel, step, taken.cond)
    selfcheck.fresh_adapter(now.mean, prior.mean, half=half)
    selfcheck.kl_gradient(now, prior, policy.network.parameters())
    selfcheck.first_residual(now, step.x_next)
    selfcheck.first_ratio(now.log_prob(step.x_next), step.log_prob, same_batches=len(step.rows) == len(taken.cond), half=half)
    with torch.no_grad():
        part = step.select(slice((len(step.rows) + 1) // 2))
        now = replay(policy, kernel, part, taken.cond)
        selfcheck.first_ratio(now.log_prob(part.x_next), part.log_prob, same_batches=False, half=half)


def in_half_precision(network: nn.Module) -> bool:
    """Whether any of its weights, and so what it computes, is bfloat16 or float16; an adapter on it may not be."""
    return any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in network.parameters())


def check_first_velocity(model: TrainableModel, x_t: Tensor, t: Tensor, cond: Conditioning, u_old: Tensor, prior: Tensor) -> None:
    """The same where no step has a density: the velocity of noised clips x_t [b,C,F,H,W] at t [b] is the remembered one, equal to the reference's `prior`, and their distance has a
    gradient."""
    u = model(x_t, t, cond)
    one, half = torch.ones((), device=u.device), in_half_precision(model.network)
    selfcheck.first_velocity(u, u_old, half=half)
    selfcheck.fresh_adapter(u_old, prior, half=half)
    selfcheck.kl_gradient(Gaussian(u, one), Gaussian(prior, one), model.network.parameters())


def eighth(clips: int) -> Tensor:
    """Which of so many clips the distance from the SFT policy is measured on where no loss asks for it: every eighth, [ceil(clips / 8)]."""
    return torch.arange(0, clips, 8)


@torch.no_grad()
def reference_distance(model: TrainableModel, x_t: Tensor, t: Tensor, cond: Conditioning, sampled_by: Callable[[], AbstractContextManager[object]]) -> float:
    """Mean squared distance of the velocity from the SFT policy's, per latent element, of noised clips x_t [b,C,F,H,W] at t [b]; sampled_by: switches to the policy that is asked
    about."""
    with sampled_by():
        u = model(x_t, t, cond)
    with reference(model.network):
        return float((u - model(x_t, t, cond)).square().mean())


def check_velocity(model: TrainableModel, x_t: Tensor, t: Tensor, cond: Conditioning) -> None:
    """`check_first_velocity` where nothing of these clips is remembered yet: policy and reference are asked now."""
    with torch.no_grad():
        u_old = model(x_t, t, cond)
        with reference(model.network):
            prior = model(x_t, t, cond)
    check_first_velocity(model, x_t, t, cond, u_old, prior)


def limits_of(cfg: Setting, assess: Assessor) -> tuple[Multipliers | None, GuardWatch]:
    """The multipliers (none in an unconstrained run) and the watch over what must not change."""
    safety, limits = cfg.safety, cfg.limits if cfg.constrained else {}
    watch = GuardWatch(cfg.guards, drop=cfg.guard_drop, limit=safety.limit if cfg.constrained else 1.0, further={policy: each.limit for policy, each in limits.items()})
    if not cfg.constrained:
        return None, watch
    correct = correction_of(safety, assess.runner.clip_filters)
    return Multipliers([safety.multiplier(FLASHING, correct), *(each.multiplier(policy) for policy, each in limits.items())]), watch


def check_judged(limits: Iterable[str], runner: SafetyRunner) -> None:
    """Raises UserError where no filter can object to a clip under a policy that has a limit."""
    judged = runner.clip_policies
    for policy in limits:
        if policy not in judged:
            told = f"no filter blocks clips under {policy}, or leaves them to people, limits"
            raise UserError(f"{told}. Limits can be set on {', '.join(sorted(judged - {FLASHING})) or 'nothing'}. Add a filter with --filters, or leave the limit out")


@dataclass
class Correction:
    """What a multiplier compares in place of the share of withheld clips: the corrected rate, or its upper bound. It keeps a running mean of those left to people,
    as the multiplier does of all."""

    found: Callable[[float, float, float], Corrected]  # of blocked clips, of those left to people, of so many
    bound: bool
    audited: bool  # by clips of this policy that people read
    left: float | None = None  # share of all clips

    def __call__(self, share: float, clips: float) -> float:
        found = self.of(share, clips)
        return found.upper if self.bound or math.isnan(found.rate) else found.rate

    def of(self, share: float, clips: float) -> Corrected:
        """What `share` of so many clips, withheld, stands for."""
        left = min(self.left or 0.0, share) * clips  # but for rounding never more
        return self.found(min(share * clips, clips) - left, left, clips)

    def update(self, left: Tensor, decay: float) -> None:
        """Which clips of one rollout are left to people [B]; unknown ones (nan) are left out."""
        if not bool(left.isnan().all()):
            now = float(left.double().nanmean())
            self.left = now if self.left is None else decay * self.left + (1 - decay) * now


def correction_of(safety: SafetyLimit, clip_filters: str) -> Correction | None:
    """None where nothing is known of the filters' errors. Raises UserError for an audit that says nothing of these filters, and for error rates that tell nothing."""
    confidence, bound = safety.confidence or 0.95, safety.confidence is not None
    if safety.error_rates is not None:
        rates = ErrorRates(*safety.error_rates)
        if by_error_rates(0, 1, rates) == UNKNOWN:
            raise UserError(f"safety.error_rates: filters that are right in {rates[0]} of {rates[1]} and {rates[2]} of {rates[3]} clips tell nothing. Audit the policy's own clips")
        return Correction(lambda blocked, left, clips: by_error_rates(min(blocked + left, clips), clips, rates, confidence=confidence), bound, audited=False)
    if safety.audit is None:
        return None
    review = latest_review(load_audit(safety.audit), clip_filters, FLASHING)
    if review is None:
        needed = f"{MINIMUM.reviewed} blocked and {MINIMUM.reviewed} passed clips, or all where there are fewer"
        told = f"no wave of clips of the filters {clip_filters} was read, {safety.audit}: {needed}"
        raise UserError(f"{told}. Draw one with `rushes audit {safety.audit} --clips STORE` and have it read")
    return Correction(lambda blocked, left, clips: by_audit(blocked, clips, review, left=left, confidence=confidence), bound, audited=True)


@dataclass(frozen=True)
class Remembered:
    """A multiplier with what its correction knows, under one name: an audit may come, or go, when a run resumes."""

    multiplier: Multiplier

    def state_dict(self) -> dict[str, Any]:
        correct = self.multiplier.correct
        return {**self.multiplier.state_dict(), "left": correct.left if isinstance(correct, Correction) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.multiplier.load_state_dict(state)
        if isinstance(self.multiplier.correct, Correction):
            self.multiplier.correct.left = state.get("left")


def register(run: Run, model: TrainableModel, optimizer: Any, multipliers: Multipliers | None, watch: GuardWatch) -> None:
    """Everything an RL run must find again when it resumes, and the forward-pass counter."""
    run.register("network", model.network, trainable_only=True)
    run.register("optimizer", optimizer)
    run.register("guard_watch", watch)
    for multiplier in multipliers or ():
        run.register("multiplier" if multiplier.policy == FLASHING else f"multiplier_{multiplier.policy.lower()}", Remembered(multiplier))
    run.count_forwards(model.network)


def spread(run: Run, model: TrainableModel) -> None:
    """Spreads a family's frozen weights over the processes, before its optimizer is built; the adapter stays whole. Raises UserError for the built-in model."""
    if isinstance(model, LatentVideoModel):
        raise UserError("the built-in network is small enough for every process, shard. Leave it out, or give --model a checkpoint that diffusers saved")
    run.shard(model.network, frozen=True)


def idle_clip(run: Run, model: TrainableModel, sampler: Sampler, pool: Conditioning) -> tuple[Tensor, Tensor, Conditioning]:
    """What a pass that teaches nothing is made of: noise x [1,C,F,H,W], where sampling begins, t [1], and the first prompt of a pool, 1."""
    return run.noise(model.latents.shape(sampler.clip), 1, "idle", 0), times_of(model, sampler)[:1].to(run.device), pool[:1]


def idle_pass(model: VideoModel, x: Tensor, t: Tensor, cond: Conditioning) -> None:
    """A pass of clips x [b,C,F,H,W] at t [b] that teaches nothing, and back where gradients are wanted: so a process keeps pace with others (`Run.keep_pace`)."""
    retrace(model, model(x, t, cond))


def retrace(model: VideoModel, found: Tensor) -> None:
    """The way back through the passes that `found` was made by, for nothing."""
    if found.requires_grad:
        torch.autograd.grad(found.sum(), [parameter for parameter in model.network.parameters() if parameter.requires_grad], allow_unused=True)


def look(run: Run, held_out: HeldOut, model: TrainableModel, assess: Assessor, watch: GuardWatch, iteration: int, *, every: int) -> dict[str, float]:
    """Every `every` rollouts: the held-out metrics, the guards' light, and the end of the run where it is red. Else nothing."""
    with run.looking():
        told = {} if iteration % every else watch_over(run, watch, held_out, model, assess, iteration)
    if watch.fallen:
        run.stop()
    run.remark(watch.said)
    return told


def watch_over(run: Run, watch: GuardWatch, held_out: HeldOut, model: TrainableModel, assess: Assessor, iteration: int) -> dict[str, float]:
    """The metrics of a look, those of the guards among them, if they watch; `watch.fallen` then says whether the run is to end."""

    def looked() -> tuple[dict[str, float], dict[str, Tensor]]:
        seen = held_out.watch(model, assess, iteration)
        if not watch.guards.watch:
            return seen.told, {}
        return seen.told, guards.measure(watch.guards, seen.video, seen.guard, model, held_out.cond, held_out.sampler, held_out.seed)

    with run.whole():
        told, values = run.on_main(looked)
    if not watch.guards.watch:
        return told
    further = {policy: told[f"held_out_violation_rate_{policy}"] for policy in watch.further}
    reading = watch.take(values, told["held_out_violation_rate"], adapter_state(model.network), further=further)
    if run.is_main:
        guards.write_history(run.out, iteration, reading)
    return told | reading.metrics


def roll_out_clean(model: VideoModel, times: Tensor, cond: Conditioning, noise: Tensor, rows: Tensor) -> Trajectory:
    """The clips `rows` of B, from noise [B,C,F,H,W], by the deterministic sampler."""
    return rollout(model, ODE(), noise[rows], times, cond[rows], noise=torch.Generator())


def last_look(run: Run, held_out: HeldOut, model: TrainableModel, assess: Assessor, watch: GuardWatch) -> dict[str, float]:
    """A look after the loop and, where the run fell, the way back to the best adapter and a look at that: the metrics of what is kept, logged."""
    with run.looking():
        looked = watch_over(run, watch, held_out, model, assess, run.iteration)
        run.log(**looked)
        if watch.fallen and watch.best:
            load_adapter_state(model.network, watch.best)
            with run.whole():
                looked = run.on_main(lambda: held_out.watch(model, assess, run.iteration).told)
            run.log(**looked)
    return looked


@torch.no_grad()
def decode(model: VideoModel, x0: Sequence[Tensor]) -> Tensor:
    """The clips of all batches of finished latents [b,C,F,H,W], [B,T,3,H,W] on the CPU where they are scored."""
    return torch.cat(in_threads(lambda part: model.decode(part).cpu(), x0, x0[0].device))


def mean_of(values: Sequence[Tensor]) -> float:
    """Mean of what clips or micro-batches say, [] or [b] each; nan where there was none to learn from."""
    return float(torch.cat([value.flatten() for value in values]).mean()) if values else float("nan")


def known_stats(loss: Loss, valid: Tensor) -> dict[str, Tensor]:
    """What a micro-batch says of its clips: nothing where none is valid [b], for a mean over no clips is no 0."""
    return loss.stats if bool(valid.any()) else {}


def mean_stat(losses: Sequence[Mapping[str, Tensor]], name: str) -> float:
    """`mean_of` a statistic of the micro-batches that told it."""
    return mean_of([stats[name] for stats in losses if name in stats])


def policy_stats(losses: Sequence[Mapping[str, Tensor]], kl: float, latent_elements: int, grad_norm: float) -> dict[str, float]:
    """The metrics of one update."""
    return {
        "kl_per_element": kl,
        "kl_total": kl * latent_elements,
        "grad_norm": grad_norm,
        "ratio": mean_stat(losses, "policy/ratio"),
        "clip_share": mean_stat(losses, "policy/clip_share"),
    }


class StoppedByGuard(GuardStop):
    """The guard ended the run; everything is saved and `result` says what was reached."""

    def __init__(self, message: str, result: dict[str, object]) -> None:
        super().__init__(message)
        self.result = result


def check_unguided(sampler: Sampler) -> None:
    """Raises UserError where guidance is asked for and the velocity that is regressed is that of the model alone."""
    if sampler.guidance != 1:
        why = "but here a model learns its own clips' velocity, and a guided clip is not its own: what guidance gives, RL teaches the model itself"
        raise UserError(f"sampler.guidance is {sampler.guidance:g}, {why}. Give 1, or use ddpo or grpo")


def check_steps(sampler: Sampler) -> None:
    """Raises UserError where no step could take noise (the last one never does)."""
    if sampler.steps < 2:
        raise UserError(f"sampler.steps is {sampler.steps}, but a policy learns from noisy steps and the last one has none. Give at least 2")


def encode_all(encode: TextEncoder, *prompts: Sequence[str]) -> None:
    """Encodes prompts as they are and with their sides swapped, for a reward model looks at every clip mirrored, too. The states of a prompt depend, in their last bits, on what it
    is encoded with: left to the rollouts, they would depend on where the run was resumed."""
    for texts in prompts:
        encode(texts)
    encode([swap_sides(text) for texts in prompts for text in texts])


C = TypeVar("C", bound=Setting)
Train = Callable[[C, Run, TrainableModel, Assessor, HeldOut], GuardWatch]


def training_prompts(cfg: Setting) -> tuple[list[str], list[str]]:
    """Ids and texts of the prompts to train on."""
    if cfg.captions:
        return list(cfg.captions), list(cfg.captions)
    pool = make_prompts(cfg.prompt_pool, seed=cfg.seed, split="train", two_objects=cfg.two_objects, strobe=cfg.strobe)
    return [prompt.prompt_id for prompt in pool], [prompt.text for prompt in pool]


def held_out_texts(cfg: Setting) -> list[str]:
    """Prompts of held-out combinations (the first captions where clips are real: there are too few to hold any out)."""
    if cfg.captions:
        return list(cfg.captions[: cfg.held_out_prompts])
    return [prompt.text for prompt in make_prompts(cfg.held_out_prompts, seed=cfg.seed + 1, split="eval", strobe=cfg.strobe)]


def standardised(scorer: CalibratedScorer, pessimism: float = 0.0, dimensions: Mapping[str, float] | None = None) -> Mixture:
    """A reward model in standard deviations of its training clips: its first dimension, or those that weigh something, added up. Raises UserError for one that it has not."""
    return Mixture({"people": scorer}, people_terms(scorer, pessimism, dimensions))


def people_terms(scorer: Calibrated, pessimism: float, dimensions: Mapping[str, float] | None) -> tuple[Term, ...]:
    """The terms of `standardised`."""
    weights, known = dimensions or {scorer.dims[0]: 1.0}, {dim: (float(center), float(scale)) for dim, center, scale in zip(scorer.dims, scorer.center, scorer.scale, strict=True)}
    if strange := sorted(set(weights) - set(known)):
        raise UserError(f"the reward has no dimension {', '.join(strange)}, dimensions. Choose from {', '.join(known)}")
    return tuple(Term("people", dim, weight, *known[dim], pessimism) for dim, weight in weights.items())


def load_reward(
    folder: Path, model: TrainableModel, pessimism: float, fps: float, encode: TextEncoder | None = None, dimensions: Mapping[str, float] | None = None
) -> Mixture | LatentMixture:
    """The reward in a folder, each dimension in standard deviations of its training clips, minus `pessimism` spreads: of a reward model on pixels, or of a latent reward on
    `model`, whose network has no adapter yet. encode: what a reward model reads prompts with. dimensions: their weights; none means the first one alone. Raises UserError where
    it cannot be used."""
    if tier_of(card_of(folder)) != latent.TIER:
        return standardised(load_scorer(folder, fps=fps, encode=encode or reward_text(model)), pessimism, dimensions)
    scorer = latent.load_latent_reward(folder, built_in(model, f"a latent reward, {folder},"))
    return LatentMixture(scorer, people_terms(scorer, pessimism, dimensions))


def note_given(cfg: Setting, run: Run, reward: Path | None) -> None:
    """What the paths of the configuration hold, wherever that lies: a run goes on with the same. Raises UserError where it was begun with another."""
    run.note("model", run.on_main(lambda: model_lineage(cfg.model)))
    run.note("reward", card_hash(reward))
    run.note("guard", card_hash(cfg.guard))
    run.note("hazard", guards.hazard_version(cfg.guards))


def align(cfg: C, run: Run, train: Train[C], *, recipe: str, reward: Path | None) -> dict[str, object]:
    """Loads the model, the scorers and the filters, trains, looks once more, and saves the policy (`models.py`). reward: folder of a reward model.

    Several processes share the clips of a rollout; the first one looks at the held-out prompts and saves. Raises StoppedByGuard, after saving, where the guard ended the run.
    """
    runner = safety_runner(cfg.filters)
    check_judged(cfg.limits, runner)
    model = load_model(cfg.model, device=run.device, nf4=cfg.nf4, recompute=cfg.recompute, fps=cfg.sampler.fps)
    check_sampler(model, cfg.sampler)
    encode = reward_text(model)
    guard = standardised(load_scorer(cfg.guard, fps=cfg.sampler.fps, encode=encode)) if cfg.guard else None
    if cfg.guard and reward:
        check_watches_another(cfg.guard, reward)
    if cfg.dimensions and not reward:
        raise UserError("dimensions weigh a reward model, and none is given. Add --reward FOLDER, or leave dimensions out")
    note_given(cfg, run, reward)
    texts = held_out_texts(cfg)
    held_out = HeldOut(texts, encode_prompts(model, texts), cfg.sampler, guard, cfg.seed, run.out / "held_out")
    scorer = load_reward(reward, model, cfg.pessimism, cfg.sampler.fps, encode, cfg.dimensions) if reward else None
    assess = Assessor(scorer, runner, cfg.sampler.fps, looks=cfg.constrained, dimensions=told_apart(cfg), limited=tuple(cfg.limits))
    run.note("safety", assess.runner.lineage())
    if isinstance(scorer, LatentMixture) and not cfg.constrained and run.is_main:
        print(f"{recipe}: no limit is kept and the reward needs no pixels: the safety filters see the held-out clips alone", file=sys.stderr, flush=True)
    _, prompts = training_prompts(cfg)
    encode_all(encode, prompts, texts)
    watch = train(cfg, run, model, assess, held_out)

    looked = last_look(run, held_out, model, assess, watch)
    data = hashlib.sha256("\n".join(prompts).encode()).hexdigest()

    def saved() -> tuple[Path, str]:
        file = save_policy(model, run.out, source=cfg.model, recipe=recipe, cfg=cfg, data=data, seconds=run.seconds, measured=looked, safety=assess.runner.lineage())
        return file, file_hash(file)

    weights, sha256 = run.on_main(saved)
    result = {"weights": str(weights), "sha256": sha256, "stopped_by_guard": bool(watch.fallen), "forward_passes": run.forward_passes, **looked}
    if watch.said:
        result["guards"] = watch.said
    if watch.fallen:
        kept = "the best checkpoint that kept the limit is saved" if watch.best else "the last state is saved"
        raise StoppedByGuard(f"the guards' light was {watch.fallen}; {kept}, {weights}. Look at {run.out / guards.FILE}", result)
    return result
