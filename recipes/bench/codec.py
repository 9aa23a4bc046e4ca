"""How well the video autoencoder keeps a clip, beside floors of the same latent size; whether its latents interpolate; what decoding in parts costs.

Reconstruction: PSNR on held-out clips. `vae` and `plain autoencoder` (no Kullback-Leibler term, no noise) are trained here by `rushes vae`'s own `fit`, for equally many steps
on the same clips; `shipped vae` had more. `pca` keeps as many numbers of each patch as the latents have channels. `frames` is diffusers' `AutoencoderKL` on every frame by
itself, with the least channels that give it no fewer numbers a clip than ours; `frames, blended in time` adds a temporal block between its frozen encoder and decoder;
`frames, decoder tuned` fine-tunes its decoder with temporal layers inside, encoder frozen (Blattmann et al. 2023, arXiv 2304.08818, section 3.1.1).

Interpolation: clips decoded from the midpoints of two clips' latents are held against real clips by the Frechet distance of their weight-free signals (`reward/features.py`:
sharpness, noise, grid, contrast, motion, flicker, ...), which no autoencoder has seen. Signals are told as ranks among real clips: rendered clips have next to no noise, which in
units of their spread would outweigh all the rest. What is real, what each autoencoder makes of the ends alone, and midpoints of pixels (a cross-fade) stand beside it.

Decoding: seconds and the largest activation, whole and in parts of latent frames (`chunk`) and tiles of latent cells (`tile`).
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import silu

from align.config import Count, Positive, Seed, Several
from align.progress import Progress
from align.run import Run, derived_seed
from base_model.errors import UserError
from base_model.networks.packing import Patch
from base_model.networks.vae import VideoVAE, from_patches, to_patches
from base_model.tiny import WEIGHTS, LatentCodec, load_codec
from base_model.types import ClipShape, LatentSpec
from recipes import vae
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, paired_ratio, spread, timed, write
from recipes.shapes.dataset import ClipSet, draw_clips
from recipes.shapes.render import DEMO_CLIP
from recipes.statistics import bootstrap_difference, bootstrap_mean
from reward.features import signal_features

Reconstruct = Callable[[Tensor], Tensor]
FRAME_WIDTHS = (16, 32, 64, 64)  # of AutoencoderKL: eight pixels a side become one position
LARGE_CLIP = ClipShape(5, 256, 256)
CHUNKS, TILE = (1, 16, 32), 16  # latent frames, latent cells


class Config(Bench):
    codec: Path | None = None
    """Video autoencoder to measure; none means the shipped one. The others get its strides and channels."""
    seed: Seed = 0
    """Seed of weights, data and noise."""
    clips: Count = 3_000
    """Clips of native sizes to train on. `quick` takes at most 64."""
    held_out: Several = 256
    """Held-out clips of 13x32x32. `quick` takes at most 32."""
    iterations: Count = 400
    """Steps of `vae`, `plain autoencoder` and `frames`. `quick` takes at most 8."""
    temporal_iterations: Count = 100
    """Steps of what is added to `frames` afterwards. `quick` takes at most 4."""
    batch: Count = 16
    """Clips a step."""
    kl_coef: Positive = vae.Config().kl_coef
    """Weight of the Kullback-Leibler term, of `vae` and of `frames`."""
    long_frames: Several = 721
    """Frames of the long clip: a minute. `quick` takes at most 97."""
    repeats: Count = 5
    """Measured repeats of each decoding. `quick` takes at most 2."""


class Way(NamedTuple):
    """One way to keep a clip: what comes back of it, how many numbers lie between, and what learning it took."""

    reconstruct: Reconstruct
    latents: int  # numbers a clip of 13x32x32
    parameters: int
    iterations: int | None
    seconds: float | None


# Linear


class Basis(NamedTuple):
    """`values` principal components of patches."""

    mean: Tensor  # [P]
    axes: Tensor  # [P,k]

    @classmethod
    def of(cls, patches: Tensor, values: int) -> Basis:
        """patches [N,P]."""
        x = patches.double()
        return cls(x.mean(0).float(), torch.linalg.eigh(torch.cov(x.T)).eigenvectors[:, -values:].float())

    def __call__(self, patches: Tensor) -> Tensor:
        """[B,P,F,H,W] -> what is left of it."""
        x = patches.movedim(1, -1) - self.mean  # [B,F,H,W,P]
        return (x @ self.axes @ self.axes.T + self.mean).movedim(-1, 1)


def pca(data: ClipSet, patch: Patch, values: int) -> Reconstruct:
    """The best linear autoencoder of single patches; first frames, which stand alone, have a basis of their own."""
    patches = [to_patches(vae.as_float(video[None]), patch) for video in data.videos]  # [1,P,F,H,W] each
    parts = [[x[:, :, :1].flatten(2) for x in patches], [x[:, :, 1:].flatten(2) for x in patches]]
    first, later = (Basis.of(torch.cat(part, dim=2)[0].T, values) for part in parts)

    def reconstruct(video: Tensor) -> Tensor:
        x = to_patches(video, patch)  # [B,P,F,H,W]
        return from_patches(torch.cat([first(x[:, :, :1]), later(x[:, :, 1:])], dim=2), patch).clamp(0, 1)

    return reconstruct


# Frame by frame


class Temporal(nn.Module):
    """Residual over two frames back and two ahead, [B,c,T,h,w]; nothing at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv3d(channels, 2 * channels, (3, 1, 1), padding=(1, 0, 0))
        self.out = nn.Conv3d(2 * channels, channels, (3, 1, 1), padding=(1, 0, 0))
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(silu(self.mix(x)))


class FrameCodec(nn.Module):
    """diffusers' AutoencoderKL on every frame of a clip; `blend`: a temporal block before its decoder, `layers`: one after each block inside it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from diffusers import AutoencoderKL

        blocks = len(FRAME_WIDTHS)
        self.image = AutoencoderKL(
            block_out_channels=FRAME_WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            layers_per_block=1,
            latent_channels=channels,
            norm_num_groups=8,
        )
        self.blend: nn.Module = nn.Identity()
        self.layers = nn.ModuleList(nn.Identity() for _ in FRAME_WIDTHS)

    def blended(self) -> FrameCodec:
        """A copy, all frozen but a new block between encoder and decoder."""
        new = copy.deepcopy(self).requires_grad_(False)
        new.blend = Temporal(self.image.config.latent_channels)
        return new

    def tuned(self) -> FrameCodec:
        """A copy with new temporal layers inside its decoder; the encoder is frozen."""
        new = copy.deepcopy(self)
        new.image.encoder.requires_grad_(False)
        new.image.quant_conv.requires_grad_(False)
        new.layers = nn.ModuleList(Temporal(width) for width in reversed(FRAME_WIDTHS))
        return new

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """[B,T,3,H,W] in [0,1] -> (mean, log variance) [B,c,T,h,w]."""
        posterior = self.image.encode(2 * video.flatten(0, 1) - 1).latent_dist  # [B T,c,h,w]
        return clips(posterior.mean, len(video)), clips(posterior.logvar, len(video))

    def decode(self, latents: Tensor) -> Tensor:
        """[B,c,T,h,w] -> [B,T,3,H,W]."""
        decoder, n = self.image.decoder, len(latents)
        x = decoder.mid_block(decoder.conv_in(self.image.post_quant_conv(frames(self.blend(latents)))))  # [B T,w,h,w]
        for block, layer in zip(decoder.up_blocks, self.layers, strict=True):
            x = frames(layer(clips(block(x), n)))  # [B T,w,..]
        pixels: Tensor = decoder.conv_out(silu(decoder.conv_norm_out(x)))  # [B T,3,H,W]
        return (pixels.unflatten(0, (n, -1)) + 1) / 2

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.decode(self.encode(video)[0]).clamp(0, 1)


def clips(x: Tensor, n: int) -> Tensor:
    """Frames of n clips [B T,c,h,w] -> [B,c,T,h,w]."""
    return x.unflatten(0, (n, -1)).transpose(1, 2)


def frames(x: Tensor) -> Tensor:
    """[B,c,T,h,w] -> [B T,c,h,w]."""
    return x.transpose(1, 2).flatten(0, 1)


def frame_channels(latents: int) -> int:
    """The least channels of `FrameCodec` with which a clip of 13x32x32 becomes no fewer numbers than `latents`."""
    side = 2 ** (len(FRAME_WIDTHS) - 1)
    return math.ceil(latents / (DEMO_CLIP.frames * (DEMO_CLIP.height // side) * (DEMO_CLIP.width // side)))


def fit_frames(model: FrameCodec, data: ClipSet, cfg: Config, *, iterations: int, label: str) -> float:
    """Trains what is not frozen with the losses, schedule and batches of `rushes vae`; returns its seconds. A frozen encoder gives its means, and has no Kullback-Leibler term."""
    trained, noisy = [p for p in model.parameters() if p.requires_grad], model.image.quant_conv.weight.requires_grad
    (optimizer, schedule), draw = vae.adamw(trained, vae.Config().lr, iterations), vae.batches(data, cfg.batch)

    def train() -> None:
        with Progress(label, total=iterations) as progress:
            for i in range(iterations):
                generator = torch.Generator().manual_seed(derived_seed(cfg.seed, label, i))
                video = draw(generator)  # [B,T,3,H,W]
                mean, log_variance = model.encode(video)  # [B,c,T,h,w] each
                latents = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator) if noisy else mean
                kl = cfg.kl_coef * vae.gaussian_kl(mean, log_variance) if noisy else 0.0
                loss = vae.reconstruction_loss(model.decode(latents), video) + kl
                loss.backward()
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                progress.advance(f"loss {float(loss.detach()):.4f}")

    return timed(train)[1]


# Ours


def fit_video(cfg: Config, like: VideoVAE, data: ClipSet, held_out: Tensor, *, kl_coef: float) -> tuple[LatentCodec, float]:
    """A codec of the strides and sizes of `like`, by the recipe; and its seconds."""
    size = like.config
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        recipe = vae.Config(
            out=Path(folder) / "run",
            seed=cfg.seed,
            clips=len(data),
            held_out=len(held_out),
            iterations=cfg.iterations,
            batch=cfg.batch,
            kl_coef=kl_coef,
            width=size.width,
            latent_channels=size.channels,
            time_stride=size.time_stride,
            space_stride=size.space_stride,
            save_every=cfg.iterations,
        )
        run = Run(recipe.out, recipe, seed=cfg.seed, resume=False, metrics=vae.METRICS)
        torch.manual_seed(cfg.seed)
        codec = vae.fit(recipe, run, data, held_out).eval().requires_grad_(False)
        return codec, run.seconds


def round_trip(codec: LatentCodec) -> Reconstruct:
    return lambda video: codec.decode(codec.encode(video))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class Trained(NamedTuple):
    ways: dict[str, Way]
    codecs: dict[str, LatentCodec]  # those whose latents are interpolated


def train_all(cfg: Config, shipped: LatentCodec, data: ClipSet, held_out: Tensor) -> Trained:
    """Everything that is compared; ours first."""
    config = shipped.vae.config
    latents = math.prod(config.latents.shape(DEMO_CLIP))
    codecs, ways = {"shipped vae": shipped}, {"shipped vae": Way(round_trip(shipped), latents, parameters(shipped), None, None)}
    for name, kl_coef in (("vae", cfg.kl_coef), ("plain autoencoder", 0.0)):
        codecs[name], seconds = fit_video(cfg, shipped.vae, data, held_out, kl_coef=kl_coef)
        ways[name] = Way(round_trip(codecs[name]), latents, parameters(codecs[name]), cfg.iterations, seconds)
    linear, seconds = timed(lambda: pca(data, config.patch, config.channels))
    ways["pca"] = Way(linear, latents, 2 * (1 + config.channels) * 3 * math.prod(config.patch), None, seconds)

    torch.manual_seed(cfg.seed)
    channels = frame_channels(latents)
    image, side = FrameCodec(channels), 2 ** (len(FRAME_WIDTHS) - 1)
    size = math.prod(LatentSpec(channels, 1, side).shape(DEMO_CLIP))
    seconds = fit_frames(image, data, cfg, iterations=cfg.iterations, label="frames")
    ways["frames"] = Way(image.reconstruct, size, parameters(image), cfg.iterations, seconds)
    for name, model in (("frames, blended in time", image.blended()), ("frames, decoder tuned", image.tuned())):
        more = fit_frames(model, data, cfg, iterations=cfg.temporal_iterations, label=name)
        ways[name] = Way(model.reconstruct, size, parameters(model), cfg.iterations + cfg.temporal_iterations, seconds + more)
    return Trained(ways, codecs)


def reconstruction(ways: dict[str, Way], held_out: Tensor) -> list[Row]:
    """PSNR of each way with its 95 % interval over clips, and how far `vae` is ahead of it on the same clips."""
    found = {name: vae.psnr(way.reconstruct, held_out).tolist() for name, way in ways.items()}
    rows = []
    for name, way in ways.items():
        own, ahead = bootstrap_mean(found[name]), bootstrap_difference(found["vae"], found[name]) if name != "vae" else None
        rows.append(
            {
                "name": name,
                "latents_per_clip": way.latents,
                "latents_per_pixel": way.latents / held_out[0, :, 0].numel(),
                "parameters": way.parameters,
                "iterations": way.iterations,
                "train_seconds": way.seconds,
                "psnr_db": own.mean,
                "psnr_low": own.low,
                "psnr_high": own.high,
                "vae_ahead_db": ahead and ahead.mean,
                "vae_ahead_low": ahead and ahead.low,
                "vae_ahead_high": ahead and ahead.high,
            }
        )
    return rows


# Interpolation


def frechet(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Frechet distance (squared 2-Wasserstein) of the Gaussians fitted to a [N,S] and b [M,S] (Dowson & Landau 1982, eq. 4; Heusel et al. 2017, eq. 6)."""
    root_a, cov_b = _root(np.cov(a, rowvar=False)), np.cov(b, rowvar=False)
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(root_a @ root_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum())


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def ranks(x: Tensor, among: Tensor) -> NDArray[np.float64]:
    """Share of `among` [N,S] that is below each value of x [B,S], equal ones counting half, [B,S]."""
    values, ordered = x.T.contiguous(), among.T.sort(1).values.contiguous()  # [S,B], [S,N]
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))  # [S,B]
    return np.asarray(((below + up_to) / (2 * len(among))).T.double().numpy())


@torch.no_grad()
def interpolation(codecs: dict[str, LatentCodec], held_out: Tensor, reference: Tensor, *, draws: int = 500) -> list[Row]:
    """Every held-out clip and the next one: ends and midpoints against `reference`, both uint8 [B,T,3,H,W]. Intervals: 95 % bootstraps over clips, the same draws for all."""
    real, video = (vae.as_float(x) for x in (reference, held_out))
    among = signal_features(real)  # [N,S]

    def signals(x: Tensor) -> NDArray[np.float64]:
        return ranks(signal_features(x), among)

    def middle(x: Tensor) -> Tensor:
        return (x + x.roll(-1, 0)) / 2

    made = {"pixels": (video, middle(video))}
    for name, codec in codecs.items():
        latents = codec.encode(video)  # [B,C,F,H,W]
        made[name] = codec.decode(latents), codec.decode(middle(latents))
    against, seen = signals(real), {name: [signals(x) for x in pair] for name, pair in made.items()}
    picks = np.random.default_rng(0).integers(len(video), size=(draws, len(video)))
    drawn = {name: np.array([frechet(midpoints[pick], against) for pick in picks]) for name, (_, midpoints) in seen.items()}
    rows = []
    for name, (ends, midpoints) in seen.items():
        low, high = np.quantile(drawn[name], [0.025, 0.975]).tolist()
        beyond = np.quantile(drawn[name] - drawn["vae"], [0.025, 0.975]).tolist() if name != "vae" else (None, None)
        distance = frechet(midpoints, against)
        rows.append(
            {
                "name": name,
                "clips": len(video),
                "ends_frechet": frechet(ends, against),
                "midpoints_frechet": distance,
                "midpoints_low": low,
                "midpoints_high": high,
                "farther_than_vae": distance - frechet(seen["vae"][1], against) if name != "vae" else None,
                "farther_low": beyond[0],
                "farther_high": beyond[1],
            }
        )
    return rows


# Speed


@torch.no_grad()
def largest_activation(codec: LatentCodec, work: Callable[[], object]) -> int:
    """Bytes of the largest tensor that any layer of the codec gives while `work` is done."""
    largest = 0

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal largest
        largest = max([largest, *(x.numel() * x.element_size() for x in (output if isinstance(output, tuple) else (output,)))])

    hooks = [module.register_forward_hook(note) for module in codec.modules()]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def sizes(codec: LatentCodec, clip: ClipShape) -> list[tuple[int | None, int | None]]:
    """(chunk, tile) that are smaller than the clip: whole first, then parts in time, tiles, and both."""
    _, frames, height, width = codec.vae.config.latents.shape(clip)
    chunks, tiles = [chunk for chunk in CHUNKS if chunk < frames], [TILE] if min(height, width) > TILE else []
    return [(None, None), *((chunk, None) for chunk in chunks), *((chunk, tile) for tile in tiles for chunk in (None, *chunks[:1]))]


@torch.no_grad()
def speed(codec: LatentCodec, shapes: Sequence[ClipShape], *, repeats: int) -> list[Row]:
    """Decoding one clip of each shape, in turn; parts are dropped as soon as they are there, as a writer of files would."""
    rows = []
    for clip in shapes:
        x0 = torch.randn(1, *codec.vae.config.latents.shape(clip), generator=torch.Generator().manual_seed(0))  # [1,C,F,H,W]
        ways = {size: partial(decode, codec, x0, *size) for size in sizes(codec, clip)}
        seconds: dict[tuple[int | None, int | None], list[float]] = {size: [] for size in ways}
        for repeat in range(1 + repeats):
            for size, way in ways.items():
                took = timed(way)[1]
                if repeat:
                    seconds[size].append(took)
        for (chunk, tile), way in ways.items():
            mine, whole = seconds[chunk, tile], seconds[None, None]
            median, ratio = spread(mine).median, None if mine is whole else paired_ratio(mine, whole)
            rows.append(
                {
                    "clip": str(clip),
                    "chunk": chunk,
                    "tile": tile,
                    **columns("seconds", (median, min(mine), max(mine))),
                    "frames_per_second": clip.frames / median,
                    "times_slower_than_whole": ratio and ratio.median,
                    "times_slower_low": ratio and ratio.low,
                    "times_slower_high": ratio and ratio.high,
                    "largest_activation_bytes": largest_activation(codec, way),
                }
            )
    return rows


def decode(codec: LatentCodec, x0: Tensor, chunk: int | None, tile: int | None) -> None:
    for _ in codec.decode_stream(x0.split(chunk or x0.shape[2], dim=2), tile=tile):
        pass


def shrunk(cfg: Config) -> Config:
    """The quick form: enough to see that everything runs, too little to learn anything from the numbers."""
    most = {"clips": 64, "held_out": 32, "iterations": 8, "temporal_iterations": 4, "long_frames": 97, "repeats": 2}
    return cfg.model_copy(update={key: min(value, getattr(cfg, key)) for key, value in most.items()})


def check(cfg: Config, codec: LatentCodec) -> None:
    """Raises UserError where a clip does not fall on the latent grid."""
    vae.check_strides(codec.vae.config)
    if (cfg.long_frames - 1) % codec.vae.config.time_stride:
        raise UserError(f"long_frames: {cfg.long_frames} frames are not 1 + a multiple of {codec.vae.config.time_stride}. Give --long_frames 721")


def measure(cfg: Config, shipped: LatentCodec) -> dict[str, list[Row]]:
    """The rows of each part."""
    data = draw_clips("messy", cfg.clips, seed=cfg.seed)
    held_out, reference = (torch.stack(draw_clips("messy", cfg.held_out, seed=cfg.seed + k * 1_000_003, shape=DEMO_CLIP).videos) for k in (1, 2))
    trained = train_all(cfg, shipped, data, held_out)
    return {
        "reconstruction": reconstruction(trained.ways, held_out),
        "interpolation": interpolation(trained.codecs, held_out, reference),
        "decoding": speed(shipped, (DEMO_CLIP, replace(DEMO_CLIP, frames=cfg.long_frames), LARGE_CLIP), repeats=cfg.repeats),
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    shipped, told = load_codec(cfg.codec or WEIGHTS / "vae.safetensors"), shrunk(cfg) if cfg.quick else cfg
    check(told, shipped)
    parts = measure(told, shipped)
    if cfg.write:
        write(cfg, "codec", here("codec", cfg), "The video autoencoder", {part.capitalize(): rows for part, rows in parts.items()})
    return {"rows": flat(parts)}
