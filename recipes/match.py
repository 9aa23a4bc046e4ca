"""Pre-train a video-text matcher on captioned clips of the built-in world: the frozen start of every reward model.

Every clip is held against its own caption, three captions with one attribute changed (shape, colour, motion), and the captions of
other clips; the loss is the cross-entropy of its own (InfoNCE: van den Oord et al. 2018, arXiv 1807.03748, with hard negatives). Beside it
one linear layer names the words of the caption, once from the clip's vector and once from the text's (Mahajan et al. 2018, arXiv 1805.00932,
did so with hashtags): colours are learned without it, but shapes and motions many times faster with it. It is thrown away at the end.

The data is as messy as the base model's: wrong captions, blur, uninvited flashing. Some clips are noised and denoised again by the base model: they look
generated, and what they show is known. Augmentation adds more of what a generator gets wrong: softness, noise, shifted colours, missing patches.

    rushes match --seed 1 --out runs/match-1        two seeds are shipped: one starts reward models, one starts guards
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share, Whole
from align.kernels import ODE
from align.run import Run
from align.trajectory import rollout
from base_model.paths import add_noise
from base_model.prompts.text import TextEncoder
from base_model.tiny import LatentVideoModel, load_tiny
from base_model.types import ClipShape
from recipes.shapes.prompts import COLORS, MOTIONS, SHAPES, ShapesPrompt, Thing, is_held_out, sample_prompt, write_prompt
from recipes.shapes.render import DEMO_CLIP, Facts, render, sample_messy_pair, sample_scene
from recipes.weights import write_card
from reward.matcher import Matcher, MatcherSize, save_matcher

WEIGHTS = Path(__file__).parents[1] / "reward" / "weights"
SHIPPED = {"reward": WEIGHTS / "matcher-reward.safetensors", "guard": WEIGHTS / "matcher-guard.safetensors"}
Attribute = Literal["shape", "color", "motion"]
ATTRIBUTES: tuple[Attribute, ...] = ("shape", "color", "motion")
VALUES: dict[Attribute, Sequence[str]] = {"shape": SHAPES, "color": tuple(COLORS), "motion": MOTIONS}
OTHER_SHAPES = (ClipShape(5, 32, 32), ClipShape(9, 24, 40), ClipShape(17, 40, 24), ClipShape(25, 32, 32))
METRICS = {
    "loss": "Cross-entropy of a clip's own caption among its 3 hard and 2 other captions, plus 4 times `named`; nats.",
    "named": "Cross-entropy of the caption's words (rare words weigh more) under what the clip was seen to show, nats.",
    "accuracy": "Share of clips whose own caption scores highest among those 6 (10 % of captions are wrong on purpose).",
    "grad_norm": "Norm of the gradient before clipping.",
    "learning_rate": "Step size of AdamW.",
}


class Config(BaseConfig):
    out: Path = Path("runs/match")
    """Folder of the run; `matcher.safetensors` and `matcher.json` appear in it."""
    seed: Seed = 1
    """Seed of data, weights and order."""
    clips: Count = 8000
    """Clips of the demo's size in the training set; a tenth as many again in four other sizes."""
    regenerated: Share = 0.6
    """Share of the clips that the base model denoises again from a time between 0.2 and 0.7: later than that the shape seldom stays what it was."""
    iterations: Count = 3500
    """Optimizer steps."""
    morphed: Share = 0.2
    """Share of the clips whose things look like a blend with another shape, less than half of it: generators make those, and people still see which it is more."""
    batch: Count = 24
    """Clips a step."""
    others: Whole = 2
    """Captions of other clips each clip is held against."""
    learning_rate: Positive = 3e-3
    """Peak step size (linear warm-up over 100 steps, then a cosine to zero)."""
    save_every: Count = 500
    """Steps between checkpoints."""
    evaluation_clips: Count = 400
    """Fresh clips for the accuracy table."""


@dataclass(frozen=True)
class Captioned:
    """Clips of one size: pixels, and for each the row of its own caption and of three changed ones in the texts."""

    video: Tensor  # [N,T,3,H,W] uint8
    caption: Tensor  # [N,4] int64: own, then shape, color, motion changed


class Texts:
    """Captions encoded once, padded to one length, in half precision; and which words each has, rare words weighing more (idf)."""

    def __init__(self, captions: Sequence[str], encode: TextEncoder) -> None:
        unique = sorted(set(captions))
        self.row = {caption: i for i, caption in enumerate(unique)}
        encoded = encode(unique)
        self.text, self.mask = encoded.text.half(), encoded.mask  # [M,L,D], [M,L]
        said = [set(caption.split()) for caption in unique]
        words = sorted(set().union(*said))
        has = torch.tensor([[word in caption for word in words] for caption in said], dtype=torch.float32)  # [M,W]
        weight = has * torch.log(len(unique) / has.sum(0))
        self.words = weight / weight.sum(1, keepdim=True).clamp(min=1e-6)  # [M,W] a distribution for each caption

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [R] -> text [R,L,D] float32 and mask [R,L], cut to the longest of them."""
        mask = self.mask[rows]
        length = int(mask.sum(-1).max())
        return self.text[rows, :length].float(), mask[:, :length]


def change(things: tuple[Thing, ...], attribute: Attribute, rng: np.random.Generator, *, unseen: bool = False) -> tuple[Thing, ...]:
    """The things with one attribute of one of them changed; colours stay different, and combinations in training unless `unseen`."""
    i = int(rng.integers(len(things)))
    taken = {thing.color for j, thing in enumerate(things) if j != i}
    values = asdict(things[i])
    options = [Thing(**{**values, attribute: value}) for value in VALUES[attribute] if value != values[attribute]]
    options = [thing for thing in options if thing.color not in taken and (unseen or not is_held_out(thing))]
    return (*things[:i], options[int(rng.integers(len(options)))], *things[i + 1 :])


def captioned_clips(rng: np.random.Generator, clip: ClipShape, n: int, *, model: LatentVideoModel, regenerated: float, morphed: float) -> tuple[Tensor, list[list[str]]]:
    """n messy pairs: pixels [n,T,3,H,W] uint8 and, for each, its caption and three captions with one attribute of the scene changed.

    A changed caption is that of another clip where one says so (encoding text is the dearest part of this), else newly written.
    """
    video, shown, captions = torch.empty(n, clip.frames, 3, clip.height, clip.width, dtype=torch.uint8), [], []
    said: dict[tuple[Thing, ...], list[str]] = {}
    for i in range(n):
        caption, pixels, facts = morphed_pair(rng, clip) if rng.random() < morphed else sample_messy_pair(rng, clip)
        video[i] = (pixels * 255).round().to(torch.uint8)
        shown.append(facts.prompt)
        captions.append([caption])
        if not (facts.wrong_caption or facts.strobe):
            said.setdefault(facts.prompt.things, []).append(caption)
    for prompt, group in zip(shown, captions, strict=True):
        for attribute in ATTRIBUTES:
            things = change(prompt.things, attribute, rng)
            known = said.get(things, []) if not prompt.strobe else []
            group.append(known[int(rng.integers(len(known)))] if known else write_prompt(things, rng, split="train", strobe=prompt.strobe).text)
    again = torch.from_numpy(np.flatnonzero(rng.random(n) < regenerated))
    for rows in again.split(64) if len(again) else ():
        t = torch.from_numpy(rng.uniform(0.2, 0.7, len(rows))).float()
        made = regenerate(model, video[rows].float() / 255, [shown[i].text for i in rows.tolist()], t, torch.Generator().manual_seed(int(rng.integers(2**31))))
        video[rows] = (made * 255).round().to(torch.uint8)
    return video, captions


def morphed_pair(rng: np.random.Generator, clip: ClipShape) -> tuple[str, Tensor, Facts]:
    """A clean pair whose things are blended with another shape by less than half."""
    prompt = sample_prompt(rng, two_objects=0.25)
    scene = sample_scene(prompt, rng, clip=clip, pan=0.1)
    bodies = [replace(body, thing=replace(body.thing, shape=str(rng.choice([shape for shape in SHAPES if shape != body.thing.shape])))) for body in scene.bodies]
    video = torch.lerp(render(scene, clip), render(replace(scene, bodies=tuple(bodies)), clip), rng.uniform(0, 0.5))
    return prompt.text, video, Facts(prompt, False, False, False, False)


def regenerate(model: LatentVideoModel, video: Tensor, prompts: Sequence[str], t: Tensor, generator: torch.Generator, *, steps: int = 5) -> Tensor:
    """Noise clips [B,T,3,H,W] to the times t [B] and denoise them in a few steps (SDEdit: Meng et al. 2022, arXiv 2108.01073)."""
    x0 = model.encode(video)  # [B,C,F,H,W]
    x_t = add_noise(model.path, x0, torch.randn(x0.shape, generator=generator), t)
    times = torch.linspace(1, 0, steps + 1)[:, None] * t  # [K+1,B]
    return model.decode(rollout(model, ODE(), x_t, times, model.encode_text(prompts), noise=generator).x0)


@torch.no_grad()
def make_data(cfg: Config, rng: np.random.Generator, model: LatentVideoModel) -> tuple[list[Captioned], Texts, str]:
    """The training set, its texts, and the sha256 of both: first the demo's size, then the others."""
    sizes = [(DEMO_CLIP, cfg.clips), *((clip, cfg.clips // 40) for clip in OTHER_SHAPES)]
    parts = [captioned_clips(rng, clip, n, model=model, regenerated=cfg.regenerated, morphed=cfg.morphed) for clip, n in sizes if n]
    texts = Texts([caption for _, captions in parts for group in captions for caption in group], model.text)
    digest = hashlib.sha256()
    for video, captions in parts:
        digest.update(video.numpy().tobytes())
        digest.update(json.dumps(captions).encode())
    data = [Captioned(video, torch.tensor([[texts.row[c] for c in group] for group in captions])) for video, captions in parts]
    return data, texts, digest.hexdigest()


def augment(video: Tensor, generator: torch.Generator) -> Tensor:
    """What generated clips look like to a reader of rendered ones: softer, noisier, off in brightness and contrast, with patches missing.

    [B,T,3,H,W] in [0,1] -> the same; everything is drawn anew for every clip.
    """
    b, t, _, h, w = video.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    video = blur(video, uniform(0.2, 1, b).square())
    scale, shift = uniform(0.8, 1.2, b, 1, 3, 1, 1).lerp(uniform(0.8, 1.2, b, 1, 1, 1, 1), 0.7), uniform(-0.06, 0.06, b, 1, 3, 1, 1)
    video = (video - 0.5) * scale + 0.5 + shift
    video = video + torch.randn(video.shape, generator=generator) * uniform(0, 0.06, b, 1, 1, 1, 1) * (uniform(0, 1, b, 1, 1, 1, 1) < 0.6)
    for i in torch.nonzero(uniform(0, 1, b) < 0.25)[:, 0].tolist():
        top, left, first = (int(v * n) for v, n in zip(uniform(0, 0.8, 3).tolist(), (h, w, t), strict=True))
        video[i, first : first + max(1, t // 4), :, top : top + h // 5, left : left + w // 5] = float(uniform(0.1, 0.6, 1))
    return video.clamp(0, 1)


def blur(video: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of every frame, [B,T,3,H,W]; sigma [B] in pixels. Pixels beyond the frame do not count."""

    def spread(n: int) -> Tensor:
        steps = torch.arange(n)[:, None] - torch.arange(n)
        return torch.softmax(-(steps**2) / (2 * sigma.view(-1, 1, 1) ** 2), dim=-1)[:, None, None]  # [B, 1, 1, n, n]

    return spread(video.shape[3]) @ video @ spread(video.shape[4]).mT


def candidates(caption: Tensor, others: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which captions each clip of a batch is held against: its own, its three changed ones, and those of `others` clips of the batch.

    caption [B,4] rows of the texts -> rows [B,4+others] and a mask of those that say the same as the own caption (to be left out).
    """
    shifts = torch.randperm(len(caption) - 1, generator=generator)[:others] + 1  # [others]
    partner = (torch.arange(len(caption))[:, None] + shifts) % len(caption)  # [B, others]
    rows = torch.cat([caption, caption[:, 0][partner]], dim=1)  # [B, 4+others]
    same = rows == rows[:, :1]
    same[:, 0] = False
    return rows, same


def learning_rate(cfg: Config, i: int) -> float:
    warm = min(1.0, (i + 1) / 100)
    return cfg.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * i / cfg.iterations))


def train(cfg: Config, run: Run, model: LatentVideoModel) -> tuple[Matcher, str]:
    """The trained matcher and the sha256 of its data."""
    data, texts, data_hash = make_data(cfg, run.rng("data", 0), model)
    matcher = Matcher(MatcherSize())
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=cfg.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    run.register("matcher", matcher)
    run.register("optimizer", optimizer)
    run.count_forwards(matcher)
    for i in run.iterations(cfg.iterations, save_every=cfg.save_every, label="match"):
        generator = run.generator("step", i)
        part = data[0] if i % 8 or len(data) == 1 else data[1 + i // 8 % (len(data) - 1)]
        clips = torch.randint(len(part.video), (cfg.batch,), generator=generator)
        rows, same = candidates(part.caption[clips], cfg.others, generator)
        used, index = rows.unique(return_inverse=True)
        video = augment(part.video[clips].float() / 255, generator)
        logits, saw = matcher(video, *texts(used), index)  # [B,4+others], [B,W]
        logits = logits.masked_fill(same, -math.inf)
        named = F.cross_entropy(saw[:, : texts.words.shape[1]], texts.words[rows[:, 0]])
        loss = F.cross_entropy(logits, torch.zeros(cfg.batch, dtype=torch.long)) + 4 * named
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, i)
        run.backward(loss)
        norm = run.step(optimizer, max_grad_norm=1.0)
        if i % 10 == 0:
            accuracy = (logits.argmax(1) == 0).float().mean()
            run.log(loss=loss.detach(), accuracy=accuracy, named=named.detach(), grad_norm=norm, learning_rate=learning_rate(cfg, i))
    return matcher.eval(), data_hash


@torch.no_grad()
def accuracy_table(matcher: Matcher, encode: TextEncoder, *, clips: int, seed: int, split: str, objects: int = 1) -> dict[str, float]:
    """Share of fresh clips whose right caption scores above one with exactly one attribute changed, per attribute. Chance is 0.5."""
    rng = np.random.default_rng(seed)
    prompts = [sample_prompt(rng, split=split, two_objects=float(objects == 2)) for _ in range(clips)]
    video = torch.stack([render(sample_scene(prompt, rng, clip=DEMO_CLIP), DEMO_CLIP) for prompt in prompts])  # [N,T,3,H,W]
    captions = [[prompt.text, *_changed(prompt, rng, split)] for prompt in prompts]
    texts = Texts([caption for group in captions for caption in group], encode)
    rows = torch.tensor([[texts.row[caption] for caption in group] for group in captions])  # [N, 4]
    batches = zip(video.split(50), rows.split(50), strict=True)
    logits = torch.cat([matcher(v, *texts(r.flatten()), torch.arange(r.numel()).view_as(r))[0] for v, r in batches])  # [N, 4]
    right = logits[:, :1] > logits[:, 1:]  # [N, 3]
    each: dict[str, float] = {attribute: right[:, i].float().mean().item() for i, attribute in enumerate(ATTRIBUTES)}
    return {**each, "all": right.all(-1).float().mean().item()}


def _changed(prompt: ShapesPrompt, rng: np.random.Generator, split: str) -> list[str]:
    return [write_prompt(change(prompt.things, attribute, rng, unseen=split == "eval"), rng, split=split).text for attribute in ATTRIBUTES]


def main(cfg: Config, *, resume: bool = False) -> dict[str, Any]:
    """Trains, measures on fresh clips, and writes `matcher.safetensors` with its card `matcher.json`."""
    run, model = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS), load_tiny(None)
    matcher, data_hash = train(cfg, run, model)
    seconds = run.seconds
    tables = {
        "training combinations, fresh clips": accuracy_table(matcher, model.text, clips=cfg.evaluation_clips, seed=10_001, split="train"),
        "held-out combinations and wordings": accuracy_table(matcher, model.text, clips=cfg.evaluation_clips, seed=10_002, split="eval"),
        "two objects, fresh clips": accuracy_table(matcher, model.text, clips=cfg.evaluation_clips, seed=10_003, split="train", objects=2),
    }
    path = cfg.out / "matcher.safetensors"
    measured = {"right caption above one with one attribute changed": tables, "parameters": sum(p.numel() for p in matcher.parameters())}
    write_card(path, lambda file: save_matcher(file, matcher), recipe="match", cfg=cfg, data=data_hash, seconds=seconds, measured=measured)
    return {"weights": str(path), "seconds": seconds, **measured}
