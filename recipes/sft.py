"""Supervised fine-tuning on captioned clips of mixed sizes and lengths, of the built-in model or of an open family (`rushes sft`).

Flow matching on the model's own path (Lipman et al. 2022, arXiv 2210.02747, eq. 14), one noise level a clip; all weights, or LoRA. Where the network packs (the built-in one, Wan)
clips of any sizes share a sequence; elsewhere those of one shape share a batch. No clip is dropped, and none is seen twice before all have been seen once.
Some clips give part of themselves as a visual prompt (`conditions`): that has noise level 0 and no loss. Clips of what the model did before (`remember`) keep it from forgetting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Whole
from align.data import PackSampler
from align.ema import EMA
from align.objectives import Loss
from align.optimizers import build_optimizer, warmup_cosine
from align.run import Run
from base_model.lora import add_lora, merge
from base_model.networks.routing import middle
from base_model.tiny import LatentVideoModel, load_tiny, save_network
from base_model.types import ClipShape
from recipes.filters import read_lineage
from recipes.fit import Fit as Fit
from recipes.fit import held_out_losses, pack_loss
from recipes.pairs import Pairs, encode_pairs, load_pairs
from recipes.shapes.dataset import draw_clips
from recipes.weights import file_hash, write_card

METRICS = {
    "loss": "Flow-matching error, mean over the elements of a clip, then over the clips of the step (over their tokens by fit.reduction); unit velocity^2 per latent element.",
    "remembered_loss": "The same of the clips to remember, before its weight; only where some are given.",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Learning rate of this step.",
    "clips": "Clips in the micro-batches of the step.",
    "tokens": "Latent tokens in the micro-batches of the step, before any are dropped.",
    "clips_per_second": "Clips learned from a second, without the time of looks at held-out clips.",
    "tokens_per_second": "Latent tokens a second, likewise.",
    "mfu": "Model FLOPs a second as a share of what the processes' devices can do at most (`base_model/flops.py`); what is computed again is not counted.",
    "data_wait": "Share of the step's time in which it waited for latents and captions.",
    "peak_memory_bytes": "Most memory so far: of the GPU, or of this process and its children where there is none.",
    "held_out_loss": "Flow-matching error of held-out clips at fixed noise quantiles, on the averaged weights.",
    "held_out_loss_raw": "The same on the weights as they are.",
    "held_out_loss_low_noise": "The same as held_out_loss, at the quarter of the quantiles with the least noise.",
    "held_out_loss_high_noise": "The same as held_out_loss, at the quarter of the quantiles with the most noise.",
    "right": "Share of the sample grid's clips that the judge of the built-in world finds right in every attribute; only where it knows the prompts.",
}


class Remember(BaseConfig):
    """Loss on data of what the model did before, so that it does not forget it."""

    data: Path | None = None
    """Folder of captioned clips, as `data`: such as the model was trained on, or clips that it made itself. None remembers nothing."""
    weight: Positive = 1.0
    """Weight of their mean error beside that of the clips that are learned."""
    packs: Count = 1
    """Micro-batches of a step that are theirs, on top of `fit.packs`."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from: micro-batches ready to be asked for their loss. Those of the clips that are learned come first, `own` of them."""

    parts: Sequence[Callable[[], Iterator[Loss]]]
    own: int
    clips: int
    tokens: int
    flops: float = 0.0


class Speed:
    """What the last step did a second, and how long it waited for data."""

    def __init__(self, peak: float, waited: Callable[[], float], memory: Callable[[], int]) -> None:
        """peak: FLOP/s of all devices; waited: seconds of waiting so far; memory: most bytes so far."""
        self.peak, self.waited, self.memory = peak, waited, memory
        self.begin()

    def begin(self) -> None:
        """A step begins; what was before does not count."""
        self._begun, self._waited = time.monotonic(), self.waited()

    def of(self, step: Step) -> dict[str, float]:
        seconds = time.monotonic() - self._begun
        found = {"clips_per_second": step.clips / seconds, "tokens_per_second": step.tokens / seconds, "mfu": step.flops / seconds / self.peak}
        return {**found, "data_wait": (self.waited() - self._waited) / seconds, "peak_memory_bytes": float(self.memory())}


def fit_network(
    fit: Fit, run: Run, network: torch.nn.Module, step_of: Callable[[int], Step], look: Callable[[EMA], None], *, fused: bool = False, speed: Speed | None = None
) -> None:
    """Fits what trains of `network`, and leaves the averaged weights in it. look: called every `evaluate_every` steps and behind the last one."""
    optimizer = build_optimizer(network, fit.optimizer, lr=fit.lr, fused=fused)
    schedule = warmup_cosine(optimizer, fit.iterations)
    average = EMA(network, fit.ema_decay)
    for name, thing in (("optimizer", optimizer), ("schedule", schedule), ("average", average)):
        run.register(name, thing)
    for i in run.iterations(fit.iterations, save_every=fit.save_every, label="sft"):
        if speed is not None:
            speed.begin()
        step = step_of(i)
        losses = run.backward_each(optimizer, lambda part: part(), run.share(step.parts))
        rate = optimizer.param_groups[0]["lr"]
        norm = run.step(optimizer, fit.max_grad_norm, schedule)
        average.update()
        remembered = {} if step.own == len(losses) else {"remembered_loss": torch.stack([loss.stats["remembered"] for loss in losses[step.own :]]).sum()}
        own = torch.stack([loss.value for loss in losses[: step.own]]).sum()
        pace = {} if speed is None else speed.of(step)
        run.log(loss=own, grad_norm=norm, learning_rate=rate, clips=step.clips, tokens=step.tokens, **remembered, **pace)
        if (i + 1) % fit.evaluate_every == 0 or i + 1 == fit.iterations:
            look(average)
    average.apply()


def train(fit: Fit, run: Run, model: LatentVideoModel, pairs: Pairs, held_out: Pairs) -> None:
    """Fits the built-in `model.network` to `pairs`; leaves the averaged weights in it. Raises UserError where tokens are to skip the middle of a network that has none."""
    if fit.routed:
        middle(model.config.depth)
    lengths = pairs.num_tokens(model.config.patch)
    sampler = PackSampler(lengths, fit.capacity, seed=run.seed)

    def step_of(i: int) -> Step:
        chosen = [sampler[i * fit.packs + k] for k in range(fit.packs)]  # packs times S clips
        clips = sum(map(len, chosen))
        parts = [partial(pack_loss, fit, model, pairs, clips, (rows, run.generator("noise", i * fit.packs + k))) for k, rows in enumerate(chosen)]
        return Step(parts, len(parts), clips, sum(lengths[j] for rows in chosen for j in rows))

    def look(average: EMA) -> None:
        with average.swap(), run.looking():
            errors = held_out_losses(model, held_out, run.generator("held out", 0))
        run.log(held_out_loss=errors.mean(), held_out_loss_low_noise=errors[:2].mean(), held_out_loss_high_noise=errors[-2:].mean())

    run.register("network", model.network)
    run.count_forwards(model.network)
    fit_network(fit, run, model.network, step_of, look)


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
