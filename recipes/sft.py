"""Supervised fine-tuning on captioned clips of mixed sizes and lengths, of the built-in model or of an open family (`rushes sft`).

Flow matching on the model's own path (Lipman et al. 2022, arXiv 2210.02747, eq. 14), one noise level a clip; all weights, or LoRA. Where the network packs (the built-in one, Wan)
clips of any sizes share a sequence; elsewhere those of one shape share a batch. No clip is dropped, and none is seen twice before all have been seen once.
Some clips give part of themselves as a visual prompt (`conditions`): that has noise level 0 and no loss. Clips of what the model did before (`remember`) keep it from forgetting.
What it leaves out: captions are not made (`rushes caption` does that), several resolutions of one clip, context parallelism.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from align.config import Config as BaseConfig
from align.config import Count, Positive, Seed, Share, Whole
from align.context_parallel import check_can_split, check_tokens
from align.ema import EMA
from align.progress import duration
from align.run import Run
from base_model.checkpoint import atomic_write
from base_model.errors import UserError
from base_model.families.wan_image import WanImageVideoModel
from base_model.flops import FlopCounter, peak_flops
from base_model.lora import add_lora, merge
from base_model.networks.routing import middle
from base_model.recompute import compile_blocks
from base_model.tiny import LatentVideoModel, save_network
from base_model.types import Conditioning, TrainableModel
from recipes import steps
from recipes.checkpoints import check_can_save, save_checkpoint
from recipes.clip_folder import Windows, cut_for
from recipes.clip_stream import ClipStream, Stream, stream_of
from recipes.encode import encode_folder
from recipes.examples import Examples, FromImages, Velocities, num_tokens, together
from recipes.filters import read_lineage
from recipes.fit import Fit as Fit
from recipes.fit import held_out_losses, shifts
from recipes.generate import Sampler, check_sampler
from recipes.latents import lineage_of
from recipes.memory import peak_memory
from recipes.models import NETWORK, encode_prompts, load_model, model_lineage, save_policy
from recipes.pairs import Pairs, encode_pairs, is_pairs, load_pairs
from recipes.sample_grid import sample_grid
from recipes.shapes.dataset import draw_clips
from recipes.shapes.prompts import ShapesPrompt, make_prompts
from recipes.shapes.render import DEMO_CLIP
from recipes.steps import Lesson, Speed, Step, StreamLesson, dry_run, fit_network, micro_batch, with_remembered
from recipes.validation import Look, Summary, Validation, append_look, pixels, read_looks, split
from recipes.validation_page import write_page
from recipes.weights import file_hash, write_card

CHECKPOINT = "checkpoint"
METRICS = {
    **steps.METRICS,
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


class Samples(BaseConfig):
    """Clips made on the way from fixed noise, on the averaged weights."""

    prompts: tuple[str, ...] = ()
    """What they show; none means captions of held-out clips, or prompts of the built-in world."""
    every: Count = 4
    """They are made at every so many looks at held-out clips, and at the last."""
    steps: Count = 20
    """Denoising steps, on the model's own grid."""
    guidance: Positive | None = None
    """Scale of guidance; none means 5 for a family, and 1, which is none, for the built-in model."""


class Config(BaseConfig):
    may_change = BaseConfig.may_change | {"shard"}

    out: Path = Path("runs/sft")
    """Folder of the run. The built-in model ends up in `network.safetensors` there, a family's adapter in `adapter.safetensors`, a whole family in `checkpoint`."""
    seed: Seed = 0
    """Seed of data and noise."""
    model: Path | None = None
    """What to start from: a network of the built-in model, or an open family by a folder that diffusers saved, a short name (wan2.1-1.3b) or owner/name on the hub; none means the
    shipped base."""
    data: Path | None = None
    """Folder of captioned clips: video files with `metadata.jsonl`, or `a.txt` beside `a.mp4`; or exact pairs (`recipes/pairs.py`). None draws `clips` curated ones from the
    built-in world."""
    windows: Windows = Windows()
    """How clips of a folder are cut into examples."""
    stream: Stream | None = None
    """A dataset that is larger than the disk, in place of `data`: read in order and encoded on the way."""
    cache: Path = Path("runs/latents")
    """Folder of latents and captions that were encoded once (`rushes encode`); what is missing there is encoded first."""
    clips: Count = 4_000
    """Curated pairs of native sizes to draw, where there is no `data`."""
    lora_rank: Whole = 0
    """Rank of a LoRA adapter; 0 trains every weight."""
    dora: bool = False
    """Learns how large each row of the adapted weights is beside where it points (DoRA)."""
    mlp: bool = False
    """Adapts a family's mlp as well as its attention."""
    nf4: bool = False
    """Keeps a family's frozen weights in four bits, under LoRA (QLoRA)."""
    recompute: Share = 0.0
    """Share of a family's blocks whose activations a backward pass computes again: less memory, at most a third more time."""
    compiled: bool = False
    """Compiles a family's blocks, one kind once: worth its minute on a GPU."""
    shard: bool = False
    """Spreads weights, gradients and optimizer over the processes (FSDP2), where one device has no room for them."""
    context_parallel: bool = False
    """Spreads the tokens of every clip over the processes (Ulysses), where clips of a Wan are too long for one device. All work on the same clips, shape by shape."""
    merged: bool = False
    """Saves a whole checkpoint of a family beside its adapter too, with the adapter merged."""
    data_licence: str = ""
    """Terms that the clips came under, for the card."""
    fit: Fit = Fit(iterations=250, lr=5e-4)
    """How the network is fitted."""
    remember: Remember = Remember()
    """What it must not forget."""
    samples: Samples = Samples()
    """Clips made on the way."""


# What is learned from


class Data(NamedTuple):
    """What is learned from and what is held out, and what is said of both."""

    examples: Examples
    learned: Sequence[int]
    held: Examples
    held_out: Sequence[int]
    fps: float
    sha256: str
    report: Sequence[str]
    asked: Sequence[ShapesPrompt] = ()  # prompts for samples, where the judge knows what they say


def drawn_data(cfg: Config, model: LatentVideoModel) -> Data:
    """Curated pairs, from a folder or out of the built-in world; held-out ones are drawn."""
    clips = load_pairs(cfg.data) if cfg.data else draw_clips("curated", cfg.clips, seed=cfg.seed)
    held_out = draw_clips("curated", cfg.fit.held_out, seed=cfg.seed + 1_000_003, shape=DEMO_CLIP)
    pairs, held, asked = encode_pairs(model, clips), encode_pairs(model, held_out), make_prompts(4, seed=cfg.seed, split="eval", two_objects=0.0)
    report = [f"{len(clips):,} clips, none dropped; {sum(pairs.num_tokens(model.patch)):,} tokens"]
    return Data(pairs, range(len(pairs)), held, range(len(held)), 12.0, clips.fingerprint(), report, asked)


def folder_data(cfg: Config, run: Run, model: TrainableModel, folder: Path) -> Data:
    """The clips of a folder, encoded where they are not yet, some of them held out."""
    encoded = encode_folder(
        model,
        folder,
        cfg.cache,
        lineage=lineage_of(cfg.model, model),
        windows=cfg.windows,
        rank=run.rank,
        ranks=run.processes,
        wait=run.wait,
        quiet=run.quiet,
    )
    examples, report = encoded
    learned, held_out = split(examples, cfg.fit.held_out, seed=cfg.seed)
    told = [*report.lines(), f"{len(learned):,} examples are learned from, {len(held_out):,} are held out"]
    return Data(examples, learned, examples, held_out, cut_for(model, cfg.windows).fps, examples.sha256, told)


def data_of(cfg: Config, run: Run, model: TrainableModel) -> Data:
    """Raises UserError where a family is given no clips."""
    if cfg.data is not None and not is_pairs(cfg.data):
        return folder_data(cfg, run, model, cfg.data)
    if not isinstance(model, LatentVideoModel):
        raise UserError("no clips, data: those of the built-in world are for the built-in model. Give a folder of captioned clips, --data FOLDER")
    return drawn_data(cfg, model)


def stream_data(cfg: Config, source: ClipStream) -> Data:
    """Held-out examples of the beginning of a stream, which never gives them."""
    examples = source.beginning()
    learned, held_out = split(examples, cfg.fit.held_out, seed=cfg.seed)
    source.without = frozenset(examples.sha256(row) for row in held_out)
    sha256 = hashlib.sha256("".join(map(examples.sha256, range(len(examples)))).encode()).hexdigest()
    report = [f"a stream; of its first {len(examples):,} examples {len(held_out):,} are held out"]
    return Data(examples, learned, examples, held_out, source.cut.fps, sha256, report)


def from_images(data: Data, model: TrainableModel) -> Data:
    """The same for a model that makes clips from an image: held-out clips tell their first frames, and images alone, of which nothing is left to make, are not used."""
    learned, held_out = ([row for row in rows if examples.shapes[row][1] > 1] for rows, examples in ((data.learned, data.examples), (data.held_out, data.held)))
    if not learned or not held_out:
        raise UserError("images alone are left, and this model makes clips from them, data. Give longer clips")
    report = f"{len(data.learned) + len(data.held_out) - len(learned) - len(held_out):,} images are not used: this model makes clips from images"
    return data._replace(learned=learned, held=FromImages(data.held, model), held_out=held_out, report=[*data.report, report])


# The run


def train(fit: Fit, run: Run, model: LatentVideoModel, pairs: Pairs, held_out: Pairs) -> None:
    """Fits the built-in `model.network` to pairs in memory, without looking at more than the held-out loss; leaves the averaged weights in it."""
    if fit.routed:
        middle(model.config.depth)
    velocities = Velocities(model)
    lesson = Lesson(fit, run, velocities, pairs, range(len(pairs)), packs=fit.packs, balanced=False)

    def look(number: int, average: EMA) -> None:
        with average.swap(), run.looking():
            errors = run.on_main(lambda: held_out_losses(model, held_out, run.generator("held out", 0)))
        run.log(held_out_loss=errors.mean(), held_out_loss_low_noise=errors[:2].mean(), held_out_loss_high_noise=errors[-2:].mean())

    run.register("network", model.network)
    run.count_forwards(model.network)
    fit_network(fit, run, model.network, lesson.step, look)


def load_to_train(cfg: Config, device: torch.device) -> TrainableModel:
    """The model with what trains of it: an adapter, or all weights. Raises UserError for what does not go together."""
    if cfg.nf4 and not cfg.lora_rank:
        raise UserError("weights in four bits do not train, nf4. Give lora_rank, or leave nf4 off")
    if cfg.stream and (cfg.data or cfg.shard):
        raise UserError("a stream stands in place of data, and is not sharded, stream. Leave data and shard out")
    if cfg.context_parallel and (cfg.shard or cfg.stream or cfg.compiled):
        raise UserError("clips that are spread over processes are not sharded, streamed or compiled as well, context_parallel. Leave shard, stream and compiled out")
    if cfg.dora and not cfg.lora_rank:
        raise UserError("dora is a kind of LoRA. Give lora_rank, or leave dora off")
    model = load_model(cfg.model, device=device, nf4=cfg.nf4, recompute=cfg.recompute, fps=cfg.windows.fps)
    if cfg.model is not None and not isinstance(model, LatentVideoModel) and (cfg.merged or not cfg.lora_rank):
        check_can_save(cfg.model, cfg.out / CHECKPOINT)
    if isinstance(model, LatentVideoModel):
        if cfg.fit.routed:
            middle(model.config.depth)
    elif cfg.fit.token_drop or cfg.fit.routed or cfg.fit.condition_noise:
        raise UserError("fit.token_drop, fit.routed and fit.condition_noise are for the built-in model. Leave them out")
    if isinstance(model, WanImageVideoModel) and not math.isclose(sum(cfg.fit.conditions.values()), 1):
        raise UserError("this Wan makes clips from an image, so every clip has to give one, fit.conditions. Give {image: 1}, or other kinds whose shares add up to 1")
    if cfg.lora_rank:
        targets = model.lora_targets + (model.mlp_targets if cfg.mlp else ())
        model.network = add_lora(model.network, rank=cfg.lora_rank, alpha=cfg.lora_rank, targets=targets, seed=cfg.seed, dora=cfg.dora)
    else:
        model.network.requires_grad_(True)
    if cfg.compiled:
        compile_blocks(model.network)
    return model


def validation_of(cfg: Config, velocities: Velocities, data: Data) -> Validation:
    """The held-out clips at fixed noise, at the shift that clips of their size are trained with."""
    tokens = [num_tokens(data.held.shapes[row], velocities.model.patch) for row in data.held_out]
    return Validation(velocities, data.held, data.held_out, cfg.seed, shifts(cfg.fit, tokens), capacity=cfg.fit.capacity)


def samples_of(cfg: Config, velocities: Velocities, data: Data) -> tuple[Conditioning, Sampler]:
    """What the samples show, encoded once, and how they are made: of the size of the first held-out clip. From images, they show held-out clips of that size."""
    model, shape = velocities.model, data.held.shapes[data.held_out[0]]
    guidance = cfg.samples.guidance or (1.0 if isinstance(model, LatentVideoModel) else 5.0)
    size = pixels(model.latents, shape)
    sampler = Sampler(steps=cfg.samples.steps, guidance=guidance, fps=data.fps, frames=size.frames, height=size.height, width=size.width, batch=1)
    check_sampler(model, sampler)
    if velocities.from_image:
        return together([data.held.cond(row) for row in data.held_out if data.held.shapes[row] == shape][:4]), sampler
    prompts = cfg.samples.prompts or [prompt.text for prompt in data.asked] or list(dict.fromkeys(data.held.texts[row] for row in data.held_out))[:4]
    return encode_prompts(model, prompts), sampler


class Looks:
    """What is looked at on the way: held-out clips on the weights as they are and on their average, and samples of the average."""

    def __init__(self, cfg: Config, run: Run, validation: Validation, data: Data) -> None:
        self.cfg, self.run, self.validation, self.asked = cfg, run, validation, () if cfg.samples.prompts else data.asked
        self.cond, self.sampler = samples_of(cfg, validation.velocities, data)

    def __call__(self, number: int, average: EMA) -> None:
        """After so many steps."""
        fit, run, right = self.cfg.fit, self.run, None
        with run.looking():
            raw = self._summary()
            with average.swap():
                averaged = self._summary()
                if number // fit.evaluate_every % self.cfg.samples.every == 0 or number == fit.iterations:
                    right = self._samples(number)
        if run.is_main:
            append_look(run.out, Look(number, raw, averaged, right))
            write_page(run.out)
        told = {} if right is None else {"right": right}
        losses = {"held_out_loss_low_noise": averaged.low_noise, "held_out_loss_high_noise": averaged.high_noise}
        run.log(held_out_loss=averaged.mean, held_out_loss_raw=raw.mean, **losses, **told)

    def _summary(self) -> Summary:
        with contextlib.nullcontext() if self.cfg.context_parallel else self.run.whole():
            errors = self.validation.errors() if self.cfg.shard else self.validation.errors(share=self.run.share, gather=self.run.gather)
        return self.validation.summary(errors)

    def _samples(self, number: int) -> float | None:
        sheet = self.run.out / "samples" / f"{number:06d}.png"
        draw = partial(sample_grid, self.validation.velocities.model, self.cond, self.sampler, seed=self.cfg.seed, sheet=sheet, asked=self.asked)
        with self.run.whole():
            return self.run.on_main(lambda: draw().right)


def tell(cfg: Config, run: Run, data: Data, lesson: Lesson, source: ClipStream | None) -> None:
    """Tries the costliest micro-batch, and reports what is ahead, on the terminal and as `data.json`."""
    rows = lesson.costliest()
    seconds = dry_run(
        run,
        lesson.velocities,
        [lesson.examples.shapes[row] for row in rows],
        lambda: micro_batch(cfg.fit, lesson.velocities, lesson.examples, 1.0, (rows, run.generator("dry run", 0))),
    )
    clips = source.step if source else statistics.fmean(sum(map(len, lesson.chosen(i))) for i in range(16))
    flops = cfg.fit.iterations * clips * statistics.fmean(lesson.flops.values())
    left = duration(seconds / sum(lesson.flops[row] for row in rows) * flops / run.processes)
    epochs = "" if source else f"{cfg.fit.iterations * clips / len(lesson.rows):.1f} epochs, "
    report = [*data.report, f"{cfg.fit.iterations:,} steps, {epochs}{flops:.2e} FLOPs; about {left}, without looks at held-out clips"]
    if run.is_main:
        print(*(f"sft: {line}" for line in report), sep="\n", file=sys.stderr, flush=True)
        atomic_write(cfg.out / "data.json", (json.dumps({"report": report, "sha256": data.sha256}, indent=2, ensure_ascii=False) + "\n").encode())


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    started = time.monotonic()
    run = Run(cfg.out, cfg, seed=cfg.seed, resume=resume, metrics=METRICS)
    model = load_to_train(cfg, run.device)
    run.note("model", run.on_main(partial(model_lineage, cfg.model)))
    if cfg.context_parallel:
        check_can_split(model.network, run.processes)
    source = stream_of(cfg.stream, model, cut_for(model, cfg.windows), seed=cfg.seed) if cfg.stream else None
    data = stream_data(cfg, source) if source else data_of(cfg, run, model)
    before = folder_data(cfg, run, model, cfg.remember.data) if cfg.remember.data else None
    filters = read_lineage(cfg.data)
    run.note("safety", filters)
    run.note("data_sha256", data.sha256)
    if before:
        kept = read_lineage(cfg.remember.data)
        run.note("remembered", {"data_sha256": before.sha256, "safety": kept})
        filters = [*filters, *(each for each in kept if each not in filters)]

    velocities, counter = Velocities(model, packs=not cfg.context_parallel), FlopCounter(model)
    if velocities.from_image:
        data = from_images(data, model)
    looks = Looks(cfg, run, validation_of(cfg, velocities, data), data)
    known = Lesson(cfg.fit, run, velocities, data.examples, data.learned, packs=cfg.fit.packs, counter=counter, balanced=not isinstance(data.examples, Pairs))
    lesson = StreamLesson(cfg.fit, run, velocities, source, counter=counter) if source else known
    remembered = before and Lesson(cfg.fit, run, velocities, before.examples, before.learned, packs=cfg.remember.packs, counter=counter, stream="remembered noise")
    if cfg.shard:
        run.shard(velocities.network)
    if cfg.context_parallel:
        for shape in sorted({*data.examples.shapes, *data.held.shapes, *(before.examples.shapes if before else ())}):
            check_tokens(num_tokens(shape, model.patch), run.processes, f"a clip of {pixels(model.latents, shape)}")
        run.split_clips(velocities.network)
    tell(cfg, run, data, known, source)
    run.register("network", model.network, trainable_only=bool(cfg.lora_rank))
    if source:
        run.register("stream", source)
    run.count_forwards(velocities.network)

    def plan(i: int) -> Step:
        step = lesson.step(i)
        return with_remembered(step, remembered.step(i), cfg.remember.weight) if remembered else step

    speed = Speed(run.processes * peak_flops(run.device).rate, lambda: lesson.waited, partial(peak_memory, run.device))
    fit_network(cfg.fit, run, velocities.network, plan, looks, fused=not isinstance(model, LatentVideoModel), speed=speed)

    run.unshard()
    found = read_looks(cfg.out)[-1].averaged
    measured = {"held_out_loss": found.mean if found else None}
    weights, sha256 = run.on_main(partial(export, cfg, model, run.seconds, learned_from(cfg, data, before), filters, measured))
    return {"weights": str(weights), "sha256": sha256, **measured, "wall_seconds": round(time.monotonic() - started, 1)}


def learned_from(cfg: Config, data: Data, before: Data | None) -> str:
    """What the card says of the data: its hash; of a stream that of its beginning, held-out examples among it; and the hash of what is remembered."""
    own = f"{data.sha256} (the first {len(data.examples)} examples of a stream)" if cfg.stream else data.sha256
    return own if before is None else f"{own}, remembered {before.sha256}"


def export(cfg: Config, model: TrainableModel, seconds: float, data: str, filters: Sequence[Mapping[str, Any]], measured: Mapping[str, object]) -> tuple[Path, str]:
    """Writes what was trained, with its card, and returns where and its hash: the built-in network with its adapter merged; a family's adapter, or all of it as a checkpoint."""
    with_card: dict[str, Any] = {"recipe": "sft", "cfg": cfg, "data": data, "seconds": seconds, "measured": measured, "safety": filters}
    if isinstance(model, LatentVideoModel):
        if cfg.lora_rank:
            model.network = merge(model.network)
        weights = cfg.out / NETWORK
        write_card(weights, lambda path: save_network(path, model), **with_card)
        return weights, file_hash(weights)
    assert cfg.model is not None, "a family is loaded from somewhere"
    adapter = save_policy(model, cfg.out, source=cfg.model, **with_card) if cfg.lora_rank else None
    if adapter is None or cfg.merged:
        checkpoint = save_checkpoint(model, cfg.model, cfg.out / CHECKPOINT, data_licence=cfg.data_licence, **with_card)
    return (adapter, file_hash(adapter)) if adapter else (checkpoint, model_lineage(checkpoint))
