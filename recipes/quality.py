"""Learn what faults look like from planted ones (`rushes quality`): the judge of quality that every reward model holds beside its matcher.

Clips of the built-in world, clips denoised again by the base model and made-up footage get faults that everybody minds (`reward/planted.py`) and changes that nobody
sees. The judge learns which of two is whole (a logistic loss on pairs, as RankIQA, Liu et al. 2017, arXiv 1707.08347, and on each clip by itself) and to say the same of both
where a change is harmless. Its signals are computed once for every clip; the network on them is small.

    rushes quality --seed 1 --out runs/quality-1        two seeds are shipped: one for reward models, one for guards
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, NonNegative, Positive, Seed, Share
from align.progress import Progress
from align.run import Run
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import ClipShape
from recipes.match import OTHER_SHAPES, WEIGHTS, regenerate
from recipes.shapes.footage import sample_footage
from recipes.shapes.render import DEMO_CLIP, sample_messy_pair
from recipes.weights import write_card
from reward.planted import FAULTS, HARMLESS, reencoded
from reward.quality import FAULT_SIGNALS, Quality, fault_signals, save_quality

SHIPPED = {"reward": WEIGHTS / "quality-reward.safetensors", "guard": WEIGHTS / "quality-guard.safetensors"}
METRICS = {
    "loss": "Logistic loss of pairs and of single clips, plus the change of the log-odds under harmless changes; nats.",
    "told_apart": "Share of planted faults of the batch that lower the log-odds.",
    "harmless_change": "Mean absolute change of the log-odds under harmless changes.",
    "grad_norm": "Norm of the gradient before clipping.",
}

TOLD = 1 / 510
"""Mean change of a pixel below which a planted fault did nothing: a still clip frozen, a grey one over-saturated."""


class Config(BaseConfig):
    out: Path = Path("runs/quality")
    """Folder of the run; `quality.safetensors` and `quality.json` appear in it."""
    seed: Seed = 1
    """Seed of data, weights and order."""
    clips: Count = 3000
    """Clips of the demo's size; a tenth as many again in four other sizes."""
    footage: Share = 0.5
    """Share of them that is made-up footage; the rest are clips of the built-in world."""
    regenerated: Share = 0.5
    """Share of the clips of the built-in world that the base model denoises again from a time between 0.2 and 0.7."""
    iterations: Count = 3000
    """Optimizer steps."""
    batch: Count = 64
    """Clips a step, each with every fault and every harmless change."""
    harmless: NonNegative = 1.0
    """Weight of the change of the log-odds under harmless changes."""
    learning_rate: Positive = 3e-3
    """Peak step size (a cosine to zero)."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    evaluation_clips: Count = 300
    """Fresh clips of the built-in world, and as many of footage, for the tables."""


AXIS = {"faulty": 1, "counts": 1, "same": 1}
"""Where the clips are, in what has them not first."""


@dataclass(frozen=True)
class Signals:
    """The fault signals of N clips (without N: of one), as they were and changed. Half of the faults are planted into clips that had been encoded before."""

    clean: Tensor  # [N,S]
    encoded: Tensor  # [N,S]
    faulty: Tensor  # [faults,N,S]
    before: Tensor  # [N] bool, whether the faults were planted into the encoded clip
    counts: Tensor  # [faults,N] bool, whether the fault changed anything
    same: Tensor  # [harmless,N,S]

    def select(self, rows: Tensor) -> Signals:
        return Signals(self.clean[rows], self.encoded[rows], self.faulty[:, rows], self.before[rows], self.counts[:, rows], self.same[:, rows])

    @property
    def source(self) -> Tensor:
        """What the faults were planted into, [N,S]."""
        return torch.where(self.before[:, None], self.encoded, self.clean)


def drawn(rng: np.random.Generator, clip: ClipShape, n: int, model: LatentVideoModel, regenerated: float) -> list[Tensor]:
    """n clips of the built-in world, some of them denoised again by the base model."""
    pairs = [sample_messy_pair(rng, clip) for _ in range(n)]
    videos = [video for _, video, _ in pairs]
    again = np.flatnonzero(rng.random(n) < regenerated)
    for rows in np.array_split(again, math.ceil(len(again) / 64)) if len(again) else ():
        t = torch.from_numpy(rng.uniform(0.2, 0.7, len(rows))).float()
        shown = [pairs[row][2].prompt.text for row in rows]
        made = regenerate(model, torch.stack([videos[row] for row in rows]), shown, t, torch.Generator().manual_seed(int(rng.integers(2**31))))
        for row, video in zip(rows, made, strict=True):
            videos[row] = video
    return videos


@torch.no_grad()
def plant(videos: Iterable[Tensor], rng: np.random.Generator, progress: Progress) -> list[Signals]:
    """Every fault and every harmless change of clips [T,3,H,W] of one size, as the signals of each; clips are taken one at a time."""
    rows = []
    for video in videos:
        encoded = reencoded(video, rng)
        before = bool(rng.random() < 0.5)
        source = encoded if before else video
        faulty = torch.stack([fault(source, rng) for fault in FAULTS.values()])  # [faults,T,3,H,W]
        counts = (faulty - source).abs().flatten(1).mean(1) > TOLD  # [faults]
        told = fault_signals(torch.cat([video[None], encoded[None], faulty]))  # [2+faults,S]
        same = torch.cat([fault_signals(change(video, rng)[None]) for name, change in HARMLESS.items() if name != "re-encoded"])
        rows.append(Signals(told[0], told[1], told[2:], torch.tensor(before), counts, torch.cat([told[1:2], same])))
        progress.advance()
    return rows


def stacked(rows: Sequence[Signals]) -> Signals:
    """One of many clips, of one clip each."""
    return Signals(*(torch.stack([getattr(row, field.name) for row in rows], dim=AXIS.get(field.name, 0)) for field in fields(Signals)))


def make_data(cfg: Config, rng: np.random.Generator, model: LatentVideoModel) -> tuple[Signals, str]:
    """The training set, and the sha256 of its signals."""
    sizes = [(DEMO_CLIP, cfg.clips), *((clip, cfg.clips // 40) for clip in OTHER_SHAPES)]
    rows: list[Signals] = []
    with Progress("faults", total=sum(n for _, n in sizes)) as progress:
        for clip, n in sizes:
            filmed = round(n * cfg.footage)
            rows.extend(plant((sample_footage(rng, clip) for _ in range(filmed)), rng, progress))
            rows.extend(plant(drawn(rng, clip, n - filmed, model, cfg.regenerated), rng, progress))
    data = stacked(rows)
    digest = hashlib.sha256()
    for field in fields(Signals):
        digest.update(getattr(data, field.name).contiguous().numpy().tobytes())
    return data, digest.hexdigest()


def loss_of(quality: Callable[[Tensor], Tensor], part: Signals, harmless: float) -> tuple[Tensor, dict[str, Tensor]]:
    """-> the loss [], and the other metrics. quality: signals [...,S] -> log-odds [...]."""
    whole, broken, same = quality(part.source), quality(part.faulty), quality(part.same)  # [b], [faults,b], [harmless,b]
    counts = part.counts.float()
    pairs = (F.softplus(broken - whole) * counts).mean()
    alone = F.softplus(-whole).mean() + (F.softplus(broken) * counts).mean() + F.softplus(-same).mean()
    moved = (same - quality(part.clean)).abs().mean()
    told = ((broken < whole).float() * counts).sum() / counts.sum().clamp(min=1)
    return pairs + 0.3 * alone + harmless * moved, {"told_apart": told, "harmless_change": moved.detach()}


def train(cfg: Config, run: Run, model: LatentVideoModel) -> tuple[Quality, str]:
    """The trained judge and the sha256 of its data."""
    data, data_hash = make_data(cfg, run.rng("data", 0), model)
    quality = Quality()
    quality.input_mean.copy_(data.clean.mean(0))
    quality.input_std.copy_(data.clean.std(0).clamp(min=1e-4))
    optimizer = torch.optim.AdamW(quality.parameters(), lr=cfg.learning_rate, weight_decay=0.01)
    run.register("quality", quality)
    run.register("optimizer", optimizer)
    run.count_forwards(quality)
    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="quality"):
        rows = torch.randint(len(data.clean), (cfg.batch,), generator=run.generator("step", i))
        loss, told = loss_of(quality.of_signals, data.select(rows), cfg.harmless)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * i / cfg.iterations))
        run.backward(loss)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if i % 10 == 0:
            run.log(loss=loss.detach(), grad_norm=norm, **told)
    return quality.eval(), data_hash


@torch.no_grad()
def table_of(quality: Quality, videos: Sequence[Tensor], rng: np.random.Generator) -> dict[str, float]:
    """Share of fresh clips with a planted fault that score below the same clip without it, by fault (those that the fault did nothing to are left out); and the median change
    under each harmless change, in standard deviations of the log-odds among the clips."""
    with Progress("evaluation", total=len(videos)) as progress:
        data = stacked(plant(videos, rng, progress))
    whole, broken = quality.of_signals(data.source), quality.of_signals(data.faulty)  # [N], [faults,N]
    apart = {name: float((b < whole)[c].float().mean()) for name, b, c in zip(FAULTS, broken, data.counts, strict=True)}
    clean = quality.of_signals(data.clean)
    order = ["re-encoded", *(name for name in HARMLESS if name != "re-encoded")]
    moved = {name: float((same - clean).abs().median() / clean.std()) for name, same in zip(order, quality.of_signals(data.same), strict=True)}
    return apart | moved


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains, measures on fresh clips, and writes `quality.safetensors` with its card `quality.json`."""
    run, model = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS), load_tiny(None)
    quality, data_hash = train(cfg, run, model)
    seconds = run.seconds
    rng = np.random.default_rng(10_001)
    tables = {
        "built-in world": table_of(quality, drawn(rng, DEMO_CLIP, cfg.evaluation_clips, model, 0.5), rng),
        "made-up footage": table_of(quality, [sample_footage(rng, DEMO_CLIP) for _ in range(cfg.evaluation_clips)], rng),
    }
    path = cfg.out / "quality.safetensors"
    measured = {"faults told apart, harmless changes": tables, "signals": list(FAULT_SIGNALS), "parameters": sum(p.numel() for p in quality.parameters())}
    write_card(path, lambda file: save_quality(file, quality), recipe="quality", cfg=cfg, data=data_hash, seconds=seconds, measured=measured)
    return {"weights": str(path), "seconds": seconds, **measured}
