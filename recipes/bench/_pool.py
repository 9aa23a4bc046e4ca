"""Clips of the built-in world that benchmarks have ranked: what the reward model's inputs and the simulated labelers' eye say of each, made once and kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from base_model.checkpoint import load_weights, save_weights
from base_model.prompts.text import TextEncoder
from base_model.tiny import load_tiny
from recipes.bench._people import to_tensor
from recipes.generate import Sampler, network_lineage, sample
from recipes.match import ATTRIBUTES, SHIPPED, change
from recipes.quality import SHIPPED as QUALITY
from recipes.shapes.eye import WEIGHTS as EYE
from recipes.shapes.eye import Eye
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP, blur, render, sample_scene
from recipes.weights import file_hash
from reward.matcher import load_matcher
from reward.model import INPUTS, RewardModel
from reward.quality import load_quality

Source = Literal["drawn", "sampled"]
POOL_SEED = 700_000
WRONG = (0.3, 0.4, 0.2, 0.1)
"""Shares of drawn clips with none to three attributes wrong."""


def asked(prompts: int) -> list[ShapesPrompt]:
    """The prompts of every pool."""
    return make_prompts(prompts, seed=POOL_SEED, split="train", two_objects=0.2)


def kept_pool(folder: Path, source: Source, prompts: int, clips: int) -> dict[str, Tensor]:
    """`make_pool` for these settings, made once and read from `folder` ever after."""
    path = folder / f"pool-{hashlib.sha256(json.dumps(pool_settings(source, prompts, clips)).encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        print(f"making the {prompts * clips:,} {source} clips of the pool", file=sys.stderr, flush=True)
        save_weights(path, make_pool(source, prompts, clips), {})
    tensors, _ = load_weights(path)
    return tensors


def pool_settings(source: Source, prompts: int, clips: int) -> Mapping[str, Any]:
    """What a pool depends on."""
    network = network_lineage(None) if source == "sampled" else ""
    files = {"matcher": file_hash(SHIPPED["reward"]), "quality": file_hash(QUALITY["reward"]), "eye": file_hash(EYE), "network": network}
    return {"seed": POOL_SEED, "source": source, "prompts": prompts, "clips": clips, "inputs": list(INPUTS), **files}


def make_pool(source: Source, prompts: int, clips: int) -> dict[str, Tensor]:
    """`inputs` of the reward model [C,26] and what the eye has `seen` [C,11] of `clips` clips of every prompt; minutes for thousands."""
    chosen, encode, eye = asked(prompts), TextEncoder(), Eye.load()
    encode([prompt.text for prompt in chosen])
    model = RewardModel(load_matcher(SHIPPED["reward"]), load_quality(QUALITY["reward"]), ("overall",), encode).eval()
    make: Callable[[Sequence[ShapesPrompt], int], Iterator[Tensor]] = drawn if source == "drawn" else sampled
    inputs, seen = [], []
    for prompt, video in zip(chosen, make(chosen, clips), strict=True):
        with torch.no_grad():
            inputs.append(model.inputs(video, [prompt.text] * clips))
        seen.append(to_tensor(eye.look(video, [prompt] * clips)))
    return {"inputs": torch.cat(inputs), "seen": torch.cat(seen)}


def drawn(prompts: Sequence[ShapesPrompt], clips: int) -> Iterator[Tensor]:
    """Of each prompt, clips [clips,T,3,H,W] as `draw_clip` makes them."""
    for number, prompt in enumerate(prompts):
        yield torch.stack([draw_clip(prompt, np.random.default_rng([POOL_SEED, number, i])) for i in range(clips)])


def draw_clip(prompt: ShapesPrompt, rng: np.random.Generator) -> Tensor:
    """A clip of a prompt with what is wrong planted: some attributes, one in ten blurred, one in ten flashing."""
    things = prompt.things
    for attribute in rng.permutation(len(ATTRIBUTES))[: rng.choice(len(WRONG), p=WRONG)]:
        things = change(things, ATTRIBUTES[attribute], rng, unseen=True)
    blurred, flashing = (bool(rng.random() < 0.1) for _ in range(2))
    video = render(sample_scene(ShapesPrompt("", "", things, False, "train"), rng, clip=DEMO_CLIP, flashing=flashing), DEMO_CLIP)
    return blur(video, rng.uniform(0.8, 1.3)) if blurred else video


def sampled(prompts: Sequence[ShapesPrompt], clips: int) -> Iterator[Tensor]:
    """Of each prompt, clips [clips,T,3,H,W] of the shipped base, the sampler's batch at once."""
    model, sampler = load_tiny(), Sampler()
    together = max(1, sampler.batch // clips)
    for start in range(0, len(prompts), together):
        cond = model.encode_text([prompt.text for prompt in prompts[start : start + together] for _ in range(clips)])
        seeds = [POOL_SEED + start * clips + i for i in range(len(cond))]
        yield from torch.cat(list(sample(model, cond, seeds, sampler))).split(clips)
