"""Makes a video model of an image model: temporal layers learn, the image's own weights stay as they are (`rushes temporal`).

Video LDM (arXiv 2304.08818). Frames are encoded one by one, as images. `keyframes` are few frames far apart, made of nothing or gone on with from earlier ones;
`interpolation` fills in the frame between every two, at two rates. What is given has noise level 0 and no loss, and the distance of frames is told by their positions.
What it leaves out: a decoder that knows of time, mixed sizes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share
from align.data import PromptSampler
from align.ema import EMA
from align.objectives import Loss
from align.objectives.regression import clip_error, flow_matching
from align.optimizers import OptimizerName, build_optimizer, warmup_cosine
from align.run import Run
from base_model.networks.dit import DiT
from base_model.networks.temporal import TemporalDiT
from base_model.paths import add_noise
from base_model.stages import FrameModel, save_frames, tell_frames
from base_model.times import stratified_logit_normal
from base_model.tiny import load_tiny
from base_model.types import ClipShape
from recipes.pairs import Pairs
from recipes.shapes.dataset import draw_clips
from recipes.stack import STRIDES, change, sample_frames
from recipes.weights import file_hash, write_card

METRICS = {
    "loss": "Flow-matching error of the frames that are not given, mean over the elements of a clip, then over clips; unit velocity^2 per latent element.",
    "grad_norm": "Norm of the gradient before clipping.",
    "change": "Mean squared difference of consecutive frames of held-out prompts' clips, pixels in [0,1], on the averaged weights.",
    "change_independent": "The same of the image model's frames from the same noise, which know nothing of each other.",
    "change_real": "The same of real clips of these prompts.",
}
Task = Literal["keyframes", "interpolation"]


class Config(BaseConfig):
    out: Path = Path("runs/stack/keyframes")
    """Folder of the run; the model ends up in `network.safetensors` there."""
    seed: Seed = 0
    """Seed of weights, data and noise."""
    image: Path | None = None
    """Network that makes the images; none means the shipped base, which has seen images among its clips."""
    task: Task = "keyframes"
    """`keyframes`: every fourth frame; `interpolation`: the frames between, at both rates."""
    clips: Count = 1_000
    """Curated clips of the built-in world to draw."""
    frames: Annotated[int, Field(ge=5, le=1025)] = 13
    """Frames of the finished clips, 1 + a multiple of 4."""
    side: Annotated[int, Field(ge=16, le=1024, multiple_of=8)] = 32
    """Height and width of the clips, a multiple of 8."""
    iterations: Count = 200
    """Optimizer steps."""
    batch: Count = 8
    """Clips of a batch."""
    batches: Count = 2
    """Batches a step; on a CPU every core has one of its own."""
    lr: Positive = 2e-2
    """Peak learning rate of the temporal layers, warmed up, then a cosine."""
    optimizer: OptimizerName = "muon"
    """`muon`, `adamw` or `adamw8bit` (bitsandbytes)."""
    predict: Share = 0.3
    """Share of keyframe batches that go on from earlier keyframes."""
    text_dropout: Share = 0.1
    """Share of clips trained without their caption."""
    time_shift: Positive = 3.0
    """Shift s of the training times: logit-normal(log s, 1); above 1 looks more at noise."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of the averaged weights, which are what is saved."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    held_out: Count = 16
    """Held-out prompts for the change between frames."""
    evaluate_every: Count = 100
    """Iterations between these measures."""
    save_every: Count = 50
    """Iterations between checkpoints."""

    @field_validator("frames")
    @classmethod
    def _keyframes_fall_on_both_ends(cls, frames: int) -> int:
        if frames % STRIDES[0] != 1:
            raise ValueError(f"expected 1 + a multiple of {STRIDES[0]}, got {frames}")
        return frames


def encode_frames(model: FrameModel, clips: Sequence[Tensor], *, batch: int = 16) -> tuple[Tensor, ...]:
    """Clips uint8 [T,3,H,W] of one size -> latents [C,T,H,W] of single frames."""
    parts = [model.encode(torch.stack(list(clips[begin : begin + batch])).float() / 255).cpu() for begin in range(0, len(clips), batch)]
    return tuple(torch.cat(parts))


def draw_known(cfg: Config, frames: int, generator: torch.Generator) -> tuple[int, Tensor]:
    """(stride, which of the frames at that stride are given, bool): what a batch is about."""
    if cfg.task == "interpolation":
        stride = STRIDES[1 + int(torch.randint(2, (), generator=generator))]
        return stride, torch.arange((frames - 1) // stride + 1) % 2 == 0
    number = (frames - 1) // STRIDES[0] + 1
    predicts = float(torch.rand((), generator=generator)) < cfg.predict
    given = int(torch.randint(1, number, (), generator=generator)) if predicts else 0
    return STRIDES[0], torch.arange(number) < given


def frames_loss(cfg: Config, model: FrameModel, pairs: Pairs, part: tuple[Sequence[int], torch.Generator]) -> Iterator[Loss]:
    """The error of a batch at one stride. part: which B clips, and the generator of what is given, captions dropped, times and noise."""
    rows, generator = part
    stride, known = draw_known(cfg, cfg.frames, generator)  # [T]
    x0 = torch.stack([pairs.latents[j] for j in rows])[:, :, ::stride]  # [B,C,T,H,W]
    dropped = torch.rand(len(rows), generator=generator) < cfg.text_dropout  # [B]
    cond = model.encode_text(["" if drop else pairs.texts[j] for j, drop in zip(rows, dropped.tolist(), strict=True)])
    t = stratified_logit_normal(model.path, len(rows), shift=cfg.time_shift, generator=generator)  # [B]
    eps = torch.randn(x0.shape, generator=generator)  # [B,C,T,H,W]
    x_t, target = add_noise(model.path, x0, eps, t), model.path.velocity(x0, eps, t)  # [B,C,T,H,W] each
    known, device = known.to(model.device), model.device
    u = replace(model, stride=stride)(x_t.to(device), t.to(device), tell_frames(cond, x0.to(device), known))  # [B,C,T,H,W]
    loss = flow_matching(clip_error(u, target.to(device), keep=~known[:, None, None]))
    yield Loss(loss.value / cfg.batches, loss.stats)


def changes(cfg: Config, model: FrameModel, held_out: Pairs) -> dict[str, float]:
    """The metrics change*: frames made at the task's finest stride, from the same noise by the video model and by its image model alone."""
    stride = STRIDES[0] if cfg.task == "keyframes" else STRIDES[-1]
    real = torch.stack(held_out.latents)[:, :, ::stride].to(model.device)  # [B,C,T,H,W]
    known = (torch.arange(real.shape[2], device=model.device) % 2 == 0) & (cfg.task == "interpolation")  # [T]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(cfg.seed)).to(model.device)
    cond = tell_frames(model.encode_text(held_out.texts), real, known)
    unaware = replace(model, network=TemporalDiT(model.network.image).to(model.device))  # fresh temporal layers say nothing
    made = [sample_frames(replace(each, stride=stride), noise, cond, steps=6, shift=cfg.time_shift) for each in (model, unaware)]
    video, independent, truth = (change(model.decode(x0)) for x0 in (*made, real))
    return {"change": video, "change_independent": independent, "change_real": truth}


def train(cfg: Config, run: Run, model: FrameModel, pairs: Pairs, held_out: Pairs) -> None:
    """Fits the temporal layers of `model.network`; leaves the averaged weights in them."""
    optimizer = build_optimizer(model.network, cfg.optimizer, lr=cfg.lr)
    schedule = warmup_cosine(optimizer, cfg.iterations)
    average = EMA(model.network, cfg.ema_decay)
    run.register("network", model.network, trainable_only=True)
    for name, thing in (("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    run.count_forwards(model.network)
    model.encode_text(["", *pairs.texts, *held_out.texts])
    sampler = PromptSampler(len(pairs), cfg.batch, seed=cfg.seed)
    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="temporal"):
        parts = [(sampler[i * cfg.batches + k], run.generator("noise", i * cfg.batches + k)) for k in range(cfg.batches)]
        losses = run.backward_each(optimizer, partial(frames_loss, cfg, model, pairs), run.share(parts))
        run.log(loss=torch.stack([loss.value for loss in losses]).sum(), grad_norm=run.step(optimizer, cfg.max_grad_norm, schedule))
        average.update()
        if (i + 1) % cfg.evaluate_every == 0 or i + 1 == cfg.iterations:
            with average.swap():
                told = run.on_main(partial(changes, cfg, model, held_out))
            run.log(**told)
    average.apply()


def from_image(image: Path | None) -> FrameModel:
    """The image model with fresh temporal layers; only these train."""
    base = load_tiny(image)
    assert isinstance(base.network, DiT)
    network = TemporalDiT(base.network.requires_grad_(False))
    return FrameModel(network, base.codec, base.text)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(cfg.seed)
    model = from_image(cfg.image).to(run.device)
    shape = ClipShape(cfg.frames, cfg.side, cfg.side)
    clips, unseen = draw_clips("curated", cfg.clips, seed=cfg.seed, shape=shape), draw_clips("curated", cfg.held_out, seed=cfg.seed + 1_000_003, shape=shape)
    pairs, held_out = (Pairs(each.texts, encode_frames(model, each.videos), each.videos) for each in (clips, unseen))
    train(cfg, run, model, pairs, held_out)
    weights = cfg.out / "network.safetensors"

    def saved() -> dict[str, float]:
        found = changes(cfg, model, held_out)
        write_card(weights, lambda path: save_frames(path, model), recipe="temporal", cfg=cfg, data=clips.fingerprint(), seconds=run.seconds, measured=found)
        return found

    found = run.on_main(saved)
    return {"weights": str(weights), "sha256": file_hash(weights), **found, "wall_seconds": round(time.monotonic() - started, 1)}
