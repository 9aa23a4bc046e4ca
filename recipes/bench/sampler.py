"""Clips and forward passes a second of sampling and decoding, beside one clip at a time and beside diffusers' own classes at the same size.

Everything is measured in turn, repeat after repeat, in one process; ratios are medians over the repeats (above 1: ours is faster). The first, unmeasured repeat
warms up. The peer is `WanTransformer3DModel` with as many blocks, heads and channels and `FlowMatchEulerDiscreteScheduler` on our grid of times, both with fresh
weights: a forward pass costs the same whatever they are. It gets texts padded to the longest prompt of the batch, which is kinder than the 512 tokens Wan pads to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from align.config import Count
from align.kernels import ODE
from align.progress import Progress
from align.trajectory import rollout
from base_model.errors import UserError
from base_model.networks.packing import token_grid
from base_model.threads import in_threads
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import Conditioning
from recipes.bench._results import Bench, Row, check_can_end, columns, here, paired_ratio, spread, timed, write
from recipes.generate import Sampler, seeded_noise, times_of
from recipes.shapes.prompts import make_prompts

Name = Literal["ours", "one clip at a time", "diffusers"]
Part = Literal["denoise", "decode", "both"]
Denoise = Callable[[Tensor, Conditioning], Tensor]
Decode = Callable[[Tensor], Tensor]


class Config(Bench):
    model: Path | None = None
    """Network to sample; none means the shipped base."""
    peers: tuple[Literal["one clip at a time", "diffusers"], ...] = ("one clip at a time", "diffusers")
    """What is measured beside it."""
    clips: Count = 64
    """Clips of one repeat."""
    repeats: Count = 7
    """Measured repeats. `quick` takes at most 3."""
    sampler: Sampler = Sampler()
    """Size of the clips and number of steps."""


class Contestant:
    """One way to sample: `denoise` noise [B,C,F,H,W] and conditions B -> x0 [B,C,F,H,W]; `decode` x0 -> clips [B,T,3,H,W], None where it has no decoder of ours."""

    def __init__(self, denoise: Denoise, decode: Decode | None, parameters: int) -> None:
        self.denoise, self.decode, self.parameters = denoise, decode, parameters
        self.seconds: dict[Part, list[float]] = {"denoise": [], "decode": [], "both": []}

    def repeat(self, noise: Tensor, cond: Conditioning, *, measured: bool) -> None:
        x0, denoising = timed(lambda: self.denoise(noise, cond))
        found: dict[Part, float] = {"denoise": denoising}
        if (decode := self.decode) is not None:
            found["decode"] = timed(lambda: decode(x0))[1]
            found["both"] = denoising + found["decode"]
        for part, seconds in found.items() if measured else ():
            self.seconds[part].append(seconds)


def contestants(model: LatentVideoModel, sampler: Sampler, peers: Sequence[Name]) -> dict[Name, Contestant]:
    """Ours first, then the peers asked for."""
    times = times_of(model, sampler)  # [K+1]

    def denoise(noise: Tensor, cond: Conditioning) -> Tensor:
        return rollout(model, ODE(), noise, times, cond, noise=torch.Generator()).x0

    def batches(clips: int) -> list[Tensor]:
        return list(torch.arange(clips).split(sampler.batch))

    def side_by_side(noise: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat(in_threads(lambda rows: denoise(noise[rows], cond[rows]), batches(len(noise)), model.device))

    def decode_side_by_side(x0: Tensor) -> Tensor:
        return torch.cat(in_threads(lambda rows: model.decode(x0[rows]), batches(len(x0)), model.device))

    def one_by_one(noise: Tensor, cond: Conditioning) -> Tensor:
        return torch.cat([denoise(noise[k : k + 1], cond[k : k + 1]) for k in range(len(noise))])

    def decode_one_by_one(x0: Tensor) -> Tensor:
        return torch.cat([model.decode(clip[None]) for clip in x0])

    own = sum(parameter.numel() for parameter in model.network.parameters())
    makers: dict[Name, Callable[[], Contestant]] = {
        "ours": lambda: Contestant(side_by_side, decode_side_by_side, own),
        "one clip at a time": lambda: Contestant(one_by_one, decode_one_by_one, own),
        "diffusers": lambda: diffusers_peer(model, times),
    }
    return {name: makers[name]() for name in ("ours", *peers)}


def diffusers_peer(model: LatentVideoModel, times: Tensor) -> Contestant:
    """Wan's transformer at the size of our network, with fresh weights, and the Euler scheduler of diffusers on the grid `times` [K+1]."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

    size = model.config
    network = WanTransformer3DModel(
        patch_size=size.patch,
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=size.channels,
        out_channels=size.channels,
        text_dim=size.text_width,
        freq_dim=size.width,
        ffn_dim=size.mlp_ratio * size.width,
        num_layers=size.depth,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()

    def denoise(noise: Tensor, cond: Conditioning) -> Tensor:
        scheduler.set_timesteps(sigmas=times[:-1].tolist())
        x = noise
        for t in scheduler.timesteps:
            u = network(x, t.expand(len(x)), cond.text, return_dict=False)[0]  # [B,C,F,H,W]
            x = scheduler.step(u, t, x, return_dict=False)[0]  # [B,C,F,H,W]
        return x

    return Contestant(denoise, None, sum(parameter.numel() for parameter in network.parameters()))


@torch.no_grad()
def measure(model: LatentVideoModel, sampler: Sampler, peers: Sequence[Name], *, clips: int, repeats: int) -> list[Row]:
    """One row for each contestant and part."""
    prompts = [prompt.text for prompt in make_prompts(clips, seed=0, split="eval")]
    cond, noise = model.encode_text(prompts), seeded_noise(model, sampler.clip, range(clips))  # [B,C,F,H,W]
    entrants = contestants(model, sampler, peers)
    with Progress("sampler", total=(1 + repeats) * len(entrants)) as progress:
        for repeat in range(1 + repeats):
            for k in range(len(entrants)):
                name = list(entrants)[(k + repeat) % len(entrants)]  # nobody is always first
                entrants[name].repeat(noise, cond, measured=repeat > 0)
                progress.advance(name)
    f, h, w = token_grid(noise.shape, model.config.patch)
    size = {"clip": str(sampler.clip), "clips": clips, "steps": sampler.steps, "tokens_per_clip": f * h * w, "repeats": repeats}
    return [
        _row(name, part, entrant, entrants["ours"].seconds[part], size)
        for part in ("denoise", "decode", "both")
        for name, entrant in entrants.items()
        if entrant.seconds[part]
    ]


def _row(name: Name, part: Part, entrant: Contestant, ours: Sequence[float], size: Mapping[str, Any]) -> Row:
    mine = entrant.seconds[part]
    seconds, ratio = spread(mine), None if mine is ours else paired_ratio(mine, ours)
    return {
        "name": name,
        "part": part,
        **size,
        "parameters": None if part == "decode" else entrant.parameters,
        **columns("seconds", seconds),
        "clips_per_second": size["clips"] / seconds.median,
        "forward_passes_per_second": None if part == "decode" else size["clips"] * size["steps"] / seconds.median,
        "times_slower_than_ours": ratio and ratio.median,
        "times_slower_low": ratio and ratio.low,
        "times_slower_high": ratio and ratio.high,
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: a benchmark is measured anew."""
    check_can_end(cfg)
    if cfg.sampler.guidance != 1:
        raise UserError("guidance doubles the passes of every side alike and is not measured, sampler.guidance. Leave it at 1")
    rows = measure(load_tiny(cfg.model), cfg.sampler, cfg.peers, clips=cfg.clips, repeats=min(cfg.repeats, 3) if cfg.quick else cfg.repeats)
    if cfg.write:
        write(cfg, "sampler", here("sampler", cfg), "Sampling and decoding", {"Clips and forward passes a second": rows})
    return {"rows": rows}
