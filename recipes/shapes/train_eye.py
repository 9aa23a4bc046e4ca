"""Train the eye on rendered clips: `python -m recipes.shapes.train_eye [--out FOLDER] [--seed N] [--steps N] [--clips N]`.

Writes `eye.safetensors` and its card `eye.json` (command, seed, wall time, hashes, accuracies on fresh clips). One thread, about four minutes. Clips show training
combinations only; blur, noise, colour shifts and smeared time stand in for what a video VAE does to them. Some clips are spliced from two others or show nothing:
there the eye learns to be unsure or to say no.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from base_model.checkpoint import atomic_write, save_weights
from base_model.types import ClipShape
from recipes.shapes.eye import COLOR_NAMES, MAX_THINGS, WEIGHTS, Eye, EyeNet
from recipes.shapes.prompts import MOTIONS, SHAPES, Thing, sample_prompt
from recipes.shapes.render import DEMO_CLIP, render, sample_clip_shape, sample_scene

STROBE, PAN, TWO = 0.2, 0.15, 0.35  # shares of the training clips that strobe, pan, show two things
FAINT, MORPHED = 0.08, 0.12  # shares whose things are half there or not at all, or look like a blend of two shapes
SPLICED = 0.08  # of a batch
BACKWARDS = {"left": "right", "right": "left", "up": "down", "down": "up", "up_right": "down_left", "down_left": "up_right", "grow": "shrink", "shrink": "grow"}


class Bank(NamedTuple):
    """n rendered clips of one size and what is in them; colour and motion are -1 where there is no (second) thing."""

    video: Tensor  # [n, T, 3, H, W] uint8
    color: Tensor  # [n, 2] int64
    motion: Tensor  # [n, 2] int64
    shape: Tensor  # [n, 2, 4] probabilities
    strength: Tensor  # [n] how much of the things is there: 1 but for faint clips


class Accuracy(NamedTuple):
    """Shares of right answers on fresh clips."""

    color: float
    """Clips where the eye says yes to exactly the colours that are there."""
    shape: float
    """Things whose shape it names."""
    motion: float
    """Things whose motion it names."""


class Example(NamedTuple):
    """One clip [T,3,H,W] uint8 and what is in it: `others` are the shapes blended in (the same ones where nothing is blended), by the share `blend`."""

    video: Tensor
    things: tuple[Thing, ...]
    others: tuple[str, ...]
    blend: float
    strength: float


def example(rng: np.random.Generator, clip: ClipShape) -> Example:
    """A training clip: mostly as rendered; sometimes faint, sometimes between two shapes."""
    prompt = sample_prompt(rng, two_objects=TWO)
    scene = sample_scene(prompt, rng, clip=clip, pan=PAN, flashing=bool(rng.random() < STROBE))
    video, kind = render(scene, clip), rng.random()
    if kind < FAINT:
        strength = max(0.0, rng.uniform(-0.5, 1))
        return Example(_bytes(torch.lerp(render(replace(scene, bodies=()), clip), video, strength)), prompt.things, _shapes(prompt.things), 0.0, strength)
    if kind < FAINT + MORPHED:
        blend = rng.uniform(0, 0.5)
        bodies = tuple(replace(body, thing=replace(body.thing, shape=SHAPES[int(rng.integers(len(SHAPES)))])) for body in scene.bodies)
        video = torch.lerp(video, render(replace(scene, bodies=bodies), clip), blend)
        return Example(_bytes(video), prompt.things, _shapes(tuple(body.thing for body in bodies)), blend, 1.0)
    return Example(_bytes(video), prompt.things, _shapes(prompt.things), 0.0, 1.0)


def _bytes(video: Tensor) -> Tensor:
    return (video * 255).round().to(torch.uint8)


def _shapes(things: tuple[Thing, ...]) -> tuple[str, ...]:
    return tuple(thing.shape for thing in things)


def render_banks(n: int, rng: np.random.Generator) -> list[Bank]:
    """n training clips, grouped by size: the demo's size and every native one."""
    groups: dict[ClipShape, list[Example]] = {}
    for _ in range(n):
        clip = sample_clip_shape(rng)
        groups.setdefault(clip, []).append(example(rng, clip))
    return [_bank(groups[clip]) for clip in sorted(groups, key=str)]


def _bank(examples: Sequence[Example]) -> Bank:
    names = torch.full((2, len(examples), MAX_THINGS), -1)
    shape = torch.zeros(len(examples), MAX_THINGS, len(SHAPES))
    for i, one in enumerate(examples):
        for j, thing in enumerate(one.things):
            names[:, i, j] = torch.tensor([COLOR_NAMES.index(thing.color), MOTIONS.index(thing.motion)])
            shape[i, j, SHAPES.index(thing.shape)] += 1 - one.blend
            shape[i, j, SHAPES.index(one.others[j])] += one.blend
    return Bank(torch.stack([one.video for one in examples]), names[0], names[1], shape, torch.tensor([one.strength for one in examples]))


def augment(video: Tensor, generator: torch.Generator) -> Tensor:
    """[B,T,3,H,W] in [0,1] -> the same with blur (0 to 1 pixel), smeared time, colour shifts and noise, each drawn per clip or per batch."""
    b, t = video.shape[:2]

    def draw(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    sigma = float(draw(0.0, 1.0, 1))
    if sigma > 0.3:
        taps = torch.exp(-torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).square() / (2 * sigma**2))
        taps = (taps / taps.sum()).expand(3, 1, 5)
        flat = F.pad(video.flatten(0, 1), (2, 2, 2, 2), mode="replicate")
        flat = F.conv2d(F.conv2d(flat, taps[:, :, None, :], groups=3), taps[:, :, :, None], groups=3)
        video = flat.unflatten(0, (b, t))
    if t > 1 and float(draw(0, 1, 1)) < 0.4:
        share = draw(0.0, 0.35, b, 1, 1, 1, 1)
        video = torch.cat([video[:, :1], video[:, 1:] * (1 - share) + video[:, :-1] * share], dim=1)
    gain, lift = draw(0.9, 1.1, b, 1, 3, 1, 1), draw(-0.05, 0.05, b, 1, 3, 1, 1)
    fade = draw(0.0, 0.2, b, 1, 1, 1, 1)  # towards grey
    video = (video * (1 - fade) + video.mean(2, keepdim=True) * fade) * gain + lift
    noise = torch.randn(video.shape, generator=generator) * draw(0.0, 0.05, b, 1, 1, 1, 1)
    return (video + noise).clamp(0, 1)


class Batch(NamedTuple):
    """B augmented clips and N questions with their answers."""

    video: Tensor  # [B, T, 3, H, W]
    present: Tensor  # [B, 6] probabilities
    clip: Tensor  # [N] int64
    color: Tensor  # [N] int64
    shape: Tensor  # [N, 4] probabilities
    motion: Tensor  # [N] int64, -1 where a single frame cannot tell


def draw_batch(bank: Bank, size: int, generator: torch.Generator) -> Batch:
    """Random clips of a bank, half of them played backwards, a few spliced from two (their colours count by the share of frames; nothing else is asked)."""
    rows = torch.randint(len(bank.video), (size,), generator=generator)
    video, color, motion = bank.video[rows].float() / 255, bank.color[rows], bank.motion[rows]
    back = torch.rand(size, generator=generator) < 0.5
    video = torch.where(back[:, None, None, None, None], video.flip(1), video)
    reverse = torch.tensor([MOTIONS.index(BACKWARDS.get(m, m)) for m in MOTIONS])
    motion = torch.where(back[:, None], reverse[motion], motion)
    present = _presence(color) * bank.strength[rows, None]  # [B, 6]
    asked = (color >= 0) & (bank.strength[rows, None] > 0.5)  # [B, 2]
    t = video.shape[1]
    if t > 1:
        spliced = max(1, round(SPLICED * size))
        other = torch.arange(spliced, 2 * spliced)
        cut = int(torch.randint(1, t, (1,), generator=generator))
        video[:spliced, cut:] = video[other, cut:]
        present[:spliced] = (cut / t) * present[:spliced] + (1 - cut / t) * present[other]
        asked[:spliced] = False
    else:
        motion = torch.full_like(motion, -1)
    clip, which = asked.nonzero(as_tuple=True)
    return Batch(augment(video, generator), present, clip, color[clip, which], bank.shape[rows][clip, which], motion[clip, which])


def _presence(color: Tensor) -> Tensor:
    """[B, 2] -> [B, 6]: 1 where a thing has that colour."""
    return F.one_hot(color + 1, len(COLOR_NAMES) + 1)[..., 1:].sum(1).float()


def loss_of(net: EyeNet, batch: Batch) -> Tensor:
    """3 x binary cross-entropy of presence + cross-entropy of shape + of motion, in nats."""
    said = net(batch.video, batch.clip, batch.color)
    loss = 3 * F.binary_cross_entropy_with_logits(said.present, batch.present) + F.cross_entropy(said.shape, batch.shape)
    moving = batch.motion >= 0
    return loss + F.cross_entropy(said.motion[moving], batch.motion[moving]) if bool(moving.any()) else loss


def train(banks: Sequence[Bank], *, seed: int, steps: int, batch: int = 32, lr: float = 3e-3) -> EyeNet:
    """AdamW, 100 steps of warm-up, then a cosine to zero. A bank is drawn as often as it has clips."""
    torch.manual_seed(seed)
    net = EyeNet().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * i / steps)))
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([float(len(bank.video)) for bank in banks])
    mean, start = 0.0, time.monotonic()
    for step in range(steps):
        bank = banks[int(torch.multinomial(sizes, 1, generator=generator))]
        loss = loss_of(net, draw_batch(bank, batch, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(step + 1, 100)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{steps}  loss {mean:.4f} nats  {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return net


def accuracy(eye: Eye, n: int, *, seed: int, split: str, clip: ClipShape = DEMO_CLIP, pan: float = 0.0, two_objects: float = 0.0, strobe: float = 0.0) -> Accuracy:
    """Right answers on n fresh clips, each of another prompt."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        prompt = sample_prompt(rng, split=split, two_objects=two_objects)
        scene = sample_scene(prompt, rng, clip=clip, pan=pan, flashing=bool(rng.random() < strobe))
        examples.append(Example(_bytes(render(scene, clip)), prompt.things, _shapes(prompt.things), 0.0, 1.0))
    bank = _bank(examples)
    clips, which = (bank.color >= 0).nonzero(as_tuple=True)
    said = eye.answer(bank.video.float() / 255, clips.tolist(), bank.color[clips, which].tolist())
    color = ((said.present > 0) == (_presence(bank.color) > 0)).all(1)
    shape, motion = said.shape.argmax(1) == bank.shape[clips, which].argmax(1), said.motion.argmax(1) == bank.motion[clips, which]
    return Accuracy(*(round(float(x.double().mean()), 4) for x in (color, shape, motion)))


def measure(eye: Eye, n: int, *, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies on fresh clips of the demo's size, by kind of clip. A panning camera moves the things too, which no prompt speaks of."""
    return {
        "one thing, training combinations": accuracy(eye, n, seed=seed, split="train")._asdict(),
        "one thing, held-out combinations": accuracy(eye, n, seed=seed + 1, split="eval")._asdict(),
        "two things, held-out combinations": accuracy(eye, n, seed=seed + 2, split="eval", two_objects=1.0)._asdict(),
        "one thing, strobing light": accuracy(eye, n, seed=seed + 3, split="eval", strobe=1.0)._asdict(),
        "one thing, panning camera": accuracy(eye, n, seed=seed + 4, split="eval", pan=1.0)._asdict(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Render, train, measure, write the weights and the card."""
    parser = argparse.ArgumentParser(prog="python -m recipes.shapes.train_eye", description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder for eye.safetensors and eye.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--clips", type=int, default=8000, help="rendered clips to train on")
    args = parser.parse_args(argv)
    start, cpu = time.monotonic(), time.process_time()
    torch.set_num_threads(1)
    banks = render_banks(args.clips, np.random.default_rng([args.seed, 1]))
    print(f"rendered {args.clips} clips in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    digest = hashlib.sha256()
    for bank in banks:
        for tensor in bank:
            digest.update(tensor.numpy().tobytes())
    net = train(banks, seed=args.seed, steps=args.steps)
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    path = args.out / "eye.safetensors"
    save_weights(path, net.state_dict(), {"what": "the eye of the simulated labelers"})
    card = {
        "what": "The eye: what simulated labelers see of a clip of the built-in world. Trained on rendered clips only.",
        "command": f"python -m recipes.shapes.train_eye --seed {args.seed} --steps {args.steps} --clips {args.clips}",
        "seed": args.seed,
        "threads": 1,
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "data_sha256": digest.hexdigest(),
        "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "torch": torch.__version__,
        "accuracy_on_fresh_clips": measure(Eye.load(path), 2000, seed=10_000 + args.seed),
        "license": "Apache-2.0",
    }
    atomic_write(path.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())
    print(json.dumps(card["accuracy_on_fresh_clips"], indent=2), file=sys.stderr)


if __name__ == "__main__":
    main()
