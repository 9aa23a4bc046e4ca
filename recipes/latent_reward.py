"""Distil a reward on pixels into a latent reward (`rushes latent-reward`): RL then scores clips without decoding them.

The model makes clips, and a store may give more; the reward on pixels scores each once, decoded. A head on the frozen denoiser's hidden states then learns these scores from
latents noised to any level. Differences between clips of one prompt are what RL learns from, so they count twice: by themselves, and within the squared error.

Where the reward is the small one, what it is the sum of (26 inputs: shape, motion, presence, quality, signals) is learned beside the score: a score alone does not say why it
is low. There a sight (`reward/sight.py`) learns first, and by itself: from the same noised latents, what the matcher's first layers make of the decoded pixels, and the inputs.
The head is then told these inputs, too, and begins as the reward model's own sum of them.

The spread learns by the likelihood of a Gaussian around the score, with the reward's own spread as noise in the target; a factor a noise level, fitted on the split val, makes
it honest on prompts not trained on. Agreement by noise level is measured on the split test, which nothing was chosen by.

Letters: N clips, P prompts of a step, b clips of a part of it, R dimensions, A inputs of the reward on pixels, Q noise levels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator
from scipy.stats import kendalltau, spearmanr
from torch import Tensor, nn

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Several, Share, Whole, dump
from align.data import PromptSampler
from align.objectives import Loss
from align.optimizers import build_optimizer, warmup_cosine
from align.progress import Progress
from align.run import Run, derived_seed
from base_model.checkpoint import load_weights, save_weights
from base_model.errors import UserError
from base_model.networks.packing import Segments
from base_model.paths import add_noise
from base_model.prompts.text import TextEncoder
from base_model.threads import in_threads
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import Conditioning
from base_model.video.store import ClipRow, ClipStore
from recipes.generate import Sampler, latent_shape, network_lineage, sample_with_latents
from recipes.scorers import card_hash, card_of, load_scorer, tier_of
from recipes.shapes.prompts import make_prompts
from recipes.statistics import Interval, bootstrap_mean, bootstrap_prompts
from recipes.weights import made_by
from reward.features import subsampled_chroma
from reward.latent import LatentReward, LatentSize, Seen, save_latent_reward
from reward.matcher import Matcher
from reward.model import CalibratedScorer, RewardModel

METRICS = {
    "loss": "Squared error of the score in variances of the training clips, the same of differences from the mean of the prompt's clips, and the terms of inputs, spread, sight.",
    "sight": "While the sight learns: mean squared error of pixel features told from latents, in their variances, over all noise levels and the iteration's steps.",
    "error": "While the head learns: the loss's first part: mean squared error in variances of the training clips, over all noise levels and the iteration's steps.",
    "grad_norm": "Norm of the gradient before clipping, mean over the steps.",
    "held_out_within": "Spearman's correlation of score and reward among the clips of one prompt, finished, mean over the prompts of the split val and the dimensions.",
}
PROMPTS_A_SHARD = 16
PARTS = 2
"""Of a step, side by side on the CPU's cores."""


class Reader(BaseConfig):
    """The head, see `reward/latent.py`."""

    after: tuple[int, ...] = (3,)
    """It reads the hidden states after so many of the denoiser's blocks."""
    width: Count = 64
    """Its width."""
    depth: Count = 1
    """Its blocks."""
    heads: Count = 4
    """Attention heads of a block."""
    sight: Count = 2
    """Blocks of the codec's decoder that the sight (`reward/sight.py`) begins with; of no effect where the reward is of another tier than the small one."""


class Fit(BaseConfig):
    """How the head learns."""

    sight: Count = 30
    """Iterations in which the sight learns, before the head does, where there is one."""
    sight_lr: Positive = 1e-3
    """Peak learning rate of the sight."""
    iterations: Count = 100
    """Times that denoiser and sight read clips for the head."""
    prompts: Count = 8
    """Prompts a step, with all their clips; the clips of a prompt are noised to one level."""
    steps: Count = 8
    """Steps' worth of clips that are noised and read at once."""
    passes: Count = 3
    """Steps on each of them, in another order every time: the denoiser costs several times what the head does."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW, after a warm-up, falling by a cosine."""
    decay: NonNegative = 0.05
    """Weight decay."""
    finished: Share = 0.4
    """Share of prompts whose clips are not noised; the others' levels are even over the path."""
    within: NonNegative = 1.0
    """Weight of differences within a prompt, beside the squared error."""
    inputs: NonNegative = 1.0
    """Weight of learning the inputs of the reward model beside its score; of no effect where the reward is of another tier."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    evaluate_every: Count = 20
    """Iterations between looks at the split val."""
    save_every: Count = 20
    """Iterations between checkpoints."""


class Config(BaseConfig):
    out: Path = Path("runs/latent-reward")
    """Folder of the run; `reward_model.safetensors` and `reward_card.json` appear in it."""
    model: Path | None = None
    """Network whose hidden states are read, and which makes the clips: the one RL will start from. None means the shipped base."""
    reward: Path = Path("runs/reward-model")
    """Folder of the reward on pixels to imitate, of any tier."""
    clips: Path | None = None
    """Clip store whose clips of the sampler's size are learned from, too, such as the ranked ones."""
    seed: Seed = 0
    """Seed of prompts, noise and weights."""
    prompts: Whole = 2_500
    """Prompts to make training clips of; 0 is for the clips of a store alone."""
    takes: Several = 8
    """Clips of each."""
    held_out: Several = 200
    """Further prompts, of combinations that no training prompt asks for: half of them for the spread (val), half for the agreement that is reported (test)."""
    captions: tuple[str, ...] = ()
    """Captions of real clips in place of the built-in world's prompts; the last quarter of them is held out."""
    two_objects: Share = 0.2
    """Share of prompts with two objects."""
    strobe: Share = 0.2
    """Share of prompts that ask for strobing in words the prompt filter lets pass."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""
    reader: Reader = Reader()
    """The head."""
    fit: Fit = Fit()
    """How it learns."""
    levels: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9)
    """Noise levels, as shares of the path, at which the spread is fitted and agreement is measured."""

    @field_validator("levels")
    @classmethod
    def _levels_ascend(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if list(levels) != sorted(set(levels)):
            raise ValueError(f"expected ascending levels, got {list(levels)}")
        return levels


# What the reward on pixels says


@dataclass(frozen=True)
class Teacher:
    """The reward to imitate. Where it is a sum of inputs, `weight` [A] says how much each of them counts, otherwise A is 0."""

    scorer: CalibratedScorer
    weight: Tensor

    @property
    def matcher(self) -> Matcher | None:
        """That of the small reward model, if it is the one."""
        return self.scorer.matcher if isinstance(self.scorer, RewardModel) else None

    @torch.no_grad()
    def look(self, video: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Clips [B,T,3,H,W] -> mean and spread [B,R], inputs [B,A]."""
        if not isinstance(self.scorer, RewardModel):
            scores = self.scorer(video, prompts)
            return {"mean": scores.mean, "spread": scores.spread, "inputs": scores.mean.new_zeros(len(video), 0)}
        inputs = self.scorer.standardised(self.scorer.inputs(video, prompts))  # [B,A]
        joint = self.scorer.joint_of(inputs)
        return {"mean": joint.mean, "spread": joint.covariance.diagonal(dim1=1, dim2=2).T.sqrt(), "inputs": inputs}


def load_teacher(folder: Path, text: TextEncoder, *, fps: float, device: torch.device) -> Teacher:
    """The reward in a folder, of any tier on pixels. Raises UserError where it cannot be used."""
    scorer = load_scorer(folder, fps=fps, encode=text, device=str(device))
    return Teacher(scorer, scorer.head.weight.abs().mean(0) if isinstance(scorer, RewardModel) else torch.zeros(0))


@dataclass(frozen=True)
class Scored:
    """Finished clips and what the reward on pixels says of them."""

    texts: tuple[str, ...]
    prompt: Tensor  # [N] row of `texts`
    x0: Tensor  # [N,C,F,H,W]
    mean: Tensor  # [N,R]
    spread: Tensor  # [N,R]
    inputs: Tensor  # [N,A]

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def groups(self) -> list[Tensor]:
        """The rows of each prompt."""
        return [rows for rows in (torch.nonzero(self.prompt == k)[:, 0] for k in range(len(self.texts))) if len(rows)]


def joined(texts: Sequence[str], parts: Sequence[Mapping[str, Tensor]]) -> Scored:
    """One table of all parts; what was scored nan is left out."""
    columns = {name: torch.cat([part[name] for part in parts]) for name in ("prompt", "x0", "mean", "spread", "inputs")}
    known = (torch.isfinite(columns["mean"]) & torch.isfinite(columns["spread"])).all(1)
    return Scored(tuple(texts), **{name: column[known] for name, column in columns.items()})


def kept(folder: Path, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` found, written under the hash of all it depends on: a killed run goes on, and another one with the same clips finds them."""
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"
    if not path.exists():
        save_weights(path, make(), {})
    return load_weights(path)[0]


def make_scored(cfg: Config, run: Run, model: LatentVideoModel, teacher: Teacher, texts: Sequence[str], split: str) -> Scored:
    """`takes` clips of every prompt, scored; processes share the prompts, and read what the others found."""
    origin = {"network": network_lineage(cfg.model), "reward": card_hash(cfg.reward), "sampler": dump(cfg.sampler)}

    def make(first: int, some: Sequence[str]) -> dict[str, Tensor]:
        cond = model.encode_text(some).repeat(cfg.takes)
        found: list[dict[str, Tensor]] = []
        for x0, video in sample_with_latents(model, cond, seeds(first, len(some)), cfg.sampler):
            rows = slice(at := sum(len(part["x0"]) for part in found), at + len(x0))
            found.append({"x0": x0.cpu(), **teacher.look(video, cond.prompts[rows])})
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def seeds(first: int, number: int) -> list[int]:
        return [derived_seed(cfg.seed, f"latent reward, {split}", first * cfg.takes + k) % 2**31 for k in range(number * cfg.takes)]

    def shard(first: int) -> dict[str, Tensor]:
        some = texts[first : first + PROMPTS_A_SHARD]
        part = kept(cfg.out / "scored", {**origin, "texts": list(some), "seeds": seeds(first, len(some))}, partial(make, first, some))
        return {**part, "prompt": first + torch.arange(len(some)).repeat_interleave(cfg.takes)}

    return joined(texts, by_shards(run, shard, range(0, len(texts), PROMPTS_A_SHARD), f"clips to learn from ({split})"))


def by_shards(run: Run, shard: Callable[[int], dict[str, Tensor]], firsts: Sequence[int], label: str) -> list[dict[str, Tensor]]:
    """All shards, each made by one process and kept, so that the others read it."""
    mine, made = run.share(firsts), dict[int, dict[str, Tensor]]()
    with Progress(label, total=len(mine), quiet=run.quiet) as progress:
        for first in mine:
            made[first] = shard(first)
            progress.advance()
    run.gather([len(mine)])  # all are there
    return [made[first] if first in made else shard(first) for first in firsts]


def stored_scored(cfg: Config, run: Run, model: LatentVideoModel, teacher: Teacher, folder: Path, without: set[str]) -> Scored:
    """The clips of a store that have the sampler's size and whose prompt is none of `without`, scored. Raises UserError where there is none."""
    store, size = ClipStore(folder), (cfg.sampler.frames, cfg.sampler.height, cfg.sampler.width)
    rows = [row for row in store.rows() if (row.num_frames, row.height, row.width) == size and row.prompt not in without]
    if not rows:
        raise UserError(f"no clip of {cfg.sampler.clip} to learn from among the {len(store)} of the store, {folder}. Give --clips another store, or the sampler that made this one")
    run.note("clips", hashlib.sha256("\n".join(row.clip_id for row in rows).encode()).hexdigest())
    texts = list(dict.fromkeys(row.prompt for row in rows))
    reward = card_hash(cfg.reward)

    def make(some: Sequence[ClipRow]) -> dict[str, Tensor]:
        video = torch.stack([store.load(row.clip_id) for row in some])  # [b,T,3,H,W]
        return {"x0": model.encode(video).cpu(), **teacher.look(video, [row.prompt for row in some])}

    def shard(first: int) -> dict[str, Tensor]:
        some = rows[first : first + PROMPTS_A_SHARD * cfg.takes]
        part = kept(cfg.out / "scored", {"reward": reward, "clips": [row.clip_id for row in some], "texts": [row.prompt for row in some]}, partial(make, some))
        return {**part, "prompt": torch.tensor([texts.index(row.prompt) for row in some])}

    return joined(texts, by_shards(run, shard, range(0, len(rows), PROMPTS_A_SHARD * cfg.takes), "clips of the store"))


def together(a: Scored, b: Scored) -> Scored:
    """Both; a prompt of both is two prompts."""
    columns = {name: torch.cat([getattr(a, name), getattr(b, name)]) for name in ("x0", "mean", "spread", "inputs")}
    return Scored((*a.texts, *b.texts), torch.cat([a.prompt, b.prompt + len(a.texts)]), **columns)


def prompts_of(cfg: Config) -> dict[str, list[str]]:
    """The prompts of each split. Raises UserError where captions are too few to hold any out."""
    if cfg.captions:
        held = len(cfg.captions) // 4
        if held < 2:
            raise UserError(f"{len(cfg.captions)} captions are too few to hold a quarter of them out. Give at least 8, captions")
        train, rest = list(cfg.captions[:-held]), list(cfg.captions[-held:])
    else:
        shares = {"two_objects": cfg.two_objects, "strobe": cfg.strobe}
        train = [prompt.text for prompt in make_prompts(cfg.prompts, seed=cfg.seed + 30, split="train", **shares)] if cfg.prompts else []
        rest = [prompt.text for prompt in make_prompts(cfg.held_out, seed=cfg.seed + 31, split="eval", **shares)]
    return {"train": train, "val": rest[: len(rest) // 2], "test": rest[len(rest) // 2 :]}


def learn_from(cfg: Config, run: Run, model: LatentVideoModel, teacher: Teacher) -> dict[str, Scored]:
    """The scored clips of each split. Raises UserError where there is nothing to learn from."""
    texts = prompts_of(cfg)
    if not texts["train"] and cfg.clips is None:
        raise UserError("nothing to learn from: no prompts and no clips. Give --prompts 2500, or --clips a clip store")
    found = {split: make_scored(cfg, run, model, teacher, some, split) for split, some in texts.items() if some}
    if cfg.clips is None:
        run.note("clips", None)
    else:
        stored = stored_scored(cfg, run, model, teacher, cfg.clips, {*texts["val"], *texts["test"]})
        found["train"] = together(found["train"], stored) if "train" in found else stored
    if len(found["train"].groups) < cfg.fit.prompts * cfg.fit.steps:
        read_at_once = cfg.fit.prompts * cfg.fit.steps
        raise UserError(f"{len(found['train'].groups)} training prompts are fewer than fit.prompts x fit.steps, {read_at_once}. Lower these, or give more prompts")
    return found


# Learning


class Part(NamedTuple):
    """Some prompts of a step: their clips, noised, and what the denoiser makes of them."""

    rows: Tensor  # [b]
    segments: Segments  # clips of each prompt
    cond: Conditioning  # b
    x_t: Tensor  # [b,C,F,H,W]
    t: Tensor  # [b]
    seen: Seen


class Learning(nn.Module):
    """What learns: the latent reward and, beside it, a reader of the inputs of the reward on pixels, if there are any."""

    def __init__(self, scorer: LatentReward, inputs: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.inputs = nn.Linear(scorer.told, inputs) if inputs else None

    @property
    def head(self) -> nn.Module:
        """All of it but the sight."""
        parts = (self.scorer.head, self.scorer.mean, self.scorer.log_spread, self.scorer.trust, self.inputs)
        return nn.ModuleList([part for part in parts if part is not None])


def start(cfg: Config, model: LatentVideoModel, teacher: Teacher, train: Scored) -> Learning:
    """A fresh head whose every score is the mean of the training clips or, with a sight, the reward model's own sum of what that tells.

    Raises UserError for sizes that do not fit the network.
    """
    size, card = LatentSize(**dump(cfg.reader)), teacher.scorer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(cfg.seed, "latent head", 0))
        try:
            levels = [level * model.path.t_max for level in cfg.levels]
            scorer = LatentReward(model, size, card.dims, levels=levels, most_clips=card.log_tie.shape[-1] + 1, matcher=teacher.matcher)
        except ValueError as error:
            raise UserError(f"reader: {error}") from error
        learning = Learning(scorer, len(teacher.weight))
    with torch.no_grad():
        for name in ("temperature", "center", "scale", "log_tie"):
            getattr(scorer, name).copy_(getattr(card, name))
        for linear, bias in ((scorer.mean, train.mean.mean(0)), (scorer.log_spread, deviations(train).log())):
            linear.weight.zero_()
            linear.bias.copy_(bias)
        if scorer.sight is not None and isinstance(card, RewardModel):
            for own, its in ((scorer.sight.match_mean, card.input_mean), (scorer.sight.match_std, card.input_std)):
                own.copy_(its[: len(own)])
            scorer.mean.weight[:, 2 * size.width :] = card.head.weight / card.temperature[:, None]
            scorer.mean.bias.zero_()
    return learning.to(model.device)


def deviations(train: Scored) -> Tensor:
    """Standard deviation of the reward over the training clips [R]."""
    return train.mean.std(0, correction=0).clamp_min(1e-3)


def noise_levels(fit: Fit, t_max: float, prompts: int, generator: torch.Generator) -> Tensor:
    """One level a prompt [P]: none for `finished` of them, else one in each of P even strata of the path, in random order."""
    t = t_max * (torch.randperm(prompts, generator=generator) + torch.rand(prompts, generator=generator)) / prompts
    return torch.where(torch.rand(prompts, generator=generator) < fit.finished, 0.0, t)


def noised(cfg: Config, scorer: LatentReward, train: Scored, groups: Sequence[Tensor], cond: Conditioning, chosen: Sequence[int], generator: torch.Generator) -> list[Part]:
    """The clips of the chosen prompts, noised and not yet read, in `PARTS` parts a step."""
    model, parts = scorer.model, []
    for step in torch.arange(len(chosen)).split(cfg.fit.prompts):
        levels = noise_levels(cfg.fit, model.path.t_max, len(step), generator)
        for some in torch.arange(len(step)).tensor_split(min(PARTS, len(step))):
            members = [groups[chosen[int(step[k])]] for k in some]
            rows, segments = torch.cat(members), Segments(tuple(map(len, members)))  # [b]
            t, x0 = segments.spread(levels[some]), train.x0[rows]
            x_t = add_noise(model.path, x0, torch.randn(x0.shape, generator=generator), t)
            parts.append(Part(rows, segments, cond[train.prompt[rows]], x_t.to(model.device), t.to(model.device), Seen(torch.empty(0), torch.empty(0))))
    return parts


@torch.no_grad()
def read(scorer: LatentReward, parts: Sequence[Part]) -> list[Part]:
    """The same with what the head is told of them."""
    told = in_threads(lambda part: scorer.seen(part.x_t, part.t, part.cond), parts, scorer.model.device)
    return [part._replace(seen=seen) for part, seen in zip(parts, told, strict=True)]


def part_loss(fit: Fit, learning: Learning, train: Scored, weight: Tensor, scale: Tensor, clips: int, part: Part) -> Iterator[Loss]:
    """The loss of a part, as its share of a step of `clips`. weight [A] of the inputs, scale [R] of the rewards."""
    scorer, device = learning.scorer, part.x_t.device
    reward, doubt, inputs = (column[part.rows].to(device) for column in (train.mean, train.spread, train.inputs))
    summary = scorer.summary(part.seen, part.x_t, part.t, part.cond)  # [b,2w+A]
    mean, spread = scorer.read(summary, part.t)  # [b,R]
    error = (mean - reward) / scale.to(device)  # [b,R]
    miss = (mean.detach() - reward).square() + doubt.square()  # [b,R]
    value = squares(fit, error, part.segments) + (spread.log() + miss / (2 * spread.square())).mean()
    if learning.inputs is not None:
        value = value + fit.inputs * weighted(learning.inputs(summary) - inputs, weight)
    yield Loss(value * len(part.rows) / clips, {"error": error.detach().square().mean() * len(part.rows) / clips})


def squares(fit: Fit, error: Tensor, segments: Segments) -> Tensor:
    """Squared error of clips [b,R] and, weighted, that of differences from the prompt's mean."""
    inside = error - segments.spread(segments.mean(error))  # [b,R]
    return error.square().mean() + fit.within * inside.square().mean()


def weighted(error: Tensor, weight: Tensor) -> Tensor:
    """Squared error of inputs [b,A], each by its weight [A]."""
    return (error.square() @ weight.to(error)).mean() / weight.sum()


def sight_loss(fit: Fit, scorer: LatentReward, train: Scored, teacher: Teacher, scale: Tensor, clips: int, part: Part) -> Iterator[Loss]:
    """The loss of the sight on a part, as its share of a step of `clips`: squared errors of the pixel features, in their variances, of the inputs, and of their sum as a score."""
    device = part.x_t.device
    assert scorer.sight is not None and isinstance(teacher.scorer, RewardModel)
    there = teacher.scorer.head.weight.device
    reward, inputs = (column[part.rows].to(device) for column in (train.mean, train.inputs))  # [b,R], [b,A]
    with torch.no_grad():
        video = scorer.model.decode(train.x0[part.rows].to(device)).to(there)  # [b,T,3,H,W]
        target = teacher.scorer.matcher.see(subsampled_chroma(video)).to(device)  # [b,T,c,h,w]
    features, found = scorer.sight(part.x_t, part.t, part.cond)
    miss = ((features - target).square().mean((0, 1, 3, 4)) / target.var((0, 1, 3, 4), correction=0).clamp_min(1e-4)).mean()
    told = (teacher.scorer.head(found.to(there)) / teacher.scorer.temperature).to(device)  # [b,R]
    error = (told - reward) / scale.to(device)  # [b,R]
    value = miss + squares(fit, error, part.segments) + fit.inputs * weighted(found - inputs, teacher.weight)
    yield Loss(value * len(part.rows) / clips, {"sight": miss.detach() * len(part.rows) / clips})


def train_head(cfg: Config, run: Run, learning: Learning, teacher: Teacher, train: Scored, val: Scored) -> None:
    """Sight, if there is one, then head."""
    fit, scorer = cfg.fit, learning.scorer
    groups, cond, scale = train.groups, scorer.model.encode_text(train.texts), deviations(train)
    before = 0 if scorer.sight is None else fit.sight
    optimizer = build_optimizer(learning.head, "adamw", lr=fit.lr, weight_decay=fit.decay)
    schedule = warmup_cosine(optimizer, fit.iterations * fit.steps * fit.passes)
    for name, thing in (("learning", learning), ("optimizer", optimizer), ("schedule", schedule)):
        run.register(name, thing)
    if scorer.sight is not None:
        sight_optimizer = build_optimizer(scorer.sight.stem, "adamw", lr=fit.sight_lr, weight_decay=fit.decay)
        sight_schedule = warmup_cosine(sight_optimizer, fit.sight * fit.steps)
        for name, thing in (("sight_optimizer", sight_optimizer), ("sight_schedule", sight_schedule)):
            run.register(name, thing)
    sampler = PromptSampler(len(groups), fit.prompts * fit.steps, seed=cfg.seed)
    for i in run.iterations(before + fit.iterations, save_every=fit.save_every, label="latent reward"):
        generator, first = run.generator("noise", i), i < before
        parts = noised(cfg, scorer, train, groups, cond, sampler[i], generator)
        steps = [parts[k : k + PARTS] for k in range(0, len(parts), PARTS)]
        own = [run.share(step) for step in steps]
        if not first:
            told = iter(read(scorer, [part for step in own for part in step]))
            own = [[next(told) for _ in step] for step in own]
        losses, norms = [], []
        for k in torch.cat([torch.randperm(len(steps), generator=generator) for _ in range(1 if first else fit.passes)]).tolist():
            clips = sum(len(part.rows) for part in steps[k])
            if first:
                losses += run.backward_each(sight_optimizer, partial(sight_loss, fit, scorer, train, teacher, scale, clips), own[k])
                norms.append(run.step(sight_optimizer, fit.max_grad_norm, sight_schedule))
            else:
                losses += run.backward_each(optimizer, partial(part_loss, fit, learning, train, teacher.weight, scale, clips), own[k])
                norms.append(run.step(optimizer, fit.max_grad_norm, schedule))
        if (i + 1) % fit.evaluate_every == 0 or i + 1 == before + fit.iterations:
            found, _ = predictions(scorer, val, 0.0, run.generator("looks", 0))
            within = float(np.nanmean([np.nanmean(list(inside(spearman, *columns).values())) for columns in by_dimension(found, val)]))
            stats = {name: torch.stack([loss.stats[name] for loss in losses]).sum() / len(norms) for name in losses[0].stats}
            run.log(loss=torch.stack([loss.value for loss in losses]).sum() / len(norms), held_out_within=within, grad_norm=sum(norms) / len(norms), **stats)


# Measuring


@torch.no_grad()
def predictions(scorer: LatentReward, scored: Scored, t: float, generator: torch.Generator, *, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and spread [N,R] of clips noised to t."""
    cond, found = scorer.model.encode_text(scored.texts), []
    for rows in torch.arange(len(scored)).split(batch):
        x0 = scored.x0[rows]
        level = torch.full((len(rows),), t)
        x_t = add_noise(scorer.model.path, x0, torch.randn(x0.shape, generator=generator), level)
        found.append(scorer(x_t.to(scorer.model.device), level.to(scorer.model.device), cond[scored.prompt[rows]]))
    return torch.cat([each.mean for each in found]).cpu(), torch.cat([each.spread for each in found]).cpu()


def misses(scored: Scored, mean: Tensor, spread: Tensor) -> Tensor:
    """How far the reward on pixels may lie from a score, in spreads, as a root mean square [R]: 1 where the spread is honest."""
    return (((scored.mean - mean).square() + scored.spread.square()) / spread.square()).mean(0).sqrt()


@torch.no_grad()
def widen(run: Run, scorer: LatentReward, val: Scored) -> None:
    """Fits the factor of the spread at each level."""
    scorer.widening.fill_(1.0)
    found = [misses(val, *predictions(scorer, val, float(t), run.generator("val", k))) for k, t in enumerate(scorer.levels)]
    scorer.widening.copy_(torch.stack(found))  # [Q,R]


Columns = tuple[Sequence[float], Sequence[float], Sequence[int]]
Correlation = Callable[[Sequence[float], Sequence[float]], float]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """nan where one of them is constant, or of one clip."""
    return float(spearmanr(a, b).statistic) if len(a) > 1 and min(np.ptp(a), np.ptp(b)) > 0 else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """tau-b; nan where one of them is constant, or of one clip."""
    return float(kendalltau(a, b).statistic) if len(a) > 1 and min(np.ptp(a), np.ptp(b)) > 0 else math.nan


def by_dimension(found: Tensor, scored: Scored) -> list[Columns]:
    """Of each dimension: scores, rewards and prompts of N clips."""
    prompts = scored.prompt.tolist()
    return [(found[:, r].tolist(), scored.mean[:, r].tolist(), prompts) for r in range(found.shape[1])]


def inside(correlation: Correlation, found: Sequence[float], reward: Sequence[float], prompts: Sequence[int]) -> dict[int, float]:
    """prompt -> correlation among its clips."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return {prompt: correlation([found[k] for k in some], [reward[k] for k in some]) for prompt, some in rows.items()}


def agreement(found: Sequence[float], reward: Sequence[float], prompts: Sequence[int]) -> dict[str, Interval]:
    """Rank correlations of scores with the reward on pixels over all clips and, as a mean over prompts, among the clips of one; 95 % intervals resample prompts."""
    a, b, cluster = np.asarray(found), np.asarray(reward), np.asarray(prompts)
    told: dict[str, Interval] = {}
    for name, correlation in (("spearman", spearman), ("kendall", kendall)):
        told[name] = bootstrap_prompts(lambda rows, correlation=correlation: correlation(a[rows], b[rows]), cluster)  # type: ignore[misc]
        told[f"{name}_within"] = bootstrap_mean(list(inside(correlation, found, reward, prompts).values()))
    return told


def measure(run: Run, scorer: LatentReward, test: Scored) -> list[dict[str, Any]]:
    """One row a noise level and dimension."""
    rows = []
    for k, t in enumerate(scorer.levels.tolist()):
        mean, spread = predictions(scorer, test, t, run.generator("test", k))
        honest = misses(test, mean, spread)
        for r, (dim, columns) in enumerate(zip(scorer.dims, by_dimension(mean, test), strict=True)):
            told = {name: interval.as_json() for name, interval in agreement(*columns).items()}
            rows.append({"t": round(t, 6), "dim": dim, **told, "spread": float(spread[:, r].mean()), "miss_in_spreads": float(honest[r])})
    return rows


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Scores clips, learns, measures; writes weights and card into `out`."""
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    model = load_tiny(cfg.model).to(run.device)
    model.network.eval().requires_grad_(False)
    latent_shape(model, cfg.sampler.clip)
    teacher = load_teacher(cfg.reward, model.text, fps=cfg.sampler.fps, device=run.device)
    run.note("model", network_lineage(cfg.model))
    run.note("reward", card_hash(cfg.reward))
    scored = learn_from(cfg, run, model, teacher)
    learning = start(cfg, model, teacher, scored["train"])
    train_head(cfg, run, learning, teacher, scored["train"], scored["val"])
    card = run.on_main(partial(measured_and_saved, cfg, run, learning.scorer.eval(), scored))
    return {"out": str(cfg.out), "seconds": card["seconds"], "clips": card["clips"], "agreement": card["measured"]}


def measured_and_saved(cfg: Config, run: Run, scorer: LatentReward, scored: Mapping[str, Scored]) -> dict[str, Any]:
    """The card of what was learned, written beside it."""
    widen(run, scorer, scored["val"])
    facts = {
        "measured": measure(run, scorer, scored["test"]),
        "prompts": {split: len(some.groups) for split, some in scored.items()},
        "clips": {split: len(some) for split, some in scored.items()},
        "distilled_from": {"tier": tier_of(card_of(cfg.reward)), "card_sha256": card_hash(cfg.reward)},
        "network_sha256": network_lineage(cfg.model),
        "sampler": dump(cfg.sampler),
        "seed": cfg.seed,
        "seconds": round(run.seconds, 1),
        **made_by("latent-reward", cfg),
    }
    return save_latent_reward(cfg.out, scorer, facts)
