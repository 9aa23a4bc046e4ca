"""Trains the base denoiser from nothing on messy data: wrong captions, blur, uninvited flashing (`rushes pretrain`).

The loop is that of `sft.py`: only the start and the data differ. This recipe made the shipped base; its card lies beside the weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from align.config import Config as BaseConfig
from align.run import Run
from base_model.networks.dit import DiT, DiTConfig
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentVideoModel, load_codec, load_tiny, save_network
from base_model.types import ClipShape
from recipes.pairs import encode_pairs
from recipes.sft import METRICS, Fit, held_out_losses, train
from recipes.shapes.dataset import draw_clips
from recipes.weights import file_hash, write_card


class Config(BaseConfig):
    out: Path = Path("runs/pretrain")
    """Folder of the run; the network ends up in `dit.safetensors` there."""
    seed: int = 0
    """Seed of weights, data and noise."""
    start: Path | None = None
    """Network to go on from, written by this recipe; none starts from nothing."""
    codec: Path = WEIGHTS / "vae.safetensors"
    """The autoencoder whose latents are modelled."""
    clips: int = 16_000
    """Messy pairs of native sizes."""
    width: int = 128
    """Width of the denoiser."""
    depth: int = 4
    """Blocks of the denoiser."""
    fit: Fit = Fit(iterations=6_000, lr=1.5e-3, capacity=2048, time_shift=3.0, save_every=200, evaluate_every=200)
    """How the network is fitted."""


def fresh_model(cfg: Config) -> LatentVideoModel:
    codec = load_codec(cfg.codec)
    config = DiTConfig(channels=codec.vae.config.channels, width=cfg.width, depth=cfg.depth)
    return LatentVideoModel(DiT(config), codec, TextEncoder(), config)


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(cfg.seed)
    model = fresh_model(cfg) if cfg.start is None else load_tiny(cfg.start, cfg.codec)
    model.to(run.device)
    clips = draw_clips("messy", cfg.clips, seed=cfg.seed)
    held_out = draw_clips("curated", cfg.fit.held_out, seed=cfg.seed + 1_000_003, shape=ClipShape(13, 32, 32))
    train(cfg.fit, run, model, encode_pairs(model, clips), encode_pairs(model, held_out))
    weights = cfg.out / "dit.safetensors"
    loss = float(held_out_losses(model, encode_pairs(model, held_out), run.generator("held out", 0)).mean())
    write_card(weights, lambda path: save_network(path, model), recipe="pretrain", cfg=cfg, data=clips.fingerprint(), seconds=run.seconds, measured={"held_out_loss": loss})
    return {"weights": str(weights), "sha256": file_hash(weights), "held_out_loss": loss, "wall_seconds": round(time.monotonic() - started, 1)}
