"""Supervised fine-tuning on captioned clips of mixed sizes and lengths, packed into one sequence a step (`rushes sft`).

Flow matching on the model's own path (Lipman et al. 2022, arXiv 2210.02747, eq. 14), one noise level a clip, mean per clip. Full fine-tuning, or LoRA merged at the end.
Some clips give part of themselves as a visual prompt (`conditions`): those tokens have noise level 0 and no loss.
What it leaves out: gradient checkpointing, several resolutions of one clip.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share, Whole
from align.data import PackSampler
from align.ema import EMA
from align.objectives import Loss
from align.objectives.regression import clip_error, flow_matching, packed_clip_error
from align.optimizers import OptimizerName, build_optimizer, warmup_cosine
from align.run import Run
from base_model.lora import add_lora, merge
from base_model.networks.packing import kept_tokens, pack, take_tokens, token_grid
from base_model.networks.routing import choose_route, middle
from base_model.paths import add_noise
from base_model.prompts.conditions import Canvas, Kind, draw_given, encode_known, token_mask
from base_model.times import quantile_times, stratified_logit_normal
from base_model.tiny import LatentVideoModel, load_tiny, packed_text, save_network
from base_model.types import ClipShape
from recipes.filters import read_lineage
from recipes.pairs import Pairs, encode_pairs, load_pairs
from recipes.shapes.dataset import draw_clips
from recipes.weights import file_hash, write_card

METRICS = {
    "loss": "Flow-matching error, mean over the elements of a clip, then over the clips of the step; unit velocity^2 per latent element.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of this step.",
    "clips": "Clips in the packs of the step.",
    "tokens": "Latent tokens in the packs of the step, before any are dropped.",
    "held_out_loss": "Flow-matching error of held-out curated clips at fixed noise quantiles, on the averaged weights.",
    "held_out_loss_low_noise": "The same, at the quarter of the quantiles with the least noise.",
    "held_out_loss_high_noise": "The same, at the quarter of the quantiles with the most noise.",
}


class Fit(BaseConfig):
    """How a denoiser is fitted to captioned clips."""

    iterations: Count
    """Optimizer steps."""
    lr: Positive
    """Peak learning rate, warmed up, then a cosine."""
    capacity: Count = 2048
    """Latent tokens a pack may hold."""
    packs: Count = 2
    """Packs of a step: the batch size, said in tokens, is `packs` times `capacity`. On a CPU every core has a pack of its own."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, `adamw8bit` (bitsandbytes), or `muon`: fewer steps from a fresh network."""
    text_dropout: Share = 0.1
    """Share of clips trained without their caption, so that guidance is possible."""
    conditions: dict[Kind, Share] = Field(default={})
    """Visual prompts to learn: kind (image, head, tail, ends, hole, margin) -> share of the clips that give that of themselves. The rest have their text alone."""
    condition_noise: Share = 0.0
    """What is given is noised to a level of its own, drawn up to this one and told: above 0, the model takes given frames less literally."""
    token_drop: Share = 0.0
    """Largest share of its tokens that a clip is trained without; each clip draws its own, uniform from 0. No loss there."""
    routed: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each clip's tokens that skip the middle blocks in training (TREAD); sampling uses all. 0 routes none."""
    time_shift: Positive = 3.0
    """Shift s of the training times: logit-normal(log s, 1); above 1 looks more at noise."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are what is saved."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    held_out: Count = 128
    """Held-out clips for the held-out loss."""
    evaluate_every: Count = 50
    """Iterations between held-out losses."""
    save_every: Count = 50
    """Iterations between checkpoints."""

    @field_validator("conditions")
    @classmethod
    def _shares_fit_into_one(cls, conditions: dict[Kind, float]) -> dict[Kind, float]:
        if sum(conditions.values()) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(conditions.values()):g}, expected at most 1")
        return conditions


class Config(BaseConfig):
    out: Path = Path("runs/sft")
    """Folder of the run; the network ends up in `network.safetensors` there."""
    seed: Seed = 0
    """Seed of data and noise."""
    base: Path | None = None
    """Network to start from; none means the shipped base."""
    pairs: Path | None = None
    """Folder of captioned clips (`recipes/pairs.py`); none draws `clips` curated ones from the built-in world."""
    clips: Count = 4_000
    """Curated pairs of native sizes to draw."""
    lora_rank: Whole = 0
    """Rank of a LoRA adapter that is merged at the end; 0 trains every weight."""
    fit: Fit = Fit(iterations=250, lr=5e-4)
    """How the network is fitted."""


@torch.no_grad()
def held_out_errors(model: LatentVideoModel, pairs: Pairs, generator: torch.Generator, *, quantiles: int = 8) -> Tensor:
    """Error of every clip at fixed noise quantiles, [quantiles,B], least noise first. Clips of one size only."""
    x0 = torch.stack(pairs.latents).to(model.device)  # [B,C,F,H,W]
    eps = torch.randn(x0.shape, generator=generator).to(model.device)
    cond = model.encode_text(pairs.texts)
    errors = []
    for t in quantile_times(model.path, quantiles):
        times = t.expand(len(x0)).to(model.device)  # [B]
        u = model(add_noise(model.path, x0, eps, times), times, cond)
        errors.append(clip_error(u, model.path.velocity(x0, eps, times)))
    return torch.stack(errors)


def held_out_losses(model: LatentVideoModel, pairs: Pairs, generator: torch.Generator, *, quantiles: int = 8) -> Tensor:
    """Mean of `held_out_errors` over the clips, [quantiles]."""
    return torch.stack([errors.mean() for errors in held_out_errors(model, pairs, generator, quantiles=quantiles)])


def packed_conditions(fit: Fit, model: LatentVideoModel, pairs: Pairs, rows: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What the clips `rows` give of themselves, each a kind at random: (values of the given tokens [N,c], which tokens those are [N])."""
    kinds, shares = list(fit.conditions), torch.tensor([*fit.conditions.values(), max(0.0, 1 - sum(fit.conditions.values()))])
    drawn = torch.multinomial(shares, len(rows), replacement=True, generator=generator).tolist()
    values, given = [], []
    for j, kind in zip(rows, drawn, strict=True):
        latents, video = pairs.latents[j], pairs.videos[j]
        if kind == len(kinds):
            values.append(torch.zeros_like(latents))
            given.append(torch.zeros(token_grid(latents.shape, model.config.patch), dtype=torch.bool).flatten())
            continue
        shape = ClipShape(len(video), *video.shape[-2:])
        canvas = Canvas(video.float() / 255, draw_given(kinds[kind], shape, model.latents, model.config.patch, generator))
        known = encode_known(model, [canvas], model.config.patch)
        values.append(known.values[0].cpu())
        given.append(token_mask(known.mask, model.config.patch)[0].cpu())
    return pack(values, model.config.patch).tokens, torch.cat(given)


def pack_loss(fit: Fit, model: LatentVideoModel, pairs: Pairs, clips: int, part: tuple[Sequence[int], torch.Generator]) -> Iterator[Loss]:
    """The error of a pack, as its share of a step of `clips` clips. part: which S pairs are in the pack, and the generator of their noise."""
    rows, generator = part
    packed = pack([pairs.latents[j] for j in rows], model.config.patch)  # tokens [N,c]
    dropped = torch.rand(len(rows), generator=generator) < fit.text_dropout  # [S]
    cond = model.encode_text(["" if drop else pairs.texts[j] for j, drop in zip(rows, dropped.tolist(), strict=True)])
    values, given = packed.tokens, torch.zeros(packed.segments.total, dtype=torch.bool)  # [N,c], [N]
    if fit.conditions:
        values, given = packed_conditions(fit, model, pairs, rows, generator)
    if fit.token_drop:
        rates = fit.token_drop * torch.rand(len(rows), generator=generator)  # [S]
        kept = kept_tokens(packed.segments, rates, generator)  # [K]
        packed, values, given = take_tokens(packed, kept), values[kept], given[kept]  # N is K from here on
    t = stratified_logit_normal(model.path, len(rows), shift=fit.time_shift, generator=generator)  # [S]
    t_token = packed.segments.spread(t)  # [N]
    eps = torch.randn(packed.tokens.shape, generator=generator)  # [N,c]
    x_t, target = add_noise(model.path, packed.tokens, eps, t_token), model.path.velocity(packed.tokens, eps, t_token)  # [N,c] each
    if fit.conditions:
        level = packed.segments.spread(model.path.t_max * fit.condition_noise * torch.rand(len(rows), generator=generator))  # [N]
        x_t = torch.where(given[:, None], add_noise(model.path, values, eps, level), x_t)
        t = torch.where(given, level, t_token)  # [N]
    device = model.device
    route = choose_route(packed.segments, [fit.routed] * len(rows), between=middle(model.config.depth), generator=generator) if fit.routed else None
    u = model.network(x_t.to(device), packed.positions.to(device), packed.segments, t.to(device), *packed_text(cond), route)  # [N,c]
    segment, learned = packed.segments.ids, packed.segments.mean((~given).float()) > 0  # [N], [S] a clip may have dropped all that is not given
    error = packed_clip_error(u, target.to(device), segment.to(device), len(rows), keep=~given.to(device))  # [S]
    loss = flow_matching(error, valid=learned.to(device))
    yield Loss(loss.value * (float(learned.sum()) / clips), loss.stats)


def train(fit: Fit, run: Run, model: LatentVideoModel, pairs: Pairs, held_out: Pairs) -> None:
    """Fits `model.network` to `pairs`; leaves the averaged weights in it. Raises UserError where tokens are to skip the middle of a network that has none."""
    if fit.routed:
        middle(model.config.depth)
    optimizer = build_optimizer(model.network, fit.optimizer, lr=fit.lr)
    schedule = warmup_cosine(optimizer, fit.iterations)
    average = EMA(model.network, fit.ema_decay)
    for name, thing in (("network", model.network), ("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    run.count_forwards(model.network)
    lengths = pairs.num_tokens(model.config.patch)
    sampler = PackSampler(lengths, fit.capacity, seed=run.seed)

    for i in run.iterations(fit.iterations, save_every=fit.save_every, label="sft"):
        chosen = [sampler[i * fit.packs + k] for k in range(fit.packs)]  # packs times S clips
        clips = sum(map(len, chosen))
        packs = [(rows, run.generator("noise", i * fit.packs + k)) for k, rows in enumerate(chosen)]
        losses = run.backward_each(optimizer, partial(pack_loss, fit, model, pairs, clips), run.share(packs))
        rate = optimizer.param_groups[0]["lr"]
        norm = run.step(optimizer, fit.max_grad_norm, schedule)
        average.update()
        tokens = sum(lengths[j] for rows in chosen for j in rows)
        run.log(loss=torch.stack([loss.value for loss in losses]).sum(), grad_norm=norm, learning_rate=rate, clips=clips, tokens=tokens)
        if (i + 1) % fit.evaluate_every == 0 or i + 1 == fit.iterations:
            with average.swap(), run.looking():
                errors = held_out_losses(model, held_out, run.generator("held out", 0))
            run.log(held_out_loss=errors.mean(), held_out_loss_low_noise=errors[:2].mean(), held_out_loss_high_noise=errors[-2:].mean())
    average.apply()


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    model = load_tiny(cfg.base).to(run.device)
    if cfg.lora_rank:
        model.network = add_lora(model.network, rank=cfg.lora_rank, alpha=cfg.lora_rank, seed=cfg.seed)
    filters = read_lineage(cfg.pairs)
    run.note("safety", filters)
    clips = load_pairs(cfg.pairs) if cfg.pairs else draw_clips("curated", cfg.clips, seed=cfg.seed)
    held_out = draw_clips("curated", cfg.fit.held_out, seed=cfg.seed + 1_000_003, shape=ClipShape(13, 32, 32))
    train(cfg.fit, run, model, encode_pairs(model, clips), encode_pairs(model, held_out))
    if cfg.lora_rank:
        model.network = merge(model.network)
    weights = cfg.out / "network.safetensors"
    loss = float(held_out_losses(model, encode_pairs(model, held_out), run.generator("held out", 0)).mean())
    measured, data = {"held_out_loss": loss}, clips.fingerprint()
    write_card(weights, lambda path: save_network(path, model), recipe="sft", cfg=cfg, data=data, seconds=run.seconds, measured=measured, safety=filters)
    return {"weights": str(weights), "sha256": file_hash(weights), "held_out_loss": loss, "wall_seconds": round(time.monotonic() - started, 1)}
