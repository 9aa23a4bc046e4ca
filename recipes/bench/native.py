"""Native sizes against square crops: what training on clips as they are buys, at equal tokens.

The report on Sora (OpenAI 2024, "Video generation models as world simulators") says that a model trained on square crops puts its subject half out of the picture more often than
one trained on clips of native sizes. Here two networks a seed begin with the same weights and see the same clips with the same captions: `native` as they are, `square` cropped
to the square in their middle. Packs hold equally many tokens, so a step costs the same; crops are smaller, so `square` sees a clip more often. Both then make
the same held-out prompts from the same noise at several sizes, and are judged by classical image processing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

from align.config import Count, dump
from align.data import PackSampler
from base_model.errors import UserError
from base_model.tiny import LatentCodec, LatentVideoModel, load_codec, load_tiny
from base_model.types import ClipShape
from base_model.video.files import write_atomic
from recipes.bench._results import Bench, Row, check_can_end, flat, here, place, write
from recipes.bench._trained import (
    CODEC,
    HELD_OUT_SEED,
    PROMPT_SEED,
    Pace,
    Seeds,
    Trained,
    Training,
    asked,
    first_model,
    kept,
    look_settings,
    looks,
    train_kept,
    training,
)
from recipes.bench.networks import Size
from recipes.bench.strip import Shown, draw, judged
from recipes.fit import Fit, held_out_errors
from recipes.generate import Sampler, best_device, sample
from recipes.pairs import Pairs, encode_pairs
from recipes.shapes.dataset import ClipSet, draw_clips
from recipes.shapes.judge import in_frame, judge
from recipes.shapes.render import DEMO_CLIP, native_clips, render, sample_curated_pair, sample_scene
from recipes.statistics import UNKNOWN, Interval, bootstrap_crossed

Arm = Literal["native", "square"]
ARMS: tuple[Arm, ...] = ("native", "square")
SEEN: dict[Arm, str] = {"native": "native clips", "square": "square crops of native clips"}
CLOSE = 0.01
"""Tokens of both may differ by this share."""
SHOWN = 6  # prompts of the sheet
POOLED = "all sizes"
MEASURES = {
    "found_in_frame": "found and in the frame",
    "in_frame": "object in the frame",
    "all_right": "adherence",
    "right_in_frame": "adherence and in the frame",
    "shape_right": "shape right",
    "colour_right": "colour right",
    "motion_right": "motion right",
    "loss": "held-out loss",
    "found": "an object is found",
}
Table = NDArray[np.float64]


class Config(Bench):
    out: Path = Path("runs/bench-native")
    """Folder of the trainings: what is finished there is not repeated. `quick` keeps nothing."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of weights, clips and noise, one training of each arm for every one. `quick` takes the first."""
    base: Path | None = None
    """Network both begin with; none means fresh weights."""
    network: Size = Size(width=128, depth=4)
    """Size of a fresh network."""
    clips: Count = 6_000
    """Curated pairs of native sizes, all of them equally often. `quick` takes at most 64."""
    fit: Fit = Fit(iterations=1_500, lr=5e-3, optimizer="muon", time_shift=2.5, save_every=100, evaluate_every=100_000)
    """How both are trained. `quick` takes at most 4 iterations and 8 held-out clips."""
    prompts: Count = 160
    """Held-out prompts of one object, one clip each of every size. `quick` takes at most 8."""
    sizes: Annotated[tuple[tuple[Count, Count, Count], ...], Field(min_length=1)] = ((13, 24, 48), (13, 48, 24), (13, 32, 32))
    """Frames, height and width of what is made."""
    sampler: Sampler = Sampler()
    """How clips are denoised; `sizes` replace its size."""
    sheet: Path | None = None
    """Picture of the first prompts in the first of the sizes, both arms of the first seed side by side."""

    @field_validator("sizes")
    @classmethod
    def _sizes_fall_on_the_grid(cls, sizes: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        for frames, height, width in sizes:
            if frames % 4 != 1 or height % 8 or width % 8:
                raise ValueError(f"expected frames of 1 + a multiple of 4 and sides that are multiples of 8, got {frames}x{height}x{width}")
        return sizes


# Data


def draw_native(number: int, *, seed: int) -> ClipSet:
    """Curated pairs whose shapes are drawn evenly from the native ones of 5 frames or more: nearly four in five are no squares, up to 2:1."""
    shapes = [shape for shape in native_clips()[0] if shape.frames >= 5]
    texts, videos = [], []
    for index in range(number):
        rng = np.random.default_rng([seed, index, 2])
        text, video = sample_curated_pair(rng, shapes[int(rng.integers(len(shapes)))])
        texts.append(text)
        videos.append((video * 255).round().to(torch.uint8))
    return ClipSet(tuple(texts), tuple(videos))


def crop_square(video: Tensor) -> Tensor:
    """The square in the middle of a clip [T,3,H,W], its side the largest multiple of 8 that fits: [T,3,S,S]."""
    height, width = video.shape[-2:]
    side = min(height, width) // 8 * 8
    top, left = (height - side) // 2, (width - side) // 2
    return video[..., top : top + side, left : left + side]


def as_seen(arm: Arm, clips: ClipSet) -> ClipSet:
    """The clips as an arm sees them."""
    return clips if arm == "native" else ClipSet(clips.texts, tuple(crop_square(video).contiguous() for video in clips.videos))


def encoded(cfg: Config, model: LatentVideoModel, seed: int, arm: Arm) -> Pairs:
    return encode_pairs(model, as_seen(arm, draw_native(cfg.clips, seed=seed)))


def tokens_of(pairs: Pairs, fit: Fit, seed: int, model: LatentVideoModel) -> int:
    """Tokens of all packs of a training."""
    lengths = pairs.num_tokens(model.config.patch)
    sampler = PackSampler(lengths, fit.capacity, seed=seed)
    return sum(lengths[j] for k in range(fit.iterations * fit.packs) for j in sampler[k])


# What a network shows


def measured(cfg: Config, weights: Path, held_out: dict[str, Pairs]) -> dict[str, Any]:
    """{size: {name of `_trained.LOOKS` or loss: one value a prompt, or a held-out clip}}."""
    model, (prompts, seeds) = load_tiny(weights).to(best_device()), asked(cfg.prompts)
    found: dict[str, Any] = {}
    for size, sampler in samplers(cfg).items():
        errors = held_out_errors(model, held_out[size], torch.Generator().manual_seed(0)).mean(0)  # [B]
        found[size] = looks(model, prompts, seeds, sampler) | {"loss": errors.tolist()}
    return found


def samplers(cfg: Config) -> dict[str, Sampler]:
    return {str(ClipShape(f, h, w)): cfg.sampler.model_copy(update={"frames": f, "height": h, "width": w}) for f, h, w in cfg.sizes}


def drawn(cfg: Config) -> dict[str, dict[str, list[float | None]]]:
    """The same measures of clips drawn of the same prompts and sent through the autoencoder, in the form of `measured`: what a perfect network would get."""
    codec, prompts, rng = load_codec(CODEC).to(best_device()), asked(cfg.prompts)[0], np.random.default_rng(PROMPT_SEED)
    found: dict[str, dict[str, list[float | None]]] = {}
    for size, sampler in samplers(cfg).items():
        scenes = [render(sample_scene(prompt, rng, clip=sampler.clip), sampler.clip) for prompt in prompts]
        clips = torch.cat([through(codec, torch.stack(scenes[begin : begin + sampler.batch])) for begin in range(0, len(scenes), sampler.batch)])  # [N,T,3,H,W]
        seen = judge(clips, prompts)
        flags: dict[str, list[bool | None]] = {
            "all_right": [one.all_right for one in seen],
            "shape_right": [one.shape_right[0] for one in seen],
            "colour_right": [one.colour_right[0] for one in seen],
            "motion_right": [one.motion_right[0] for one in seen],
            "in_frame": [in_frame(clip) for clip in clips],
        }
        found[size] = {name: [None if flag is None else float(flag) for flag in values] for name, values in flags.items()}
    return found


@torch.no_grad()
def through(codec: LatentCodec, video: Tensor) -> Tensor:
    """What the autoencoder makes of clips [B,T,3,H,W]."""
    return codec.decode(codec.encode(video.to(best_device()))).cpu()


# Rows


class Results(NamedTuple):
    """One arm of one seed: how it was trained, and `measured`."""

    trained: Trained
    found: dict[str, Any]


def tables(results: Sequence[Results], size: str, measure: str) -> Table:
    """[seeds, prompts or clips], nan where nothing is known; over all sizes the mean over those that are known."""
    sizes = list(results[0].found) if size == POOLED else [size]
    values = np.array([[values_of(one.found[each], measure) for each in sizes] for one in results])  # [S,sizes,N]
    known = ~np.isnan(values)
    number = known.sum(1)  # [S,N]
    return np.where(number > 0, np.where(known, values, 0).sum(1) / np.maximum(number, 1), np.nan)


def values_of(found: dict[str, list[float | None]], measure: str) -> Table:
    """[N] of one size. In the frame is only known where an object is found; `found_in_frame` and `right_in_frame` count the other clips as not in it."""
    whole = np.array(found["in_frame"], dtype=np.float64)
    derived = {"found": ~np.isnan(whole), "found_in_frame": whole == 1, "right_in_frame": (whole == 1) & (np.array(found["all_right"]) == 1)}
    return np.array(derived[measure] if measure in derived else found[measure], dtype=np.float64)


def compare(cfg: Config, results: dict[Arm, list[Results]], ceiling: dict[str, dict[str, list[float | None]]]) -> list[Row]:
    """One row a size and measure: both arms, and their paired difference."""
    perfect = [Results(results["native"][0].trained, ceiling)]
    rows = []
    for size in (*samplers(cfg), POOLED):
        for measure, name in MEASURES.items():
            mine = {arm: tables(results[arm], size, measure) for arm in ARMS}
            found: dict[str, Interval] = {arm: bootstrap_crossed(table) for arm, table in mine.items()}
            found["native_minus_square"] = bootstrap_crossed(mine["native"] - mine["square"])
            best = UNKNOWN if measure == "loss" else bootstrap_crossed(tables(perfect, size, measure))
            rows.append({"size": size, "measure": name, **_flat(found), "drawn_clips": best.as_json()["mean"]})
    return rows


def _flat(intervals: dict[str, Interval]) -> Row:
    return {name if part == "mean" else f"{name}_{part}": value for name, each in intervals.items() for part, value in each.as_json().items()}


def trainings(cfg: Config, results: dict[Arm, list[Results]]) -> list[Row]:
    """One row a training."""
    return [
        {
            "seed": seed,
            "arm": arm,
            "iterations": cfg.fit.iterations,
            "tokens_per_step": results[arm][k].trained.tokens / cfg.fit.iterations,
            "tokens_over_native": results[arm][k].trained.tokens / results["native"][k].trained.tokens,
            "train_seconds": results[arm][k].trained.seconds,
        }
        for k, seed in enumerate(cfg.seeds)
        for arm in ARMS
    ]


# The command


def check_tokens(cfg: Config, model: LatentVideoModel, pairs: Callable[[Arm], Pairs], seed: int) -> None:
    """Raises UserError where the packs of both arms hold unequally many tokens: it is no fair comparison then. The quick form is none anyway."""
    native, square = (tokens_of(pairs(arm), cfg.fit, seed, model) for arm in ARMS)
    if not cfg.quick and abs(square / native - 1) > CLOSE:
        raise UserError(f"square sees {square / native:.3f} times the tokens of native; they must agree within {CLOSE:.0%}. Give more --fit.iterations or another --fit.capacity")


def measure(cfg: Config, out: Path) -> dict[str, list[Row]]:
    """The rows of each part."""
    asked(cfg.prompts)  # too many are known before the work
    what: dict[Arm, Training] = {arm: training(SEEN[arm], cfg.clips, cfg.network, cfg.base, cfg.fit) for arm in ARMS}
    model, sizes = first_model(what["native"], cfg.seeds[0], cfg.base), samplers(cfg)
    demo, *others = (encode_pairs(model, draw_clips("curated", cfg.fit.held_out, seed=HELD_OUT_SEED, shape=shape)) for shape in (DEMO_CLIP, *(one.clip for one in sizes.values())))
    held_out = dict(zip(sizes, others, strict=True))
    sampler = {key: value for key, value in dump(cfg.sampler).items() if key not in ("frames", "height", "width")}
    results: dict[Arm, list[Results]] = {arm: [] for arm in ARMS}
    pace = Pace("native", len(cfg.seeds) * len(ARMS))
    for seed in cfg.seeds:
        pairs: Callable[[Arm], Pairs] = cache(partial(encoded, cfg, model, seed))
        folders: dict[Arm, Path] = {arm: out / f"seed-{seed}" / arm for arm in ARMS}
        if not all((folder / "trained.json").exists() for folder in folders.values()):
            check_tokens(cfg, model, pairs, seed)
        for arm, folder in folders.items():
            fresh = not (folder / "result.json").exists()
            done = train_kept(folder, what[arm], seed, cfg.base, partial(pairs, arm), demo)
            settings = {**look_settings(done.weights, cfg.prompts, sampler), "sizes": list(sizes), "held_out": cfg.fit.held_out}
            found = kept(folder / "result.json", settings, partial(measured, cfg, done.weights, held_out))
            results[arm].append(Results(done, found))
            pace.advance(f"seed {seed}, {arm}", 1, fresh=fresh)
    if cfg.sheet is not None:
        write_sheet(cfg, cfg.sheet, {arm: results[arm][0].trained.weights for arm in ARMS})
    return {"comparison": compare(cfg, results, drawn(cfg)), "training": trainings(cfg, results)}


def write_sheet(cfg: Config, path: Path, weights: dict[Arm, Path]) -> None:
    """The first prompts in the first size, native on the left and square on the right; nobody picks."""
    prompts, seeds = asked(min(SHOWN, cfg.prompts))
    sampler = next(iter(samplers(cfg).values()))
    shown: dict[str, list[Shown]] = {}
    for arm, file in weights.items():
        model = load_tiny(file).to(best_device())
        video = torch.cat(list(sample(model, model.encode_text([prompt.text for prompt in prompts]), seeds, sampler)))  # [N,T,3,H,W]
        shown[arm] = [_remarked(one) for one in judged(video, prompts)]
    buffer = io.BytesIO()
    draw([prompt.text for prompt in prompts], shown, 5, 2).save(buffer, "PNG", optimize=True)
    write_atomic(path, buffer.getvalue())
    print(f"wrote {path}", file=sys.stderr)


def _remarked(shown: Shown) -> Shown:
    return shown._replace(remark=", ".join(part for part in (shown.remark, "leaves the frame" if in_frame(shown.video) is False else "") if part))


def shrunk(cfg: Config) -> Config:
    """The quick form: enough to see that everything runs, too little to learn anything from the numbers."""
    fit = cfg.fit.model_copy(update={"iterations": min(4, cfg.fit.iterations), "held_out": min(8, cfg.fit.held_out)})
    return cfg.model_copy(update={"seeds": cfg.seeds[:1], "clips": min(64, cfg.clips), "prompts": min(8, cfg.prompts), "fit": fit})


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing: what is finished in `out` is never repeated."""
    check_can_end(cfg, out=None if cfg.quick else cfg.out, sheet=cfg.sheet)
    with place(cfg, cfg.out) as out:
        parts = measure(shrunk(cfg) if cfg.quick else cfg, out)
    if cfg.write:
        remarks = [
            f"Means over {len(parts['training']) // len(ARMS)} seeds; `low` and `high` are 95 % bootstraps over seeds and prompts (of the loss: held-out clips), both resampled. "
            "`native minus square` is paired: equal seeds, prompts and noise; for the object in the frame, where both show one. "
            "`drawn clips` is what drawn clips of the same prompts get after the autoencoder.",
        ]
        name, start = ("native", "") if cfg.base is None else ("native-from-base", ", from a trained network")
        write(cfg, name, here("native", cfg), f"Native sizes against square crops{start}", {part.capitalize(): rows for part, rows in parts.items()}, remarks=remarks)
    return {"rows": flat(parts)}
