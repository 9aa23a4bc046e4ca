"""Does SFT on what `rushes curate` kept beat SFT on everything, at equally many steps?

Clips as they are found, with defects planted in a known share: cuts, frozen, black, letterboxed, flashing clips, and many copies of a few. `rushes curate` decides with its
defaults; `rushes sft` learns from the kept folder, and from all that was found, with the same steps, seeds and start. The judge of the built-in world looks at the same held-out
prompts.

Letters: S seeds, N prompts, G clips a prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from align.config import Count, Several, Share, Whole, dump
from base_model.tiny import load_tiny
from base_model.types import ClipShape
from base_model.video.files import mp4_bytes, write_atomic
from recipes import curate, sft
from recipes.bench._results import Bench, Row, check_can_end, columns, flat, here, place, write
from recipes.bench._trained import Seeds, kept
from recipes.clip_folder import Windows
from recipes.evaluate import clip_seeds
from recipes.fit import Fit
from recipes.generate import Sampler, network_lineage, sample
from recipes.shapes.dataset import draw_clips
from recipes.shapes.measure import measure, shares
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import FPS
from recipes.statistics import bootstrap_crossed

Frames = NDArray[np.uint8]  # [T,H,W,3]
Defect = Literal["cut", "frozen", "black", "letterboxed", "flashing", "copy"]
DEFECTS: tuple[Defect, ...] = ("cut", "frozen", "black", "letterboxed", "flashing", "copy")
ARMS = ("everything", "curated")
START = "start"
SHAPE = ClipShape(13, 32, 32)
SCALE = 8  # a pixel of the world becomes a square of so many: files are of an ordinary size
ORIGINALS = 4  # clips that all copies are made of
HELD_OUT_SEED = 710_000
VERSION = 1
"""Of what is kept. One more wherever that changes: what was kept before is then refused, not read."""


class Config(Bench):
    out: Path = Path("runs/bench-curated")
    """Folder of clips, scores and trainings; what is finished there is not repeated. `quick` keeps nothing."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of clips and of SFT. `quick` takes the first."""
    model: Path | None = None
    """What SFT starts from; none means the shipped base."""
    clips: Count = 900
    """Clips that are found. `quick` takes 40."""
    planted: Share = 0.6
    """Share of them with a defect, each kind as often."""
    fit: Fit = Fit(iterations=250, lr=5e-4, held_out=32, evaluate_every=250, save_every=50)
    """SFT, of both arms. `quick` takes 2 steps."""
    prompts: Count = 160
    """Held-out prompts. `quick` takes 4."""
    takes: Several = 4
    """Clips of each."""
    workers: Whole = 1
    """Processes that measure clips."""
    sampler: Sampler = Sampler()
    """How clips are denoised for the judge."""


# Clips as they are found


class Found(NamedTuple):
    """A clip before it is a file."""

    text: str
    frames: Frames
    defect: Defect | None


def found_clips(number: int, planted: float, *, seed: int) -> list[Found]:
    """`number` clips with their captions, in a mixed order, `planted` of them with a defect."""
    rng = np.random.default_rng([seed, HELD_OUT_SEED])
    drawn = draw_clips("curated", number + ORIGINALS, seed=seed, shape=SHAPE)
    films = [video.permute(0, 2, 3, 1).numpy() for video in drawn.videos]  # [T,H,W,3] each
    kinds: list[Defect | None] = [DEFECTS[k % len(DEFECTS)] for k in range(round(planted * number))]
    kinds += [None] * (number - len(kinds))
    clips = []
    for index, kind in enumerate(kinds):
        original = number + index // len(DEFECTS) % ORIGINALS if kind == "copy" else index
        other = films[(index + 1) % number]
        clips.append(Found(drawn.texts[original], spoiled(films[original], other, kind), kind))
    return [clips[k] for k in rng.permutation(number).tolist()]


def spoiled(film: Frames, other: Frames, defect: Defect | None) -> Frames:
    """A clip [T,H,W,3] with a defect; other: a clip that a cut goes over to."""
    changed, middle = film.copy(), len(film) // 2
    if defect == "cut":
        changed[middle:] = other[middle:]
    elif defect == "frozen":
        changed[:] = film[0]
    elif defect == "black":
        changed[:] = 0
    elif defect == "letterboxed":
        bar = film.shape[1] // 5
        changed[:, :bar] = changed[:, -bar:] = 0
    elif defect == "flashing":
        changed[1::2] = 255 - (255 - film[1::2]) // 4
    return changed


def write_found(folder: Path, clips: Sequence[Found]) -> None:
    """A folder of mp4 files with their captions; copies are encoded anew, each with another loss."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, clip in enumerate(clips):
        name = f"{index:05d}.mp4"
        write_atomic(folder / name, mp4_bytes(clip.frames.repeat(SCALE, 1).repeat(SCALE, 2), FPS, upscale=False))
        lines.append(json.dumps({"file_name": name, "text": clip.text}) + "\n")
    write_atomic(folder / "metadata.jsonl", "".join(lines).encode())


# Two ways to learn from them


def curated(cfg: Config, folder: Path, seed: int) -> dict[str, Any]:
    """What was kept of the clips in folder/found, by defect."""
    clips = found_clips(cfg.clips, cfg.planted, seed=seed)
    write_found(folder / "found", clips)
    curate.main(curate.Config(input=str(folder / "found"), out=folder / "curated", workers=cfg.workers or None))
    names = [json.loads(line)["id"] for line in (folder / "curated" / "kept" / "metadata.jsonl").read_text().splitlines()]
    left = Counter(clips[int(Path(name).stem)].defect or "clean" for name in names)
    there = Counter(clip.defect or "clean" for clip in clips)
    return {"found": dict(there), "kept": {kind: left[kind] for kind in there}}


def learned(cfg: Config, folder: Path, arm: str, seed: int, held_out: Sequence[ShapesPrompt]) -> dict[str, Any]:
    """The judge's shares of right clips, [N], after SFT on one of the folders."""
    data = folder / ("curated/kept" if arm == "curated" else "found")
    run = folder / f"sft-{arm}"
    settings = sft.Config(out=run, seed=seed, model=cfg.model, data=data, cache=folder / "latents", windows=Windows(), fit=cfg.fit, samples=sft.Samples(every=10**6, steps=2))
    found = sft.main(settings, resume=(run / "run.json").exists())
    return judged(cfg, Path(str(found["weights"])), held_out)


@torch.no_grad()
def judged(cfg: Config, weights: Path | None, held_out: Sequence[ShapesPrompt]) -> dict[str, Any]:
    """The judge's share of right clips of each prompt, from the same noise for every network."""
    model, texts = load_tiny(weights), [prompt.text for prompt in held_out]
    seeds = clip_seeds(HELD_OUT_SEED, len(texts) * cfg.takes)
    video = torch.cat(list(sample(model, model.encode_text(texts).repeat(cfg.takes), seeds, cfg.sampler))).cpu()  # [N G,T,3,H,W]
    return {"judge": list(shares(measure(video, held_out, cfg.takes)).values())}


# Rows


def rows_of(runs: Mapping[str, Sequence[Mapping[str, Any]]], curation: Sequence[Mapping[str, Any]]) -> dict[str, list[Row]]:
    """runs: of the start and of each arm, one a seed. The shares, the difference of both arms, and what curation kept."""
    judge = {arm: np.array([run["judge"] for run in mine]) for arm, mine in runs.items()}  # [S,N] each
    arms = [{"arm": arm, "seeds": len(mine), **columns("judge", bootstrap_crossed(mine))} for arm, mine in judge.items()]
    gains = [
        {"above": above, "below": below, **columns("difference", bootstrap_crossed(judge[above] - judge[below]))}
        for above, below in (("curated", "everything"), ("curated", START), ("everything", START))
    ]
    kinds = [
        {
            "clips": kind,
            "found": float(np.mean([each["found"][kind] for each in curation])),
            "kept": float(np.mean([each["kept"][kind] for each in curation])),
            "kept_share": sum(each["kept"][kind] for each in curation) / sum(each["found"][kind] for each in curation),
        }
        for kind in curation[0]["found"]
    ]
    return {"arms": arms, "differences": gains, "curation": kinds}


def verdict(rows: Mapping[str, Sequence[Row]]) -> str:
    row = rows["differences"][0]
    holds = "holds" if row["difference_low"] > 0 else "does not hold"
    told = f"{100 * row['difference']:+.1f} points [{100 * row['difference_low']:+.1f}, {100 * row['difference_high']:+.1f}]"
    return f"SFT on curated clips beats SFT on everything at equal steps: {holds} ({told} of clips that are right)."


# The command


def shrunk(cfg: Config) -> Config:
    """The quick form: shows that all of it runs, and nothing else."""
    fit = cfg.fit.model_copy(update={"iterations": 2, "capacity": 512, "held_out": 4, "evaluate_every": 2})
    return cfg.model_copy(update={"seeds": cfg.seeds[:1], "clips": 40, "fit": fit, "prompts": 4, "takes": 2})


def run_all(cfg: Config, out: Path) -> dict[str, list[Row]]:
    held_out = make_prompts(cfg.prompts, seed=HELD_OUT_SEED, split="eval", two_objects=0.0)
    told = {"version": VERSION, "network": network_lineage(cfg.model)}
    looked = {**told, "held_out": [prompt.text for prompt in held_out], "takes": cfg.takes, "sampler": dump(cfg.sampler)}
    data = {**told, "clips": cfg.clips, "planted": cfg.planted, "keep": dump(curate.Keep())}
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in (START, *ARMS)}
    start, curation = kept(out / "start.json", looked, partial(judged, cfg, cfg.model, held_out)), []
    for seed in cfg.seeds:
        folder = out / str(seed)
        runs[START].append(start)
        curation.append(kept(folder / "curation.json", {**data, "seed": seed}, partial(curated, cfg, folder, seed)))
        for arm in ARMS:
            settings = {**looked, **data, "seed": seed, "arm": arm, "fit": dump(cfg.fit)}
            runs[arm].append(kept(folder / f"{arm}.json", settings, partial(learned, cfg, folder, arm, seed, held_out)))
    return rows_of(runs, curation)


HEADINGS = {"arms": "What is right on held-out prompts", "differences": "Paired differences", "curation": "What curation kept"}


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out)
    with place(cfg, cfg.out) as out:
        rows = run_all(shrunk(cfg) if cfg.quick else cfg, out)
    if cfg.write:
        write(cfg, "curated", here("curated", cfg), "SFT on curated clips and on everything", {HEADINGS[part]: each for part, each in rows.items()}, remarks=[verdict(rows)])
    return {"rows": flat(rows)}
