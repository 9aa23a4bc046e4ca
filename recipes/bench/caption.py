"""Does a captioner name what clips show, and does SFT on its captions beat SFT on short tags? The re-captioning claim of DALL-E 3 and Sora, in the built-in world.

A tiny captioner learns the built-in world (`rushes caption-train`), and is read word by word on clips of combinations of shape, colour and motion that it has seen, and of others.
Then it describes new clips whose old captions are tags, the shape's name alone (`rushes caption`), and the shipped base is fine-tuned on these clips twice, with captions and with
tags: the same clips, steps, order and noise. The judge looks at clips of full held-out prompts, in words that no captioner says.

Letters: S seeds, N clips or prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from align.config import Count, Positive, dump
from base_model.prompts.caption import Captioner, clip_patches, take_frames
from base_model.prompts.vision import load_vlm
from base_model.tiny import WEIGHTS, load_tiny
from base_model.video.files import write_atomic, write_lossless
from recipes import caption, caption_train, sft
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._trained import LOOKS, Pace, Seeds, asked, check_same, kept, look_settings, looks
from recipes.clip_folder import TABLE
from recipes.generate import Sampler
from recipes.shapes import captions as shapes
from recipes.shapes.prompts import SHAPE_WORDS, Thing
from recipes.shapes.render import FPS
from recipes.statistics import bootstrap_crossed, bootstrap_mean
from recipes.weights import file_hash

Array = NDArray[np.float64]
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""
ATTRIBUTES = ("shape", "colour", "motion", "all")
SPLITS = {"held-out combinations": "eval", "seen combinations, new clips": "train"}
ARMS = ("tags", "captions")
TOGETHER = 50  # clips described at once
DRAWN, JUDGED = 500_000, 700_000  # seeds of the clips that are described, and of those that captioners are judged on
ASKED = 0.9


class Config(Bench):
    out: Path = Path("runs/bench-caption")
    """Folder of everything that is trained; what is finished there is not repeated. `quick` keeps nothing."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of captioners, of the clips that they describe, and of SFT. `quick` takes one."""
    clips: Count = 40_000
    """Clips that a captioner learns from. `quick` takes at most 64."""
    steps: Count = 1_000
    """Its steps. `quick` takes at most 40, after which it says whole sentences."""
    lr: Positive = 3e-3
    """Its peak learning rate."""
    held_out: Count = 400
    """Clips of either kind that it is judged on. `quick` takes at most 8."""
    pairs: Count = 800
    """Clips that it describes, and SFT learns from. `quick` takes at most 12."""
    fit: sft.Fit = sft.Fit(iterations=100, lr=5e-4, held_out=32, evaluate_every=100, save_every=50)
    """How SFT fits. `quick` takes at most 2 steps."""
    prompts: Count = 200
    """Held-out prompts of one object, one clip each. `quick` takes at most 4."""
    sampler: Sampler = Sampler()
    """How clips are denoised."""


# The captioner


def train_captioner(cfg: Config, out: Path, seed: int) -> Path:
    """The folder of a finished captioner."""
    folder = out / f"captioner-{seed}"
    settings = caption_train.Config(out=folder, clips=cfg.clips, held_out=min(100, cfg.held_out), steps=cfg.steps, lr=cfg.lr, seed=seed, save_every=300)
    check_same(folder, settings, seed)
    if not (folder / "captioner.json").exists():
        caption_train.main(settings, resume=(folder / "run.json").exists())
    return folder / caption_train.MODEL


def judge_captioner(cfg: Config, model: Path, split: str) -> dict[str, list[float]]:
    """Of each attribute, whether it names it right, a clip [N]."""
    vlm = load_vlm(model, what="captioner")
    captioner, drawn = Captioner(vlm, instruction=shapes.INSTRUCTION, max_tokens=shapes.LONGEST), shapes.Drawn(cfg.held_out, seed=JUDGED, split=split)
    texts: list[str] = []
    for begin in range(0, cfg.held_out, TOGETHER):
        rows = range(begin, min(begin + TOGETHER, cfg.held_out))
        texts += [said.text for said in captioner([clip_patches(take_frames(drawn.frames(row), shapes.SIGHT, vlm.patches), vlm.patches) for row in rows])]
    found = [shapes.right(text, thing) for text, thing in zip(texts, drawn.things, strict=True)]
    return {name: [float(each[name]) for each in found] for name in ATTRIBUTES}


# What SFT learns from


def tagged_clips(cfg: Config, out: Path, seed: int) -> Path:
    """A folder of clips whose captions are tags, made once for its settings."""
    folder = out / f"tags-{seed}"

    def make() -> dict[str, Any]:
        drawn = shapes.Drawn(cfg.pairs, seed=DRAWN + seed, split="train")
        folder.mkdir(parents=True, exist_ok=True)
        for row in range(len(drawn)):
            write_lossless(folder / f"{row:05d}.mkv", drawn.video(row), FPS)
        lines = [json.dumps({"file_name": f"{row:05d}.mkv", "text": SHAPE_WORDS[thing.shape][0], "says": list(vars(thing).values())}) for row, thing in enumerate(drawn.things)]
        write_atomic(folder / TABLE, ("\n".join(lines) + "\n").encode())
        return {"clips": len(drawn)}

    kept(out / f"tags-{seed}.json", {"version": VERSION, "seed": seed, "pairs": cfg.pairs}, make)
    return folder


def described_clips(model: Path, tagged: Path, folder: Path) -> Path:
    """The same clips with the captions of a model, by `rushes caption`."""
    caption.main(caption.Config(clips=tagged, model=str(model), out=folder / TABLE, max_tokens=shapes.LONGEST, batch=TOGETHER, workers=1))
    return folder


def right_of(folder: Path) -> float:
    """Share of captions in a folder that name all attributes right."""
    rows = [json.loads(line) for line in (folder / TABLE).read_text().splitlines()]
    return float(np.mean([shapes.right(row.get("text", ""), Thing(*row["says"]))["all"] for row in rows]))


# SFT


def tune(cfg: Config, out: Path, data: Path, name: str, seed: int) -> Path:
    """The finished run of the shipped base on a folder of clips."""
    folder = out / "sft" / name
    settings = sft.Config(out=folder, seed=seed, data=data, cache=out / "latents", fit=cfg.fit, samples=sft.Samples(every=1_000, steps=2))
    check_same(folder, settings, seed)
    if not (folder / "network.json").exists():
        sft.main(settings, resume=(folder / "run.json").exists())
    return folder / "network.safetensors"


def judged(cfg: Config, out: Path, name: str, network: Path) -> dict[str, list[float]]:
    """What the judge says of one clip a prompt: {name of `LOOKS`: [N]}, kept for its settings."""
    settings = {"version": VERSION, **look_settings(network, cfg.prompts, dump(cfg.sampler))}
    with torch.no_grad():
        return kept(out / "judged" / f"{name}.json", settings, lambda: looks(load_tiny(network), *asked(cfg.prompts), cfg.sampler))


# Rows


def accuracy_rows(cfg: Config, found: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> list[Row]:
    """A row a kind of clips and attribute: the share that is named right, over seeds and clips, and of each seed."""
    rows = []
    for kind, seeds in found.items():
        for name in ATTRIBUTES:
            table = np.array([seed[name] for seed in seeds])  # [S,N]
            row = {"clips": kind, "attribute": name, **columns("right", bootstrap_crossed(table))}
            rows.append({**row, "of_seeds": ", ".join(f"{value:.3f}" for value in table.mean(1)), "seeds": len(table), "number": table.shape[1]})
    return rows


def sft_rows(base: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> list[Row]:
    """A row a model and look: the share of clips that are right, and the paired differences."""
    rows = []
    for look in (name for name in LOOKS if name != "in_frame"):
        before = np.array(base[look])  # [N]
        tables = {arm: np.array([seed[look] for seed in seeds]) for arm, seeds in found.items()}  # [S,N]
        rows.append({"look": look, "model": "base", **columns("right", bootstrap_mean(before))})
        for arm, table in tables.items():
            row = {"look": look, "model": f"SFT on {arm}", **columns("right", bootstrap_crossed(table)), **columns("minus_base", bootstrap_crossed(table - before))}
            rows.append(row | (columns("minus_tags", bootstrap_crossed(table - tables["tags"])) if arm != "tags" else {}))
    return rows


def verdicts(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    """What was asked, and whether it holds."""
    lines = []
    for row in parts["accuracy"]:
        if row["attribute"] == "all":
            word = "holds" if row["right_low"] >= ASKED else "does not hold" if row["right_high"] < ASKED else "cannot be told"
            told = f"{100 * row['right']:.1f} % [{100 * row['right_low']:.1f}, {100 * row['right_high']:.1f}]"
            lines.append(f"Shape, colour and motion all right on 90 % of clips ({row['clips']}): {word}, {told}.")
    last = next(row for row in parts["sft"] if row["look"] == "all_right" and row["model"] == "SFT on captions")
    word = "holds" if last["minus_tags_low"] > 0 else "does not hold" if last["minus_tags_high"] < 0 else "cannot be told"
    told = f"{100 * last['minus_tags']:+.1f} points [{100 * last['minus_tags_low']:+.1f}, {100 * last['minus_tags_high']:+.1f}] of clips with everything right"
    return [*lines, f"SFT on captions beats SFT on tags at equal steps: {word} ({told}, paired over prompts)."]


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    small = {"clips": 64, "steps": 40, "held_out": 8, "pairs": 12, "prompts": 4}
    fit = cfg.fit.model_copy(update={"iterations": min(2, cfg.fit.iterations), "evaluate_every": 2, "held_out": min(2, cfg.fit.held_out)})
    return cfg.model_copy(update={"seeds": cfg.seeds[:1], "fit": fit, **{key: min(most, getattr(cfg, key)) for key, most in small.items()}})


def measure(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    pace = Pace("caption", (1 + len(ARMS)) * len(cfg.seeds))
    accuracy: dict[str, list[dict[str, Any]]] = {kind: [] for kind in SPLITS}
    tuned: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    described: list[Row] = []
    for seed in cfg.seeds:
        fresh = not (out / f"captioner-{seed}" / "captioner.json").exists()
        model = train_captioner(cfg, out, seed)
        settings = {"version": VERSION, "model": file_hash(model / "model.safetensors"), "clips": cfg.held_out}
        for kind, split in SPLITS.items():
            accuracy[kind].append(kept(out / "accuracy" / f"{split}-{seed}.json", settings, lambda: judge_captioner(cfg, model, split)))  # noqa: B023
        pace.advance(f"captioner {seed}", 1, fresh=fresh)
        tagged = tagged_clips(cfg, out, seed)
        data = {"tags": tagged, "captions": described_clips(model, tagged, out / f"captions-{seed}")}
        described.append({"seed": seed, "clips": cfg.pairs, "captions_right": right_of(data["captions"]), "tags_right": right_of(tagged)})
        for arm in ARMS:
            fresh = not (out / "sft" / f"{arm}-{seed}" / "network.json").exists()
            tuned[arm].append(judged(cfg, out, f"{arm}-{seed}", tune(cfg, out, data[arm], f"{arm}-{seed}", seed)))
            pace.advance(f"SFT on {arm}, seed {seed}", 1, fresh=fresh)
    base = judged(cfg, out, "base", WEIGHTS / "dit.safetensors")
    return {"accuracy": accuracy_rows(cfg, accuracy), "sft": sft_rows(base, tuned), "described": described}


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    small = shrunk(cfg) if cfg.quick else cfg
    with place(cfg, cfg.out) as out:
        parts = measure(small, out)
    if cfg.write:
        remarks = [*verdicts(parts), f"{len(small.seeds)} seed{'s' * (len(small.seeds) > 1)}. What each number is: [how to read](../README.md#how-to-read-captions)."]
        write(cfg, "caption", here("caption", cfg), "Captions instead of tags", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
