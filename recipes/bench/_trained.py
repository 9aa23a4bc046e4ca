"""Trainings that a benchmark keeps in a folder: one that was killed goes on, one that is finished is not repeated."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import AfterValidator, Field

from align.config import Config as BaseConfig
from align.config import Count, Seed, dump, leaves
from align.progress import duration
from align.run import Run, read_metrics
from base_model.checkpoint import atomic_write, read_json
from base_model.errors import UserError
from base_model.prompts.text import TextEncoder
from base_model.tiny import WEIGHTS, LatentVideoModel, build_network, load_codec, load_tiny, save_network
from recipes.bench._results import Maker, maker, note_read
from recipes.bench.networks import Size, architecture
from recipes.evaluate import clip_seeds
from recipes.fit import Fit
from recipes.generate import Sampler, network_lineage, sample
from recipes.pairs import Pairs
from recipes.sft import METRICS, train
from recipes.shapes.judge import in_frame, judge
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.weights import file_hash

LOOKS = ("all_right", "shape_right", "colour_right", "motion_right", "in_frame")
LOOKS_VERSION = 2
"""Of what these and the held-out losses mean. One more wherever that changes: what was kept before is then refused, not read."""
CODEC = WEIGHTS / "vae.safetensors"
HELD_OUT_SEED = 1_000_003
PROMPT_SEED = 900_000


def _all_different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"expected different seeds, got {list(seeds)}")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_all_different)]
"""Seeds of trainings. Equal ones would count one training twice."""


class Training(BaseConfig):
    """What a training depends on, beside its seed."""

    data: str
    """Which clips, as they are seen."""
    clips: Count
    """How many of them."""
    network: Size
    """Size of a fresh network."""
    base: str
    """sha256 of the network it begins with; empty: fresh weights."""
    codec: str
    """sha256 of the autoencoder."""
    fit: Fit
    """How the network is fitted."""


class Trained(NamedTuple):
    """A finished training."""

    weights: Path
    seconds: float  # of all its steps, without data and without evaluation
    tokens: int  # of all its packs


def kept(file: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` found, written to `file` once it is known, and read from there ever after. Commit and threads are noted beside it: another commit may read it, and tables say so.

    Raises UserError where the file holds what other settings gave."""
    told = json.loads(json.dumps(settings))
    if not file.exists():
        by, found = maker(), make()
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, (json.dumps({"settings": told, "made": by._asdict(), "found": found}, indent=1) + "\n").encode())
    content = read_json(file, "what was measured")
    before = content.get("settings")
    if before != told or not isinstance(content.get("found"), dict):
        differ = sorted(key for key in told if not isinstance(before, dict) or before.get(key) != told[key]) or ["found"]
        raise UserError(f"{file} was made with another {', '.join(differ)}. Give the same values, another --out, or delete that file")
    made = content.get("made") or {}
    note_read(Maker(str(made.get("commit", "unknown")), str(made.get("threads", "unknown"))))
    return dict(content["found"])


def training(data: str, clips: int, network: Size, base: Path | None, fit: Fit) -> Training:
    return Training(data=data, clips=clips, network=network, base=network_lineage(base) if base else "", codec=file_hash(CODEC), fit=fit)


def first_model(what: Training, seed: int, base: Path | None) -> LatentVideoModel:
    """The network a training begins with: the one given, or fresh weights of that seed."""
    if base is not None:
        return load_tiny(base)
    codec = load_codec(CODEC)
    config = architecture("dit", what.network, codec, "network")
    torch.manual_seed(seed)
    return LatentVideoModel(build_network(config), codec, TextEncoder(), config)


def train_kept(folder: Path, what: Training, seed: int, base: Path | None, data: Callable[[], Pairs], held_out: Pairs) -> Trained:
    """Trains in `folder`, or says what is there. `data` is asked only where something is left to train."""
    weights, out = folder / "network.safetensors", folder / "run"

    def make() -> dict[str, Any]:
        check_same(out, what, seed)
        pairs = data()
        run = Run(out, what, seed=seed, resume=(out / "run.json").exists(), metrics=METRICS)
        model = first_model(what, seed, base).to(run.device)
        train(what.fit, run, model, pairs, held_out)
        save_network(weights, model)
        steps = [line for line in read_metrics(out) if "loss" in line]
        return {"seconds": steps[-1]["seconds"], "tokens": int(sum(step["tokens"] for step in steps))}

    found = kept(folder / "trained.json", {"seed": seed, **dump(what)}, make)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # what is kept is the network
    return Trained(weights, found["seconds"], found["tokens"])


def check_same(out: Path, what: BaseConfig, seed: int) -> None:
    """Raises UserError where a killed training in `out` was begun with other settings, its length included: it cannot go on as if it had begun with these."""
    if not (out / "run.json").exists():
        return
    found = read_json(out / "run.json", "the description of the run")
    before, now = (leaves(json.loads(json.dumps({"seed": one_seed, **config}))) for one_seed, config in ((found.get("seed"), found.get("config") or {}), (seed, dump(what))))
    differ = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differ:
        raise UserError(f"a training was killed in {out} that had another {', '.join(differ)}. Give the same values, another --out, or delete that folder")


def look_settings(weights: Path, prompts: int, sampler: Mapping[str, Any]) -> dict[str, Any]:
    """What looks and held-out losses of a network depend on, to be kept with them."""
    return {"measure": LOOKS_VERSION, "network": network_lineage(weights), "codec": file_hash(CODEC), "prompts": prompts, "sampler": dict(sampler)}


def asked(number: int) -> tuple[list[ShapesPrompt], list[int]]:
    """Held-out prompts of one object, and the seed of the noise of each: the same for every network and size. Raises UserError where there are not so many."""
    try:
        return make_prompts(number, seed=PROMPT_SEED, split="eval"), clip_seeds(PROMPT_SEED, number)
    except ValueError as error:
        raise UserError(f"prompts: {error}. Give fewer --prompts") from error


def looks(model: LatentVideoModel, prompts: Sequence[ShapesPrompt], seeds: Sequence[int], sampler: Sampler) -> dict[str, list[float | None]]:
    """What the judge says of one clip a prompt of one thing: {name of `LOOKS`: [N]}; whether all is in the frame is None where nothing is found."""
    cond = model.encode_text([prompt.text for prompt in prompts])
    rows: list[tuple[float | None, ...]] = []
    for video in sample(model, cond, seeds, sampler):  # [b,T,3,H,W]
        for clip, judged in zip(video, judge(video, prompts[len(rows) : len(rows) + len(video)]), strict=True):
            whole = in_frame(clip)
            flags = (judged.all_right, judged.shape_right[0], judged.colour_right[0], judged.motion_right[0])
            rows.append((*map(float, flags), None if whole is None else float(whole)))
    return {name: [row[k] for row in rows] for k, name in enumerate(LOOKS)}


class Pace:
    """One line on standard error after every part: what is done of the work, and how long the rest will take if it goes on like this."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.worked, self.begun = label, total, 0, 0, time.monotonic()

    def advance(self, note: str, work: int, *, fresh: bool) -> None:
        """`work` more is done. fresh: now, and not in an earlier call."""
        self.done += work
        self.worked += work if fresh else 0
        gone = time.monotonic() - self.begun
        left = f", about {duration(gone / self.worked * (self.total - self.done))} left" if self.worked else ""
        print(f"{self.label} {self.done}/{self.total}  {duration(gone)} gone{left}  {note}", file=sys.stderr, flush=True)
