"""Supervised fine-tuning on captioned clips of mixed sizes and lengths, packed into one sequence a step (`rushes sft`).

Flow matching on the model's own path (Lipman et al. 2022, arXiv 2210.02747, eq. 14), one noise level a clip, mean per clip. Full fine-tuning, or LoRA merged at the end.
What it leaves out: gradient checkpointing, several resolutions of one clip, conditions other than text.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share, Whole
from align.data import PackSampler
from align.ema import EMA
from align.objectives.regression import clip_error, flow_matching, packed_clip_error
from align.optimizers import OptimizerName, build_optimizer, warmup_cosine
from align.run import Run
from base_model.lora import add_lora, merge
from base_model.networks.packing import pack
from base_model.paths import add_noise
from base_model.times import quantile_times, stratified_logit_normal
from base_model.tiny import LatentVideoModel, load_tiny, packed_text, save_network
from base_model.types import ClipShape
from recipes.pairs import Pairs, encode_pairs, load_pairs
from recipes.shapes.dataset import draw_clips
from recipes.weights import file_hash, write_card

METRICS = {
    "loss": "Flow-matching error, mean over the elements of a clip, then over the clips of the pack; unit velocity^2 per latent element.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of this step.",
    "clips": "Clips in the pack.",
    "tokens": "Latent tokens in the pack.",
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
    capacity: Count = 4096
    """Latent tokens a pack may hold: the batch size, said in tokens."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, or `adamw8bit` (bitsandbytes)."""
    text_dropout: Share = 0.1
    """Share of clips trained without their caption, so that guidance is possible."""
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
def held_out_losses(model: LatentVideoModel, pairs: Pairs, generator: torch.Generator, *, quantiles: int = 8) -> Tensor:
    """Error at fixed noise quantiles, [quantiles], least noise first. Clips of one size only."""
    x0 = torch.stack(pairs.latents).to(model.device)  # [B,C,F,H,W]
    eps = torch.randn(x0.shape, generator=generator).to(model.device)
    cond = model.encode_text(pairs.texts)
    errors = []
    for t in quantile_times(model.path, quantiles):
        times = t.expand(len(x0)).to(model.device)  # [B]
        u = model(add_noise(model.path, x0, eps, times), times, cond)
        errors.append(clip_error(u, model.path.velocity(x0, eps, times)).mean())
    return torch.stack(errors)


def train(fit: Fit, run: Run, model: LatentVideoModel, pairs: Pairs, held_out: Pairs) -> None:
    """Fits `model.network` to `pairs`; leaves the averaged weights in it."""
    optimizer = build_optimizer(model.network.parameters(), fit.optimizer, lr=fit.lr)
    schedule = warmup_cosine(optimizer, fit.iterations)
    average = EMA(model.network, fit.ema_decay)
    for name, thing in (("network", model.network), ("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    run.count_forwards(model.network)
    sampler = PackSampler(pairs.num_tokens(model.config.patch), fit.capacity, seed=run.seed)

    for i in run.iterations(fit.iterations, save_every=fit.save_every, label="sft"):
        chosen = sampler[i]  # S clips
        packed = pack([pairs.latents[j] for j in chosen], model.config.patch)  # tokens [N,c]
        generator = run.generator("noise", i)
        dropped = torch.rand(len(chosen), generator=generator) < fit.text_dropout  # [S]
        cond = model.encode_text(["" if drop else pairs.texts[j] for j, drop in zip(chosen, dropped.tolist(), strict=True)])
        t = stratified_logit_normal(model.path, len(chosen), shift=fit.time_shift, generator=generator)  # [S]
        t_token = packed.segments.spread(t)  # [N]
        eps = torch.randn(packed.tokens.shape, generator=generator)  # [N,c]
        x_t = add_noise(model.path, packed.tokens, eps, t_token)  # [N,c]
        target = model.path.velocity(packed.tokens, eps, t_token)  # [N,c]
        u = model.network(x_t.to(run.device), packed.positions.to(run.device), packed.segments, t.to(run.device), *packed_text(cond))  # [N,c]
        loss = flow_matching(packed_clip_error(u, target.to(run.device), packed.segments.ids.to(run.device), len(chosen)))
        run.backward(loss.value)
        rate = optimizer.param_groups[0]["lr"]
        norm = run.step(optimizer, fit.max_grad_norm, schedule)
        average.update()
        run.log(loss=loss.value, grad_norm=norm, learning_rate=rate, clips=len(chosen), tokens=len(packed.tokens))
        if (i + 1) % fit.evaluate_every == 0 or i + 1 == fit.iterations:
            with average.swap():
                losses = held_out_losses(model, held_out, run.generator("held out", 0))
            run.log(held_out_loss=losses.mean(), held_out_loss_low_noise=losses[:2].mean(), held_out_loss_high_noise=losses[-2:].mean())
    average.apply()


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    model = load_tiny(cfg.base).to(run.device)
    if cfg.lora_rank:
        model.network = add_lora(model.network, rank=cfg.lora_rank, alpha=cfg.lora_rank, seed=cfg.seed)
    clips = load_pairs(cfg.pairs) if cfg.pairs else draw_clips("curated", cfg.clips, seed=cfg.seed)
    held_out = draw_clips("curated", cfg.fit.held_out, seed=cfg.seed + 1_000_003, shape=ClipShape(13, 32, 32))
    train(cfg.fit, run, model, encode_pairs(model, clips), encode_pairs(model, held_out))
    if cfg.lora_rank:
        model.network = merge(model.network)
    weights = cfg.out / "network.safetensors"
    loss = float(held_out_losses(model, encode_pairs(model, held_out), run.generator("held out", 0)).mean())
    write_card(weights, lambda path: save_network(path, model), recipe="sft", cfg=cfg, data=clips.fingerprint(), seconds=run.seconds, measured={"held_out_loss": loss})
    return {"weights": str(weights), "sha256": file_hash(weights), "held_out_loss": loss, "wall_seconds": round(time.monotonic() - started, 1)}
