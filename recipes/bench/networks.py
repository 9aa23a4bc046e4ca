"""DiT against U-ViT at equal FLOPs: parameters, FLOPs a token, seconds a step, and the held-out loss after equal training.

Both are trained from nothing by `sft.train` on the same pairs in the same packs with the same noise, seed after seed in turn. Sizes are matched by the matrix products of one
forward pass, which `FlopCounterMode` counts on the meta device (torch knows no formula for the CPU's attention kernel); both must agree within 2 %. A U-ViT sends text and time
through every block, so its FLOPs are counted at the lengths of real captions. The learning rate is the one the DiT was pretrained with; nothing was tuned for either here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from align.config import Config as BaseConfig
from align.config import Count
from align.progress import Progress
from align.run import Run, read_metrics
from base_model.errors import UserError
from base_model.networks.layers import NetworkConfig
from base_model.networks.packing import Segments
from base_model.prompts.text import TextEncoder
from base_model.tiny import CONFIGS, WEIGHTS, LatentCodec, LatentVideoModel, NetworkName, build_network, load_codec, packed_text
from base_model.types import ClipShape
from recipes.bench._results import Bench, Row, check_can_end, columns, here, paired_ratio, spread, write
from recipes.fit import Fit, held_out_losses
from recipes.pairs import Pairs, encode_pairs
from recipes.sft import METRICS, train
from recipes.shapes.dataset import draw_clips

CLOSE = 0.02
"""FLOPs of both may differ by this share."""


class Size(BaseConfig):
    """The size of a network."""

    width: Count
    """Width."""
    depth: Count
    """Blocks."""
    heads: Count = 4
    """Heads of attention."""


class Config(Bench):
    dit: Size = Size(width=128, depth=4)
    """The DiT: the shipped size."""
    uvit: Size = Size(width=112, depth=5)
    """The U-ViT: a size that costs as much."""
    seeds: Count = 3
    """Trainings of each network, with seeds 0, 1, ... `quick` takes 1."""
    clips: Count = 4_000
    """Curated pairs to train on. `quick` takes at most 64."""
    fit: Fit = Fit(iterations=400, lr=5e-3, optimizer="muon", time_shift=2.5, save_every=10_000, evaluate_every=10_000)
    """How both are trained. `quick` takes at most 6 iterations and 16 held-out clips."""


def architecture(name: NetworkName, size: Size, codec: LatentCodec, key: str) -> NetworkConfig:
    """The architecture of that size on this codec's latents; a quarter of a head turns with time, the rest with height and width.

    Raises UserError where heads do not divide, naming the key of the configuration that holds the size.
    """
    head, left = divmod(size.width, size.heads)
    if left or head % 2 or head < 8:
        raise UserError(f"{key}: {size.heads} heads do not divide a width of {size.width} into even parts of at least 8. Give another --{key}.width")
    time = 2 * (head // 8)
    height = 2 * ((head - time) // 4)
    return CONFIGS[name](channels=codec.vae.config.channels, width=size.width, depth=size.depth, heads=size.heads, rotary_axes=(time, height, head - time - height))


def forward_flops(config: NetworkConfig, segments: Segments, text_segments: Segments) -> int:
    """Floating point operations (two a multiply-add) of one forward pass over a pack."""
    with torch.device("meta"):
        network = build_network(config)
        tokens, positions, t = torch.empty(segments.total, config.token_width), torch.empty(segments.total, 3), torch.empty(len(segments))
        text = torch.empty(text_segments.total, config.text_width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(tokens, positions, segments, t, text, text_segments)
    return counter.get_total_flops()


class Trained(NamedTuple):
    """One training: the median seconds of its steps, and the held-out loss of its averaged weights."""

    seconds: float
    held_out_loss: float


def train_once(cfg: Config, model: LatentVideoModel, seed: int, pairs: Pairs, held_out: Pairs) -> Trained:
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as folder:
        run = Run(Path(folder) / "run", cfg, seed=seed, resume=False, metrics=METRICS, quiet=True)
        model.to(run.device)
        train(cfg.fit, run, model, pairs, held_out)
        begins = [line["seconds"] for line in read_metrics(run.out) if "loss" in line]
        loss = float(held_out_losses(model, held_out, run.generator("held out", 0)).mean())
    return Trained(median(b - a for a, b in pairwise(begins)), loss)


def measure(cfg: Config) -> list[Row]:
    """One row a network, DiT first."""
    codec, text = load_codec(WEIGHTS / "vae.safetensors"), TextEncoder()
    configs = {name: architecture(name, getattr(cfg, name), codec, name) for name in CONFIGS}
    anyone = LatentVideoModel(build_network(configs["dit"]), codec, text, configs["dit"])
    held_out = encode_pairs(anyone, draw_clips("curated", cfg.fit.held_out, seed=1_000_003, shape=ClipShape(13, 32, 32)))
    segments, words = Segments(tuple(held_out.num_tokens(configs["dit"].patch))), packed_text(anyone.encode_text(held_out.texts))[1]
    flops = {name: forward_flops(config, segments, words) for name, config in configs.items()}
    if abs(flops["uvit"] / flops["dit"] - 1) > CLOSE:
        raise UserError(f"uvit needs {flops['uvit'] / flops['dit']:.3f} times the FLOPs of dit; they must agree within {CLOSE:.0%}. Give another --uvit.width or --uvit.depth")
    pairs = encode_pairs(anyone, draw_clips("curated", cfg.clips, seed=0))
    found: dict[NetworkName, list[Trained]] = {name: [] for name in configs}
    with Progress("networks", total=cfg.seeds * len(configs)) as progress:
        for seed in range(cfg.seeds):
            for name, config in configs.items():
                torch.manual_seed(seed)
                found[name].append(train_once(cfg, LatentVideoModel(build_network(config), codec, text, config), seed, pairs, held_out))
                progress.advance(name)
    size = {"clip": "13x32x32", "tokens_per_clip": segments.total / len(segments), "text_tokens_per_clip": words.total / len(words)}
    return [
        _row(name, config, found[name], found["dit"], size | {"flops_over_dit": flops[name] / flops["dit"], "forward_flops_per_token": flops[name] / segments.total}, cfg)
        for name, config in configs.items()
    ]


def _row(name: NetworkName, config: NetworkConfig, mine: Sequence[Trained], dit: Sequence[Trained], size: Row, cfg: Config) -> Row:
    seconds, losses = spread([one.seconds for one in mine]), [one.held_out_loss for one in mine]
    return {
        "network": name,
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "parameters": sum(parameter.numel() for parameter in build_network(config).parameters()),
        **size,
        "seeds": cfg.seeds,
        "iterations": cfg.fit.iterations,
        "seconds_per_step": seconds.median,
        "seconds_low": seconds.low,
        "seconds_high": seconds.high,
        "times_slower_than_dit": paired_ratio([one.seconds for one in mine], [one.seconds for one in dit]).median if mine is not dit else None,
        **columns("held_out_loss", (sum(losses) / len(losses), min(losses), max(losses))),
        "loss_minus_dit": sum(a.held_out_loss - b.held_out_loss for a, b in zip(mine, dit, strict=True)) / len(losses) if mine is not dit else None,
    }


def shrunk(cfg: Config) -> Config:
    """The quick form: one short training of each."""
    fit = cfg.fit.model_copy(update={"iterations": min(6, cfg.fit.iterations), "held_out": min(16, cfg.fit.held_out)})
    return cfg.model_copy(update={"seeds": 1, "clips": min(64, cfg.clips), "fit": fit})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    if cfg.fit.iterations < 2:
        raise UserError("fit.iterations must be at least 2: the first step warms up and is not counted. Give --fit.iterations 400")
    rows = measure(shrunk(cfg) if cfg.quick else cfg)
    if cfg.write:
        remark = (
            f"Means over {rows[0]['seeds']} seeds; `low` and `high` are the extremes. Seconds are medians over the steps of a training; ratio and difference are of the same seed."
        )
        write(cfg, "networks", here("networks", cfg), "DiT against U-ViT at equal FLOPs", {"The same data, packs, noise and optimizer": rows}, remarks=[remark])
    return {"rows": rows}
