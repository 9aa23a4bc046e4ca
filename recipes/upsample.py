"""Trains one stage of a cascade: twice as many pixels a side, or twice as many frames (`rushes upsample`).

After Imagen Video (arXiv 2210.02303): text conditions the stage, the small clip is corrupted at a random level that the network is told, training sees crops, use sees
whole clips. It works on pixels. What it leaves out: stages that begin from a trained network, several sizes in one run, generated small clips.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share
from align.data import PromptSampler
from align.ema import EMA
from align.kernels import ODE
from align.objectives import Loss
from align.objectives.regression import flow_matching, packed_clip_error
from align.optimizers import OptimizerName, build_optimizer, warmup_cosine
from align.run import Run
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.guidance import Guided
from base_model.networks.dit import DiTConfig
from base_model.networks.packing import pack
from base_model.networks.upsample import RESAMPLING, Axis, corrupt, expect, random_crop
from base_model.paths import add_noise
from base_model.prompts.text import TextEncoder
from base_model.stages import UpsampleStage, build_upsampler, save_stage
from base_model.threads import in_threads
from base_model.times import sampling_times, stratified_logit_normal
from base_model.tiny import packed_text
from base_model.types import ClipShape, Conditioning
from recipes.shapes.dataset import ClipSet, draw_clips
from recipes.weights import file_hash, write_card

METRICS = {
    "loss": "Squared error of what the network adds to the expected velocity, in units of its expected square; mean over the elements of a crop, then over crops.",
    "grad_norm": "Norm of the gradient before clipping.",
    "psnr": "Peak signal-to-noise ratio of whole held-out clips, shrunk and upsampled by the stage on its averaged weights, dB.",
    "psnr_interpolated": "The same of the small clips upsampled without a network: bilinear in space, means of neighbours in time, dB.",
    "psnr_repeated": "The same of the small clips with every pixel (or frame) repeated, dB.",
}


class Config(BaseConfig):
    out: Path = Path("runs/stack/upsample")
    """Folder of the run; the stage ends up in `network.safetensors` there."""
    seed: Seed = 0
    """Seed of weights, data and noise."""
    axis: Axis = "space"
    """What doubles: the height and width (`space`), or the frames (`time`)."""
    apart: bool = True
    """Attention in space, frame by frame, then in time, place by place; else over the whole clip at once."""
    clips: Count = 1_000
    """Curated clips of the built-in world to draw."""
    frames: Annotated[int, Field(ge=1, le=1025)] = 13
    """Frames of the large clips; in time their number is odd."""
    side: Annotated[int, Field(ge=16, le=1024, multiple_of=8)] = 64
    """Height and width of the large clips, a multiple of 8."""
    crop: Annotated[int, Field(ge=8, le=1024, multiple_of=8)] = 16
    """Height and width of the crops that training sees, a multiple of 8."""
    iterations: Count = 600
    """Optimizer steps."""
    batch: Count = 8
    """Crops a pack."""
    packs: Count = 2
    """Packs a step; on a CPU every core has a pack of its own."""
    lr: Positive = 1e-2
    """Peak learning rate, warmed up, then a cosine."""
    optimizer: OptimizerName = "muon"
    """`muon`, `adamw` or `adamw8bit` (bitsandbytes)."""
    width: Count = 96
    """Width of the network; a multiple of 24."""
    depth: Count = 3
    """Blocks of the network."""
    text_dropout: Share = 0.1
    """Share of crops trained without their caption."""
    time_shift: Positive = 4.0
    """Shift s of the training times: logit-normal(log s, 1); above 1 looks more at noise."""
    max_level: Share = 0.3
    """The small clip is corrupted at levels drawn evenly from 0 to this one: noise on the path's own scale, on pixels of about unit variance."""
    level: Share = 0.02
    """Level at sampling. Small clips that a model made want more than clean ones, 0.1 or so."""
    steps: Count = 2
    """Denoising steps at sampling. One gives the mean of what may be; more make detail up, which costs PSNR."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the averaged weights, which are what is saved."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    held_out: Count = 32
    """Held-out clips for the PSNR."""
    evaluate_every: Count = 100
    """Iterations between PSNRs."""
    save_every: Count = 100
    """Iterations between checkpoints."""


@torch.no_grad()
def super_resolve(
    stage: UpsampleStage, low: Tensor, cond: Conditioning, *, seeds: Sequence[int], level: float, steps: int, shift: float = 1.0, guidance: float = 1.0, batch: int = 8
) -> Tensor:
    """Small clips [B,T,3,H,W] in [0,1] -> large ones: 2H x 2W, or 2T - 1 frames. Every clip has noise of its own seed; batches run side by side.

    level: how much the small clip is corrupted, the same for all (Imagen Video, section 2.5).
    """
    times = sampling_times(stage.path, steps, shift=shift)
    stage.encode_text([""])  # kept from here on: what guidance needs is not encoded in several threads

    def make(begin: int) -> Tensor:
        part = slice(begin, begin + batch)
        upsampled = stage.encode(stage.upsample(low[part]))  # [b,3,T',H',W']
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        noise, eps = (torch.stack([torch.randn(upsampled.shape[1:], generator=g) for g in generators]).to(stage.device) for _ in range(2))
        levels = upsampled.new_full((len(upsampled),), level)  # [b]
        told = stage.told(corrupt(stage.path, upsampled, levels, eps), levels)
        return stage.decode(rollout(Guided(told, guidance), ODE(), noise, times, cond[part], noise=torch.Generator()).x0).cpu()

    return torch.cat(in_threads(make, range(0, len(low), batch), stage.device))


def as_video(clips: ClipSet) -> Tensor:
    """[B,T,3,H,W] in [0,1]; all of one size."""
    return torch.stack(clips.videos).float() / 255


def psnr(video: Tensor, truth: Tensor) -> float:
    """Mean over clips, dB; both [B,T,3,H,W]."""
    return float((-10 * (video - truth).square().flatten(1).mean(1).log10()).mean())


def repeated(axis: Axis, low: Tensor) -> Tensor:
    """Every pixel four times, or every frame but the last twice."""
    if axis == "space":
        return low.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    return low.repeat_interleave(2, dim=1)[:, :-1]


def evaluate(cfg: Config, stage: UpsampleStage, held_out: ClipSet) -> dict[str, float]:
    """The metrics psnr*."""
    truth = as_video(held_out)  # [B,T,3,H,W]
    low = RESAMPLING[cfg.axis].shrink(truth)
    made = super_resolve(stage, low, stage.encode_text(held_out.texts), seeds=range(len(low)), level=cfg.level, steps=cfg.steps)
    return {"psnr": psnr(made, truth), "psnr_interpolated": psnr(stage.upsample(low), truth), "psnr_repeated": psnr(repeated(cfg.axis, low), truth)}


def crop_loss(cfg: Config, stage: UpsampleStage, clips: ClipSet, part: tuple[Sequence[int], torch.Generator]) -> Iterator[Loss]:
    """The error of a pack of crops. part: which S clips, and the generator of crops, captions dropped, times, levels and noise."""
    rows, generator = part
    high = stage.encode(as_video(ClipSet(clips.texts, tuple(clips.videos[j] for j in rows))))  # [S,3,T,H,W]
    low = stage.encode(stage.upsample(RESAMPLING[cfg.axis].shrink(stage.decode(high))))  # [S,3,T,H,W]
    crops = [random_crop(pair, cfg.crop, generator) for pair in zip(high.cpu(), low.cpu(), strict=True)]
    patch = stage.network.config.patch
    large, small = (pack([crop[k] for crop in crops], patch) for k in range(2))  # tokens [N,c] each
    dropped = torch.rand(len(rows), generator=generator) < cfg.text_dropout  # [S]
    cond = stage.encode_text(["" if drop else clips.texts[j] for j, drop in zip(rows, dropped.tolist(), strict=True)])
    t = stratified_logit_normal(stage.path, len(rows), shift=cfg.time_shift, generator=generator)  # [S]
    level = cfg.max_level * torch.rand(len(rows), generator=generator)  # [S]
    eps, noise = torch.randn(2, *large.tokens.shape, generator=generator)  # [N,c] each
    segments, device = large.segments, stage.device
    x_t, corrupted = add_noise(stage.path, large.tokens, eps, segments.spread(t)), corrupt(stage.path, small.tokens, segments.spread(level), noise)  # [N,c] each
    target = stage.path.velocity(large.tokens, eps, segments.spread(t))  # [N,c]
    u = stage.network(x_t.to(device), corrupted.to(device), large.positions.to(device), segments, t.to(device), level.to(device), *packed_text(cond))  # [N,c]
    weight = expect(stage.path, t.to(device), level.to(device), stage.network.detail).spread_out.pow(-2)  # [S]
    loss = flow_matching(packed_clip_error(u, target.to(device), segments.ids.to(device), len(rows)), weight=weight)
    yield Loss(loss.value / cfg.packs, loss.stats)


def train(cfg: Config, run: Run, stage: UpsampleStage, clips: ClipSet, held_out: ClipSet) -> None:
    """Fits `stage.network` to crops of `clips`; leaves the averaged weights in it."""
    optimizer = build_optimizer(stage.network, cfg.optimizer, lr=cfg.lr)
    schedule = warmup_cosine(optimizer, cfg.iterations)
    average = EMA(stage.network, cfg.ema_decay)
    for name, thing in (("network", stage.network), ("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    run.count_forwards(stage.network)
    stage.encode_text(["", *clips.texts, *held_out.texts])
    sampler = PromptSampler(len(clips), cfg.batch, seed=cfg.seed)
    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="upsample"):
        packs = [(sampler[i * cfg.packs + k], run.generator("noise", i * cfg.packs + k)) for k in range(cfg.packs)]
        losses = run.backward_each(optimizer, partial(crop_loss, cfg, stage, clips), run.share(packs))
        norm = run.step(optimizer, cfg.max_grad_norm, schedule)
        average.update()
        run.log(loss=torch.stack([loss.value for loss in losses]).sum(), grad_norm=norm)
        if (i + 1) % cfg.evaluate_every == 0 or i + 1 == cfg.iterations:
            with average.swap():
                told = run.on_main(partial(evaluate, cfg, stage, held_out))
            run.log(**told)
    average.apply()


def fresh_stage(cfg: Config, clips: ClipSet) -> UpsampleStage:
    """Fresh weights, and the measured spread of what upsampling loses. Raises UserError where the clips cannot be halved, or the width does not suit."""
    if cfg.axis == "time" and (cfg.frames < 3 or cfg.frames % 2 == 0):
        raise UserError(f"frames: {cfg.frames} frames cannot be halved in time. Give an odd number from 3 on")
    if cfg.width % 24:
        raise UserError(f"width: {cfg.width} cannot be shared among two heads and three axes. Give a multiple of 24")
    third = cfg.width // 6
    config = DiTConfig(channels=3, patch=(1, 4, 4), width=cfg.width, depth=cfg.depth, heads=2, rotary_axes=(third, third, third))
    stage = UpsampleStage(build_upsampler(config, apart=cfg.apart), cfg.axis, TextEncoder())
    some = as_video(ClipSet(clips.texts[:64], clips.videos[:64]))
    lost = stage.encode(some) - stage.encode(stage.upsample(RESAMPLING[cfg.axis].shrink(some)))
    stage.network.detail.copy_(lost.square().mean().sqrt())
    return stage


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(cfg.seed)
    shape = ClipShape(cfg.frames, cfg.side, cfg.side)
    clips, held_out = draw_clips("curated", cfg.clips, seed=cfg.seed, shape=shape), draw_clips("curated", cfg.held_out, seed=cfg.seed + 1_000_003, shape=shape)
    stage = fresh_stage(cfg, clips).to(run.device)
    train(cfg, run, stage, clips, held_out)
    weights = cfg.out / "network.safetensors"

    def saved() -> dict[str, float]:
        found = evaluate(cfg, stage, held_out)
        write_card(weights, lambda path: save_stage(path, stage), recipe="upsample", cfg=cfg, data=clips.fingerprint(), seconds=run.seconds, measured=found)
        return found

    found = run.on_main(saved)
    return {"weights": str(weights), "sha256": file_hash(weights), **found, "wall_seconds": round(time.monotonic() - started, 1)}
