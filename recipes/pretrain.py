"""Trains the base denoiser from nothing on messy data: wrong captions, blur, uninvited flashing (`rushes pretrain`).

The loop is that of `sft.py`: only the start and the data differ. Its legs made the shipped base, whose card lies beside the weights.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from align.config import Config as BaseConfig
from align.config import Count, Seed, Share
from align.run import Run
from base_model.errors import UserError
from base_model.prompts.conditions import Kind
from base_model.prompts.text import TextEncoder
from base_model.tiny import CONFIGS, WEIGHTS, LatentVideoModel, NetworkName, build_network, load_codec, load_tiny, save_network
from base_model.types import ClipShape
from recipes.fit import Fit, held_out_losses
from recipes.pairs import encode_pairs
from recipes.sft import METRICS, train
from recipes.shapes.dataset import draw_clips
from recipes.weights import file_hash, read_card, write_card


class Leg(BaseConfig):
    """One stretch of training with its own data and schedule; it begins with the weights of the leg before."""

    seed: Seed
    """Seed of weights, data and noise."""
    clips: Count
    """Messy pairs of native sizes."""
    events: Share = 0.0
    """Share of clips that show an event: an occlusion, a collision, parallax."""
    fit: Fit
    """How the network is fitted."""


GIVEN: dict[Kind, float] = {"image": 0.12, "head": 0.14, "tail": 0.06, "ends": 0.08, "hole": 0.05, "margin": 0.05}
"""Visual prompts that the second leg teaches, and the share of clips that give each."""
GIVEN_BY_EVENTS: dict[Kind, float] = {"image": 0.10, "head": 0.22, "tail": 0.05, "ends": 0.07, "hole": 0.04, "margin": 0.04}
"""The same in the third leg, which shows events more often: what the first frames lead to counts more there."""
LEGS = (
    Leg(seed=0, clips=24_000, fit=Fit(iterations=10_000, lr=5e-3, optimizer="muon", time_shift=2.5, save_every=200, evaluate_every=500)),
    Leg(seed=1, clips=24_000, events=0.15, fit=Fit(iterations=4_000, lr=2.5e-3, optimizer="muon", time_shift=2.5, conditions=GIVEN, save_every=200, evaluate_every=500)),
    Leg(seed=2, clips=24_000, events=0.35, fit=Fit(iterations=3_500, lr=2.5e-3, optimizer="muon", time_shift=2.5, conditions=GIVEN_BY_EVENTS, save_every=200, evaluate_every=500)),
)
"""Text alone first, then what is given beside it, then more of what happens between things."""


class Config(BaseConfig):
    out: Path = Path("runs/pretrain")
    """Folder with one run a leg, `leg-0`, `leg-1`, ...; the network ends up in `dit.safetensors` (or `uvit.safetensors`) of the last one."""
    codec: Path = WEIGHTS / "vae.safetensors"
    """The autoencoder whose latents are modelled."""
    network: NetworkName = "dit"
    """`dit`, or `uvit`: every input is a token, long skips."""
    width: Count = 128
    """Width of the denoiser."""
    depth: Count = 4
    """Blocks of the denoiser."""
    legs: Annotated[tuple[Leg, ...], Field(min_length=1)] = LEGS
    """The legs, in order."""


def fresh_model(cfg: Config) -> LatentVideoModel:
    codec = load_codec(cfg.codec)
    config = CONFIGS[cfg.network](channels=codec.vae.config.channels, width=cfg.width, depth=cfg.depth)
    try:
        network = build_network(config)
    except ValueError as error:
        raise UserError(f"width: {error}. Give another width") from error
    return LatentVideoModel(network, codec, TextEncoder(), config)


def train_leg(cfg: Config, leg: Leg, out: Path, start: Path | None, *, resume: bool) -> None:
    run = Run(out, cfg, seed=leg.seed, resume=resume, metrics=METRICS)
    torch.manual_seed(leg.seed)
    model = fresh_model(cfg) if start is None else load_tiny(start, cfg.codec)
    model.to(run.device)
    clips = draw_clips("messy", leg.clips, seed=leg.seed, events=leg.events)
    held_out = draw_clips("curated", leg.fit.held_out, seed=1_000_003, shape=ClipShape(13, 32, 32))
    train(leg.fit, run, model, encode_pairs(model, clips), encode_pairs(model, held_out))

    def saved() -> None:
        loss = float(held_out_losses(model, encode_pairs(model, held_out), run.generator("held out", 0)).mean())
        earlier = read_card(start) if start else {}
        seconds = run.seconds + earlier.get("wall_seconds", 0.0)
        measured = {"held_out_loss": loss, "held_out_loss_of_earlier_legs": [*_losses(earlier)]}
        weights = out / f"{cfg.network}.safetensors"
        write_card(weights, lambda path: save_network(path, model), recipe="pretrain", cfg=cfg, data=clips.fingerprint(), seconds=seconds, measured=measured)

    run.on_main(saved)


def _losses(card: dict[str, Any]) -> list[float]:
    measured = card.get("measured", {})
    return [*measured.get("held_out_loss_of_earlier_legs", []), measured["held_out_loss"]] if "held_out_loss" in measured else []


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    folders = [cfg.out / f"leg-{k}" for k in range(len(cfg.legs))]
    for k, (leg, out) in enumerate(zip(cfg.legs, folders, strict=True)):
        if resume and (out / f"{cfg.network}.json").exists():
            continue
        train_leg(cfg, leg, out, folders[k - 1] / f"{cfg.network}.safetensors" if k else None, resume=resume and (out / "run.json").exists())
    weights = folders[-1] / f"{cfg.network}.safetensors"
    card = read_card(weights)
    return {"weights": str(weights), "sha256": file_hash(weights), **card["measured"], "wall_seconds": round(time.monotonic() - started, 1)}
