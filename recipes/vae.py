"""Trains the video autoencoder on clips of the built-in world (`rushes vae`).

Reconstruction is an L1 and an L2 term on pixels plus an L1 term on frame differences (without it, flicker and slow motion are averaged away), and a light
Kullback-Leibler term keeps the latents near a unit Gaussian (Kingma & Welling 2013, arXiv 1312.6114, eq. 10). What it leaves out: perceptual and adversarial losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed
from align.objectives import Loss
from align.run import Run
from base_model.errors import UserError
from base_model.networks.vae import VAEConfig
from base_model.tiny import LatentCodec, save_codec
from base_model.types import ClipShape
from recipes.shapes.dataset import ClipSet, by_shape, draw_clips
from recipes.shapes.render import DEMO_CLIP, native_clips
from recipes.weights import read_card, write_card

METRICS = {
    "loss": "Reconstruction plus weighted Kullback-Leibler term, mean over the batch.",
    "kl": "Kullback-Leibler divergence of the latents from a unit Gaussian, nats per latent element.",
    "grad_norm": "Norm of the gradient before clipping.",
    "held_out_psnr": "Peak signal-to-noise ratio of held-out clips decoded from their mean latents, dB.",
}


class Config(BaseConfig):
    out: Path = Path("runs/vae")
    """Folder of the run; the weights end up in `vae.safetensors` there."""
    seed: Seed = 0
    """Seed of weights, data and noise."""
    clips: Count = 12_000
    """Clips of native sizes, drawn from the messy base data."""
    held_out: Count = 256
    """Held-out clips of 13x32x32 for the PSNR."""
    iterations: Count = 3_000
    """Optimizer steps."""
    batch: Count = 16
    """Clips a step; all of one size."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW, warmed up over 50 steps, then a cosine to a fiftieth."""
    kl_coef: NonNegative = 2e-4
    """Weight of the Kullback-Leibler term; 0 trains a plain autoencoder, whose latents get no noise."""
    width: Count = 128
    """Channels inside the encoder and the decoder."""
    latent_channels: Count = 8
    """Channels of the latents."""
    time_stride: Count = 4
    """Frames that become one latent frame, after the first frame, which stands alone."""
    space_stride: Count = 4
    """Pixels, in height and in width, that become one latent position."""
    save_every: Count = 500
    """Iterations between checkpoints."""

    @property
    def network(self) -> VAEConfig:
        return VAEConfig(channels=self.latent_channels, width=self.width, time_stride=self.time_stride, space_stride=self.space_stride)


def check_strides(config: VAEConfig) -> None:
    """Raises UserError where a native clip does not fall on the latent grid."""
    for clip in (DEMO_CLIP, *native_clips()[0]):
        try:
            config.latents.shape(clip)
        except ValueError as error:
            raise UserError(f"time_stride, space_stride: {error}. Give strides that every native clip fits: --time_stride 1, 2 or 4, --space_stride 1, 2, 4 or 8") from error


def as_float(video: Tensor) -> Tensor:
    """uint8 -> float in [0,1]."""
    return video.float() / 255


def reconstruction_loss(decoded: Tensor, video: Tensor) -> Tensor:
    """Both [B,T,3,H,W] -> []."""
    error = decoded - video
    flicker = (error[:, 1:] - error[:, :-1]).abs().mean() if video.shape[1] > 1 else error.new_zeros(())
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * flicker


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats per element, []."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@torch.no_grad()
def psnr(reconstruct: Callable[[Tensor], Tensor], videos: Tensor) -> Tensor:
    """Of each clip, dB, [B]. videos: uint8 [B,T,3,H,W]; `reconstruct` takes and gives pixels in [0,1]."""
    errors = [(reconstruct(as_float(part)) - as_float(part)).square().flatten(1).mean(1) for part in videos.split(32)]
    return -10 * torch.cat(errors).log10()


def batches(data: ClipSet, size: int) -> Callable[[torch.Generator], Tensor]:
    """A function that draws `size` clips of one native size, [B,T,3,H,W] in [0,1]; a size comes as often as it is in the data."""
    groups = list(by_shape(data.videos).values())
    share = torch.tensor([float(len(rows)) for rows in groups])

    def draw(generator: torch.Generator) -> Tensor:
        rows = groups[int(torch.multinomial(share, 1, generator=generator))]
        chosen = torch.randint(len(rows), (size,), generator=generator).tolist()
        return as_float(torch.stack([data.videos[rows[j]] for j in chosen]))

    return draw


def adamw(parameters: Iterable[nn.Parameter], lr: float, iterations: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.SequentialLR]:
    """The optimizer and its schedule: warmed up over 50 steps, then a cosine to a fiftieth."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=50)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations - 50), eta_min=lr / 50)
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[50])


def codec_psnr(codec: LatentCodec, videos: Tensor) -> float:
    """Mean over clips, dB."""
    return float(psnr(lambda video: codec.decode(codec.encode(video)), videos).mean())


@torch.no_grad()
def measure_latents(codec: LatentCodec, data: ClipSet) -> None:
    """Sets the normaliser to the per-channel mean and standard deviation of the data's latents."""
    per_clip = [codec.vae.encode(as_float(torch.stack([data.videos[i] for i in rows[:256]])))[0].transpose(0, 1).flatten(1) for rows in by_shape(data.videos).values()]
    values = torch.cat(per_clip, dim=1)  # [C, everything]
    codec.normaliser.mean.copy_(values.mean(1)[:, None, None, None])
    codec.normaliser.std.copy_(values.std(1)[:, None, None, None])


def clip_of(video: Tensor) -> ClipShape:
    """The size of clips [B,T,3,H,W]."""
    return ClipShape(video.shape[1], video.shape[3], video.shape[4])


def clips_loss(cfg: Config, codec: LatentCodec, video: Tensor, noise: Tensor | None, rows: Sequence[int]) -> Iterator[Loss]:
    """The loss of some clips of a batch [B,T,3,H,W], as their share of it. noise: of all latents [B,C,F,H,W], or none."""
    part, share = video[list(rows)], len(rows) / len(video)
    mean, log_variance = codec.vae.encode(part)  # [b,C,F,H,W] each
    latents = mean if noise is None else mean + (log_variance / 2).exp() * noise[list(rows)]  # [b,C,F,H,W]
    kl = gaussian_kl(mean, log_variance)
    loss = reconstruction_loss(codec.vae.decode(latents), part) + cfg.kl_coef * kl
    yield Loss(share * loss, {"kl": share * kl.detach()})


def fit(cfg: Config, run: Run, data: ClipSet, held_out: Tensor) -> LatentCodec:
    """A codec trained on `data`; held_out: uint8 [B,T,3,H,W]."""
    codec, draw = LatentCodec(cfg.network), batches(data, cfg.batch)
    optimizer, schedule = adamw(codec.parameters(), cfg.lr, cfg.iterations)
    for name, thing in (("codec", codec), ("optimizer", optimizer), ("schedule", schedule)):
        run.register(name, thing)

    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="vae"):
        generator = run.generator("batch", i)
        video = draw(generator)  # [B,T,3,H,W]
        noise = torch.randn((cfg.batch, *cfg.network.latents.shape(clip_of(video))), generator=generator) if cfg.kl_coef else None  # [B,C,F,H,W]
        losses = run.backward_each(optimizer, partial(clips_loss, cfg, codec, video, noise), [run.share(range(cfg.batch), "batch")], one_by_one=True)
        norm = run.step(optimizer, 1.0, schedule)
        if i % 200 == 0 or i == cfg.iterations - 1:
            loss, kl = (torch.stack(values).sum() for values in ([loss.value for loss in losses], [loss.stats["kl"] for loss in losses]))
            run.log(loss=loss, kl=kl, grad_norm=norm, held_out_psnr=run.on_main(partial(codec_psnr, codec, held_out)))

    measure_latents(codec, data)
    return codec


def train(cfg: Config, run: Run) -> LatentCodec:
    data = draw_clips("messy", cfg.clips, seed=cfg.seed)
    held_out = torch.stack(draw_clips("messy", cfg.held_out, seed=cfg.seed + 1_000_003, shape=DEMO_CLIP).videos)
    codec = fit(cfg, run, data, held_out)

    def saved() -> None:
        measured = {"held_out_psnr_db": round(codec_psnr(codec, held_out), 2)}
        weights = cfg.out / "vae.safetensors"
        write_card(weights, lambda path: save_codec(path, codec), recipe="vae", cfg=cfg, data=data.fingerprint(), seconds=run.seconds, measured=measured)

    run.on_main(saved)
    return codec


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    check_strides(cfg.network)
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(cfg.seed)
    train(cfg, run)
    card = read_card(cfg.out / "vae.safetensors")
    return {"weights": str(cfg.out / "vae.safetensors"), **card["measured"], "wall_seconds": round(time.monotonic() - started, 1)}
